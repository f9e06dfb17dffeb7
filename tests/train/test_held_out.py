"""The loss of the scaled training written anew: the slow model, one picture at a time, from the shards and the keys alone."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.reference_model import ReferenceLens
from train import configs
from train.__main__ import main
from train.data.buckets import BucketLaw, BucketSampler
from train.data.loader import Loader
from train.data.shards import ShardSet

SHIPPED = Path(__file__).parents[2] / "lens" / "mini" / "base"
BATCH = {64: 2, 96: 1}
SET = ["BATCH={64: 2, 96: 1}", "BASES=(64, 96)", "LOG_EVERY=1", "VALIDATE_EVERY=1", "VALIDATION=2", "TEXT_DROPOUT=0.3"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    for split in ("train", "held_out"):
        command = f"shards --world mini --bases 64 96 --aspects 1:1 1:2 --per-bucket 5 --split {split}"
        more = ["--precompute", "latents,text", "--model", str(SHIPPED), "--out", str(out / split)]
        assert main([*command.split(), *more]) == 0
    return out


def words(folders, out, *more):
    changes = [word for change in SET for word in ("--set", change)]
    start = ["mixed_resolution", "--config", "mini/on_shards", "--data", str(folders / "train"), "--out", str(out)]
    return [*start, "--init", str(SHIPPED), "--validate", str(folders / "held_out"), "--steps", "1", *changes, *more]


def draw(purpose, step, sample, shape, kind):
    """As train/loop/keys.py says: a generator seeded by SHA-256 of "seed purpose step sample"."""
    digest = hashlib.sha256(f"{configs.load('mini/on_shards', '').SEED} {purpose} {step} {sample}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") // 2)
    return kind(shape, generator=generator)


def losses_by_hand(model, batch, mu_line, text):
    """Of every picture: mean (v - (noise - clean))^2 at its own time."""
    (n0, mu0), (n1, mu1) = mu_line
    mu = mu0 + (batch.bucket.tokens - n0) * (mu1 - mu0) / (n1 - n0)
    found, first = [], 0
    for i, (clean, length) in enumerate(zip(batch.latents, batch.lengths, strict=True)):
        features, first = batch.features[first : first + length if text else first], first + length
        place = batch.slot * 4096 + i
        u = draw("time", batch.step, place, (1,), lambda *a, **k: torch.rand(*a, dtype=torch.float64, **k))
        t = torch.sigmoid(mu + 2**0.5 * torch.erfinv(2 * u - 1)).float()  # the normal quantile of u
        noise = draw("noise", batch.step, place, clean.shape, torch.randn)
        x = t * noise + (1 - t) * clean
        mask = torch.ones(1, len(features), dtype=torch.bool)
        with torch.no_grad():
            v = model(x[None], [f[None] for f in features.unbind(1)], mask, t, batch.bucket.grid)[0]
        found.append((v - noise + clean).pow(2).mean().item())
    return found


def batches(folder, count, dropout):
    recipe, shards = configs.load("mini/on_shards", ""), ShardSet(folder)
    law = BucketLaw(BATCH, recipe.BASE_WEIGHTS, recipe.ASPECT_WEIGHTS)
    stream = Loader(shards, BucketSampler(shards.sizes, law, recipe.SEED, recipe.SLOTS), None, dropout).batches()
    return [next(stream) for _ in range(count * recipe.SLOTS)]


def mean(values):
    return sum(values) / len(values)


def test_losses_are_those_written_anew(folders, tmp_path):
    """Of the first step, before anything moves (rank_mean), and of held-out pictures, with and without their text."""
    assert main(words(folders, tmp_path / "run", "--set", "LR=1e-12", "--set", "WEIGHT_DECAY=0.0")) == 0
    unseen, step = (json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()[::-1])
    config = json.loads((SHIPPED / "transformer" / "config.json").read_text())
    model = ReferenceLens(config).eval()
    files = sorted((SHIPPED / "transformer").glob("*.safetensors"))
    model.load_state_dict({k: v.float() for file in files for k, v in load_file(file).items()})
    line = configs.load("mini/on_shards", "").MU

    own = [mean(losses_by_hand(model, batch, line, True)) for batch in batches(folders / "train", 1, 0.3)]
    assert step["loss"] == pytest.approx(mean(own), rel=1e-4)

    held = batches(folders / "held_out", 2, 0.0)
    for name, text in (("with_text", True), ("without_text", False)):
        found = {base: [] for base in BATCH}
        for batch in held:
            found[batch.bucket.base] += losses_by_hand(model, batch, line, text)
        assert unseen[name] == pytest.approx(mean(found[64] + found[96]), rel=1e-4)
        for base, values in found.items():
            assert unseen[f"{name}_{base}"] == pytest.approx(mean(values), rel=1e-4)
    assert unseen["text_explains"] == pytest.approx(1 - unseen["with_text"] / unseen["without_text"], rel=1e-4)
    assert unseen["text_explains"] > 0.01


def test_the_pictures_of_the_training_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="holds the pictures of --data; expected others"):
        main(words(folders, tmp_path, "--validate", str(folders / "train")))
