"""Stages A and B by their commands, on shards of the small world: resumed bit for bit, drawn, exported, under torchrun."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image

from lens import LensTransformer2DModel
from lens.config import LensConfig
from lens.formats import lora
from lens.formats.lora import Adapters
from lens.formats.released import load_transformer, save_transformer
from train import __main__ as commands
from train.__main__ import main

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "lens" / "mini" / "base"
SMALL = ["BATCH.64=2", "SHEET.steps=1", "LOG_EVERY=1", "SAVE_EVERY=100", 'PROMPTS=("a red apple", "a blue car")']


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "world"
    command = "shards --world mini --bases 64 --aspects 1:1 1:2 --per-bucket 10 --precompute latents,text"
    assert main([*command.split(), "--model", str(SHIPPED), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A checkpoint of two of the shipped six blocks: states that are saved, compared and exported are a third as large."""
    stored = load_transformer(SHIPPED / "transformer", torch.float32, "cpu")
    model = LensTransformer2DModel(LensConfig(**{**vars(stored.config), "num_layers": 2}))
    model.load_state_dict({name: stored.state_dict()[name] for name in model.state_dict()})
    folder = tmp_path_factory.mktemp("two")
    save_transformer(model, folder / "transformer")
    return folder


def words(shards, init, out, steps, *more):
    changes = [word for change in SMALL for word in ("--set", change)]
    start = ["mixed_resolution", "--config", "mini/on_shards", "--data", str(shards), "--out", str(out)]
    return [*start, "--init", str(init), "--steps", str(steps), *changes, *more]


def tensors(out):
    """Everything in the latest state of a training."""
    folder = out / "checkpoints" / (out / "checkpoints" / "latest").read_text().strip()
    reader = dcp.FileSystemReader(folder)
    found = {
        n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in reader.read_metadata().state_dict_metadata.items()
    }
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found, json.loads((folder / "state.json").read_text())


@pytest.fixture(scope="module")
def trained(shards, two, tmp_path_factory):
    """Three steps, with the networks of the shipped checkpoint at hand, for the sheet."""
    out = tmp_path_factory.mktemp("trained")
    assert main(words(shards, two, out, 3, "--model", str(SHIPPED))) == 0
    return out


def test_resumed_by_the_same_command_it_is_bit_equal(shards, two, trained, tmp_path, capsys):
    assert main(words(shards, two, tmp_path, 1)) == 0
    assert main(words(shards, two, tmp_path, 3, "--set", "KEEP_LAST=1")) == 0
    (whole, state), (parts, other) = tensors(trained), tensors(tmp_path)
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
    assert state["data"] == other["data"]
    assert state["step"] == other["step"] == 3
    assert "KEEP_LAST was 2, is 1" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "checkpoints").glob("step*")] == ["step_0000003"]


@pytest.mark.parametrize(("asked", "kind"), [((), "model"), (("--weights", "average"), "ema")])
def test_a_training_begins_from_the_weights_of_another(asked, kind, shards, trained, tmp_path, capsys):
    """A rate of nothing leaves them where they began, and the state says from what."""
    first = trained / "checkpoints" / "step_0000003"
    changes = [w for change in ("LR=1e-30", "WEIGHT_DECAY=0.0", "MODEL.num_layers=2") for w in ("--set", change)]
    begin = words(shards, first, tmp_path, 1, *asked, *changes)
    assert main(begin) == 0
    which = asked[1] if asked else "raw"
    assert f"parameters from {first} ({which}); " in capsys.readouterr().out
    (found, state), (before, _) = tensors(tmp_path), tensors(trained)
    names = [name.removeprefix("ema.") for name in before if name.startswith("ema.")]
    assert [n for n in names if not torch.equal(found[f"model.{n}"], before[f"{kind}.{n}"])] == []
    assert (state["settings"]["INIT"], state["settings"]["WEIGHTS"]) == (str(first), which)
    with pytest.raises(ValueError, match=f"--weights .*: this training began from {which}"):
        main([*begin, "--weights", "average" if which == "raw" else "raw"])


def test_which_weights_is_asked_of_a_state_alone(shards, two, tmp_path):
    with pytest.raises(ValueError, match="--weights raw: expected --init STATE, a state of a training, beside it"):
        main(words(shards, two, tmp_path, 1, "--weights", "raw"))


