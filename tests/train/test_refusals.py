"""What a scaled training refuses in one line, and the lines it begins and ends with."""

import json
from pathlib import Path

import pytest
import torch

from lens import LensTransformer2DModel
from lens.config import LensConfig
from lens.formats.released import load_transformer, save_transformer
from train.__main__ import main

SHIPPED = Path(__file__).parents[2] / "lens" / "mini" / "base"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "world"
    command = "shards --world mini --bases 64 --aspects 1:1 --per-bucket 4 --precompute latents,text"
    assert main([*command.split(), "--model", str(SHIPPED), "--out", str(out)]) == 0
    return out


def words(shards, out, *changes, init=SHIPPED):
    start = ["mixed_resolution", "--config", "mini/on_shards", "--data", str(shards), "--out", str(out), "--steps", "1"]
    return [*start, "--init", str(init), *(word for change in ("BATCH.64=2", *changes) for word in ("--set", change))]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A checkpoint of half the text features."""
    folder = tmp_path_factory.mktemp("other")
    mini = load_transformer(SHIPPED / "transformer", torch.float32, "cpu").config
    model = LensTransformer2DModel(LensConfig(**{**vars(mini), "num_layers": 1, "enc_hidden_dim": 64}))
    save_transformer(model, folder / "transformer")
    return folder


def test_a_checkpoint_for_other_features_is_named(shards, other, tmp_path):
    expected = r"data has latents of 32 channels and 4 x 128 text features, the MMDiT takes .* 32 channels and 4 x 64 "
    with pytest.raises(ValueError, match=expected):
        main(words(shards, tmp_path, init=other))
    assert not (tmp_path / "checkpoints").exists()


def test_a_start_there_is_not_is_named_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"--init .*gone: no such folder; expected a checkpoint folder, or a state"):
        main(words(tmp_path / "no shards either", tmp_path, init=tmp_path / "gone"))


@pytest.mark.parametrize("change", ["ASPECTS=('7:5',)", "BASES=(128,)"])
def test_data_without_a_bucket_of_the_recipe_is_named(shards, tmp_path, change):
    with pytest.raises(
        ValueError,
        match=r"holds no bucket of BASES and ASPECTS: 64_1x1; expected (64_7x5, 96_7x5, 128_7x5|128_1x2, .*, \.\.\.)$",
    ):
        main(words(shards, tmp_path, change))


def test_a_batch_of_nothing_is_named(shards, tmp_path):
    with pytest.raises(ValueError, match="BATCH: base 64 has 0 pictures in a micro-batch, expected at least 1"):
        main(words(shards, tmp_path, "BATCH.64=0"))


def test_first_and_last_lines_say_whence_and_where(shards, tmp_path, capsys):
    assert main(words(shards, tmp_path)) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert f"parameters from {SHIPPED}; 4 samples in 1 buckets; 1 processes on cpu; into {tmp_path}" in first
    assert last == f"step 1 is saved: {tmp_path}/checkpoints/step_0000001"
    assert json.loads((tmp_path / "checkpoints" / "step_0000001" / "state.json").read_text())["step"] == 1
    assert main([*words(shards, tmp_path), "--steps", "2"]) == 0
    assert f"parameters from step 1 of {tmp_path}/checkpoints/step_0000001; " in capsys.readouterr().out
    export = ["mixed_resolution", "--config", "mini/on_shards", "--out", str(tmp_path), "--export", str(tmp_path / "x")]
    assert main(export) == 0
    assert capsys.readouterr().out == f"step_0000002 is exported: {tmp_path}/x/transformer\n"
