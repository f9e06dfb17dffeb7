"""Lens at its released size: what is written, and a draw with it, here with a few thousand times fewer weights."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from bench import __main__ as command
from bench import full_size
from bench.result import parse, table
from bench.work import checkpoint, parts
from lens import LensPipeline, pipeline
from lens.cli import __main__ as cli
from lens.cost import transformer_parameters
from lens.formats.files import CheckpointError
from lens.formats.gpt_oss import load_gpt_oss
from lens.formats.released import load_transformer
from lens.formats.safetensors import Streamed, open_shards, stream_tensors
from lens.image_file import read_recipe

SCALE = 4096
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("full size") / "lens-turbo"
    assert command.main(["full_size", "make", str(made), "--scale", str(SCALE)]) == 0
    return made


def total(tensors: list[Streamed]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def test_the_released_size_to_the_byte():
    size = checkpoint.sizes()
    assert total(checkpoint.transformer_tensors(size.transformer, "BF16", 0)) == 8_208_450_304
    assert total(checkpoint.transformer_tensors(size.transformer, "F32", 0)) == 16_416_900_608
    assert total(checkpoint.encoder_tensors(size.encoder, 0)) == 13_761_264_768


@pytest.mark.parametrize("scale", [16, 1024])
def test_a_scale_divides_the_weights(scale):
    size, released = checkpoint.sizes(scale), checkpoint.sizes()
    share = transformer_parameters(size.transformer)[0] / transformer_parameters(released.transformer)[0]
    assert 0.7 < share * scale < 1.4
    encoders = [total(checkpoint.encoder_tensors(s.encoder, 0)) for s in (size, released)]
    assert 0.7 < encoders[0] / encoders[1] * scale < 2.5
    with pytest.raises(ValueError, match="scale must be 1 to 4096, got 0"):
        checkpoint.sizes(0)


def test_it_is_drawn_with_and_every_stage_is_measured(folder, tmp_path, capsys):
    out = tmp_path / "full_size.json"
    arguments = ["full_size", "run", str(folder), "--size", "96x64", "--steps", "2", "--out", str(out)]
    assert command.main(arguments) == 0
    made = json.loads(out.read_text())
    rows = {case.rsplit("/", 1)[1]: row for (case, _), row in parse(out, made).rows.items()}
    parts = {"load_transformer", "load_vae", "load_text_encoder"}
    assert rows.keys() == parts | {"table", "prompt", "prompt_again", "denoise", "step", "decode"}
    assert all(row.more["read"]["files"] > 0 for name, row in rows.items() if name in parts)
    assert all(row.more["memory"]["peak"] > 1 << 20 for name, row in rows.items() if name != "step")
    full = made["bench"]["full_size"]
    assert (full["layers"], full["width"], full["text_encoder"]) == (3, 128, True)
    assert full["errors"]["decode"] <= 1.1 * full["errors"]["decode by diffusers"]
    assert max(error for name, error in full["errors"].items() if name.startswith("block")) < full_size.BLOCK_BOUND
    layers = {name: error for name, error in full["errors"].items() if re.fullmatch(r"layer \d+", name)}
    assert layers.keys() == {"layer 0", "layer 1", "layer 3"}
    for name, error in layers.items():
        assert error <= 1.2 * full["errors"][f"{name} by transformers"]
    assert "relative error" in capsys.readouterr().out
    assert "load_transformer" in table(parse(out, made))


def test_it_is_drawn_with_by_the_parts_of_others_as_well(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "parts.json"
    arguments = ["full_size", "compare", str(folder), "--size", "96x64", "--rounds", "2", "--out", str(out)]
    assert command.main(arguments) == 0
    made = json.loads(out.read_text())
    rows = parse(out, made).rows
    assert {(case.rsplit("/", 1)[1], subject) for case, subject in rows} == {
        (stage, subject) for stage in ("prompt", "denoise", "decode") for subject in ("ours", "parts")
    }
    full = made["bench"]["full_size"]
    bounds = {"prompt": 5e-2, "denoise": 5e-2, "decode": 5e-2}  # bfloat16 against bfloat16
    assert all(full["apart"][stage] <= bound for stage, bound in bounds.items()), full["apart"]
    foreseen = parts.expanded_bytes(folder / "text_encoder", 4)  # but for buffers and the last norm
    assert full["encoder_bytes"]["parts"] == pytest.approx(foreseen, rel=1e-3)
    assert "whole" in capsys.readouterr().out
    monkeypatch.setattr(parts, "available_bytes", lambda: 1000)
    assert command.main(arguments) == 1
    assert "with its experts in bfloat16, 0.0 GB are free" in capsys.readouterr().err


def test_the_command_draws_with_it(folder, tmp_path, monkeypatch):
    """As a large model is drawn on a CPU: bfloat16, modulation in the files, within a limit of memory; the same image."""
    monkeypatch.setattr(pipeline, "LARGE", 1000)
    image = tmp_path / "image.png"
    arguments = ["generate", "a red apple", "--model", folder, "--variant", "turbo", "--size", "96x64", "--seed", 1]
    result = CliRunner().invoke(cli.app, [*map(str, arguments), "--memory", "8", "-o", str(image)])
    assert result.exit_code == 0, result.stderr
    assert "modulation host" in result.stderr
    plain = LensPipeline.from_pretrained(folder, dtype=torch.bfloat16, residency="resident")
    expected = plain("a red apple", height=64, width=96, seed=1).images[0]
    assert read_recipe(image).dtype == "bfloat16"
    assert np.array_equal(np.asarray(Image.open(image)), np.asarray(expected))


def test_a_wrong_layer_is_told(folder, monkeypatch, tmp_path):
    """The comparison with transformers sees scales that are misread."""
    model = load_gpt_oss(folder / "text_encoder", torch.bfloat16, "cpu")
    ids = torch.randint(0, 4096, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    right, theirs = full_size.layer_errors(folder / "text_encoder", model, ids, 1)
    assert right <= 1.2 * theirs
    model.layers[1].mlp.experts.down_proj_scales[:, ::9] += 1
    wrong, _ = full_size.layer_errors(folder / "text_encoder", model, ids, 1)
    assert wrong > 4 * theirs


def test_random_features_stand_in_for_the_text_encoder(folder, tmp_path):
    options = SimpleNamespace(
        folder=folder,
        size=(32, 32),
        dtype="fp32",
        variant="lens",
        steps=1,
        text=7,
        keep_cache=True,
        threads=None,
        residency="trimmed",
    )
    made = full_size.measure(options)["bench"]["full_size"]
    assert (made["text_tokens"], made["text_encoder"]) == (7, False)
    assert max(made["errors"].values()) < 1e-4


def test_a_broken_block_is_told(folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(full_size, "block_error", lambda *_: 0.5)
    arguments = ["full_size", "run", str(folder), "--size", "32x32", "--steps", "1", "--text", "3"]
    assert command.main([*arguments, "--out", str(tmp_path / "a.json")]) == 1
    assert "block 0, block 1, block 2 must be within 0.02" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ writing


def small(folder, *, kinds=("F32", "BF16", "U8"), stop_at: int | None = None):
    """Seven tensors in shards of 64 bytes, the pieces of one failing."""

    def pieces(k: int, dtype: str):
        def draw():
            for part in range(2):
                if k == stop_at:
                    raise KeyboardInterrupt
                yield torch.full((4,), 10 * k + part).to(
                    {"F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8}[dtype]
                )

        return draw

    tensors = [Streamed(f"t{k}", kinds[k % len(kinds)], [2, 4], pieces(k, kinds[k % len(kinds)])) for k in range(7)]
    told: list[tuple[str, bool]] = []
    stream_tensors(folder, "model", tensors, 64, lambda path, kept: told.append((path.name, kept)))
    return told


def test_tensors_are_streamed_and_read_again(tmp_path):
    told = small(tmp_path)
    assert [kept for _, kept in told] == [False] * len(told)
    assert len(told) > 2
    shards = open_shards(tmp_path)
    assert sorted(shards) == [f"t{k}" for k in range(7)]
    for key, shard in shards.items():
        found = []
        shard.read(key, lambda value, found=found: found.append(value.float()))
        k = int(key[1:])
        assert found[0].tolist() == [[10 * k] * 4, [10 * k + 1] * 4]


def test_a_stopped_writer_goes_on_where_it_was(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path, stop_at=4)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["model-00001-of-00003.safetensors"]  # no index, no half of a shard
    told = small(tmp_path)
    assert [kept for _, kept in told] == [True, False, False]
    whole = tmp_path / told[1][0]
    whole.write_bytes(whole.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        open_shards(tmp_path)
    assert [kept for _, kept in small(tmp_path)] == [True, False, True]
    assert len(open_shards(tmp_path)) == 7


def test_pieces_must_fill_their_tensor(tmp_path):
    few = Streamed("few", "F32", [3], lambda: [torch.zeros(2)])
    with pytest.raises(ValueError, match="few must have 12 bytes, got 8"):
        stream_tensors(tmp_path, "model", [few], 64, lambda *_: None)
    other = Streamed("other", "F32", [2], lambda: [torch.zeros(2).double()])
    with pytest.raises(ValueError, match=r"other must be made of torch\.float32, got torch\.float64"):
        stream_tensors(tmp_path, "model", [other], 64, lambda *_: None)
    assert list(tmp_path.iterdir()) == []


def test_the_same_seed_writes_the_same_bytes(folder, tmp_path):
    checkpoint.make(tmp_path / "again", SCALE, "BF16", 0, text_encoder=False, say=lambda _: None)
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    weights = [p.float() for p in load_transformer(folder / "transformer", torch.bfloat16, "cpu").parameters()]
    assert all(p.std() > 0 for p in weights if p.numel() > 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder, patch: None, "another checkpoint is there (seed 0)"),
        (lambda folder, patch: (folder / "full_size.json").unlink(), "must be empty or begun by this command"),
    ],
)
def test_another_checkpoints_folder_is_left_alone(tmp_path, monkeypatch, capsys, change, message):
    made = tmp_path / "made"
    checkpoint.make(made, SCALE, "BF16", 0, text_encoder=False, say=lambda _: None)
    change(made, monkeypatch)
    assert command.main(["full_size", "make", str(made), "--scale", str(SCALE), "--seed", "1"]) == 1
    assert message in capsys.readouterr().err


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=20_000_000_000))
    assert command.main(["full_size", "make", str(tmp_path / "made"), "--dtype", "fp32"]) == 1
    assert "30.2 GB are still to be written and 1.1 GB to be left free, the disk has 20.0 GB" in capsys.readouterr().err
    assert list((tmp_path / "made").iterdir()) == []


@pytest.mark.parametrize("size", ["512", "100x64", "0x16", "x"])
def test_a_size_is_two_multiples_of_sixteen(size, capsys):
    with pytest.raises(SystemExit):
        command.main(["full_size", "run", "nowhere", "--size", size])
    assert "must be WIDTHxHEIGHT in multiples of 16" in capsys.readouterr().err


@pytest.mark.nightly
def test_a_sixteenth_of_the_released_size(tmp_path):
    """The same code on a checkpoint of 1.4 GB: several seconds of drawing, within 12 % of the memory that is predicted."""
    made = tmp_path / "made"
    assert command.main(["full_size", "make", str(made), "--scale", "16"]) == 0
    for policy in ("trimmed", "balanced"):
        out = tmp_path / f"{policy}.json"
        arguments = ["full_size", "run", str(made), "--size", "256x256", "--residency", policy, "--out", str(out)]
        # a process of its own: what others left in this one is not the command's
        subprocess.run([sys.executable, "-m", "bench", *arguments], cwd=ROOT, check=True)
        result = json.loads(out.read_text())
        full = result["bench"]["full_size"]
        errors, predicted = full["errors"], full["memory"]["predicted"]
        assert max(error for name, error in errors.items() if name.startswith("block")) < full_size.BLOCK_BOUND
        assert all(errors[f"layer {n}"] <= 1.2 * errors[f"layer {n} by transformers"] for n in (0, 1, 5))
        peaks = {b["name"].rsplit("/", 1)[1]: b["extra_info"]["memory"] for b in result["benchmarks"]}
        for stage in ("prompt", "denoise", "decode"):
            assert peaks[stage]["peak"] == pytest.approx(predicted[stage], rel=0.12), (policy, stage)