def test_data_may_grow_within_a_training(shards, two, tmp_path, capsys):
    """The same data, stops and additions give the same weights, whether it is stopped once more or not."""
    more, build = tmp_path / "more", "shards --world mini --bases 64 --aspects 1:1 --per-bucket 7 --first-seed 900"
    assert main([*build.split(), "--precompute", "latents,text", "--model", str(SHIPPED), "--out", str(more)]) == 0
    with pytest.raises(ValueError, match=r"--extend-data .*more: expected a training to resume, there is no state in"):
        main(words(shards, two, tmp_path / "none", 1, "--extend-data", str(more)))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out, stops in ((whole, (1, 3)), (parts, (1, 2, 3))):
        for stop in stops:
            added = ("--extend-data", str(more)) if stop == stops[1] else ()
            assert main(words(shards, two, out, stop, *added)) == 0
    assert "27 samples in 2 buckets" in capsys.readouterr().out
    (one, state), (two, other) = tensors(whole), tensors(parts)
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    (entry,) = state["data"]["extended"]
    assert (entry["step"], entry["folder"]) == (1, str(more))
    assert state["data"] == other["data"]
    (more / "manifest.json").write_text((more / "manifest.json").read_text().replace('"sha256": "', '"sha256": "0'))
    with pytest.raises(ValueError, match=r"more: not the shards .* that this training was extended by"):
        main(words(shards, two, parts, 4))


def test_a_sheet_is_drawn_at_a_save(trained):
    with Image.open(trained / "sheet_0000003.png") as image:
        assert image.width > 2 * 64
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50


def test_the_averages_are_exported_in_the_released_layout(shards, trained, tmp_path):
    assert (
        main(["mixed_resolution", "--config", "mini/on_shards", "--out", str(trained), "--export", str(tmp_path)]) == 0
    )
    model = load_transformer(tmp_path / "transformer", torch.float32, "cpu")
    found, _ = tensors(trained)
    for name, p in model.named_parameters():
        want = found.get(f"ema.{name}", found[f"model.{name}"])
        assert torch.equal(p, want.bfloat16().float()), name
    averaged = [name for name in found if name.startswith("ema.")]
    assert len(averaged) > 0.9 * len([*model.parameters()])  # all but the last block's text, which nothing reads


def test_a_lora_by_the_command_resumes_and_is_exported_twice(shards, two, tmp_path):
    """From a checkpoint of two blocks where the recipe has six: the architecture is the checkpoint's."""
    whole, parts, out = (tmp_path / name for name in ("whole", "parts", "export"))
    assert main(words(shards, two, whole, 2, "--lora", "r=4,targets=all")) == 0
    assert main(words(shards, two, parts, 1, "--lora", "r=4,targets=all")) == 0
    assert main(words(shards, SHIPPED, parts, 2)) == 0  # the state knows
    (one, state), (other, _) = tensors(whole), tensors(parts)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert state["settings"]["LORA"] == "r=4,alpha=8,targets=all"
    assert state["settings"]["MODEL"]["num_layers"] == 2
    trained = [name for name in one if name.startswith("optimizer.exp_avg.")]
    assert trained
    assert all(".down." in name or ".up." in name for name in trained)
    before = load_transformer(two / "transformer", torch.float32, "cpu")
    assert torch.equal(one["model.blocks.1.image.qkv.base.weight"], before.blocks[1].image.qkv.weight)
    with pytest.raises(ValueError, match=r"--lora r=5,alpha=10,targets=attention: this training has r=4"):
        main(words(shards, SHIPPED, parts, 2, "--lora", "r=5"))

    assert main(["mixed_resolution", "--config", "mini/on_shards", "--out", str(whole), "--export", str(out)]) == 0
    by_hand = load_transformer(two / "transformer", torch.bfloat16, "cpu")
    Adapters(by_hand).add(lora.read(out / "lora"), 1.0)
    merged = load_transformer(out / "transformer", torch.bfloat16, "cpu")
    assert all(torch.equal(p, q) for p, q in zip(merged.parameters(), by_hand.parameters(), strict=True))


def test_shards_without_latents_need_networks(shards, two, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    manifest = json.loads((shards / "manifest.json").read_text())
    (bare / "manifest.json").write_text(json.dumps({**manifest, "precomputed": {}}))
    with pytest.raises(ValueError, match=r"holds no latents and no text; expected --model, or --vae and --encoder"):
        main(words(bare, two, tmp_path / "out", 1))


def test_an_export_disturbs_no_training(shards, two, tmp_path):
    """A save under way, and the state that is the latest, stay what they are."""
    out = tmp_path / "run"
    assert main(words(shards, two, out, 2, "--set", "SAVE_EVERY=1")) == 0
    under_way = out / "checkpoints" / ".step_0000003.part"
    under_way.mkdir()
    older = out / "checkpoints" / "step_0000001"
    asked = ["mixed_resolution", "--config", "mini/on_shards", "--out", str(out)]
    assert main([*asked, "--export", str(tmp_path / "export"), "--resume", str(older)]) == 0
    assert main([*asked, "--dry-run", "--world", "1"]) == 0
    assert under_way.is_dir()
    assert (out / "checkpoints" / "latest").read_text() == "step_0000002\n"


def test_a_damaged_state_is_named(trained, shards, two, tmp_path):
    shutil.copytree(trained, tmp_path / "copy")
    broken = tmp_path / "copy" / "checkpoints" / "step_0000003" / "__0_0.distcp"
    whole = bytearray(broken.read_bytes())
    whole[len(whole) // 2] ^= 1
    broken.write_bytes(whole)
    with pytest.raises(ValueError, match=r"__0_0\.distcp: not the file that was saved"):
        main(words(shards, two, tmp_path / "copy", 4))


def test_a_full_disk_is_one_line_and_the_last_state_stays(shards, two, tmp_path):
    """A real limit of the system: no file may grow beyond 100 KB."""
    assert main(words(shards, two, tmp_path, 1)) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()}

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = [sys.executable, "-m", "train", *words(shards, two, tmp_path, 2)]
    done = subprocess.run(command, cwd=ROOT, preexec_fn=limited, capture_output=True, text=True)
    assert done.returncode == 1
    said = f"error: {tmp_path}/checkpoints/step_0000002: not saved, File too large; the latest state is step_0000001\n"
    assert done.stderr.endswith(said)
    assert "Traceback" not in done.stderr
    assert {p: p.read_bytes() for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()} == before


def test_a_lost_shard_is_one_line_and_exit_code_one(shards, two, tmp_path, monkeypatch, capsys):
    shutil.copytree(shards, tmp_path / "gone")
    lost = tmp_path / "gone" / "64_1x2" / "000000.tar"
    lost.unlink()
    monkeypatch.setattr("sys.argv", ["train", *words(tmp_path / "gone", two, tmp_path / "out", 9)])
    assert commands.command() == 1
    error = capsys.readouterr().err
    assert f"error: {lost}: No such file or directory, asked for member " in error
    assert "Traceback" not in error


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("shard", "more"), [("1", []), ("2", []), ("2", ["--lora", "r=4"])], ids=["ddp", "fsdp", "lora"]
)
def test_torchrun_goes_on_where_one_process_stopped(shards, tmp_path, shard, more):
    """One step alone, two more on two processes, against three alone: the same samples and noise, equal up to sums (R2)."""
    assert main(words(shards, SHIPPED, tmp_path / "alone", 3, *more)) == 0
    assert main(words(shards, SHIPPED, tmp_path / "both", 1, *more)) == 0
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "train",
    ]
    command = [*torchrun, *words(shards, SHIPPED, tmp_path / "both", 3, "--shard", shard, "--model", str(SHIPPED))]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    (one, state), (two, other) = tensors(tmp_path / "alone"), tensors(tmp_path / "both")
    assert (state["world"], other["world"]) == (1, 2)
    assert state["data"] == other["data"]
    rows = [
        [json.loads(r)["loss"] for r in (tmp_path / d / "log.jsonl").read_text().splitlines()]
        for d in ("alone", "both")
    ]
    assert rows[0] == pytest.approx(rows[1], rel=1e-5)
    moved = [(one[n] - two[n]).norm() / (one[n].norm() + 1e-12) for n in one if n.startswith("model.")]
    assert max(moved) < 1e-4
    assert (tmp_path / "both" / "sheet_0000003.png").is_file()
