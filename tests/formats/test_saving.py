"""A killed or failed save leaves the old file; the fingerprint tells weights apart and nothing else."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from lens import LensConfig, LensTransformer2DModel
from lens.engine.schedule_table import evict
from lens.formats import files
from lens.formats.files import CheckpointError, write_atomic, write_json
from lens.formats.fingerprint import fingerprint
from lens.formats.released import load_transformer, save_transformer
from lens.formats.safetensors import open_shards, save_tensors, stored_as
from tests.small_pipeline import FOLDER, fresh, shared

SMALL = LensConfig(num_layers=1, num_attention_heads=1, enc_hidden_dim=32, selected_layer_index=(0,))


def test_write_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_failed_write_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "weights.safetensors"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half of the ne")
        raise error

    with pytest.raises(type(error)):
        write_atomic(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_device_or_pipe_is_refused_and_stays(tmp_path):
    pipe = tmp_path / "null"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="not a regular file"):
        write_atomic(pipe, lambda p: p.write_text("new") and None)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_modes_follow_the_umask_and_a_replaced_file_keeps_its_own(tmp_path, umask):
    before = os.umask(umask)
    try:
        for name, kept in (("new", None), ("private", 0o600), ("shared", 0o664)):
            path, seen = tmp_path / name, []
            if kept is not None:
                path.write_text("old")
                path.chmod(kept)

            def write(temporary, seen=seen):
                temporary.write_text("new")
                seen.append(temporary.stat().st_mode & 0o777)

            expected = 0o666 & ~umask if kept is None else kept
            write_atomic(path, write)
            assert [path.stat().st_mode & 0o777, *seen] == [expected, expected]

            def put_another(temporary):  # as safetensors does
                temporary.unlink()
                os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))

            if kept is None:
                path.unlink()
            write_atomic(path, put_another)
            assert path.stat().st_mode & 0o777 == expected
    finally:
        os.umask(before)


def test_what_killed_writers_left_is_swept(tmp_path):
    names = ("killed", "fresh", "locked")
    for name in names:
        left = tmp_path / f".{name}.part"
        left.write_text("half")
        if name != "fresh":
            os.utime(left, (1, 1))
    with open(tmp_path / ".locked.part") as writer:  # another writer, who is slow
        fcntl.flock(writer, fcntl.LOCK_EX)
        write_atomic(tmp_path / "a", lambda temporary: temporary.write_text("new") and None)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".fresh.part", ".locked.part", "a"]


def test_full_disk_while_flushing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, lambda p: p.write_text("new") and None)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_file_size_limit_stands_for_a_full_disk(tmp_path):
    """The library's own write fails half way, in a process that may write no more than 64 KB to a file."""
    folder = tmp_path / "transformer"
    model = LensTransformer2DModel(SMALL)
    save_transformer(model, folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    child = f"""
import resource, signal, sys
from pathlib import Path
import torch
from lens import LensConfig, LensTransformer2DModel
from lens.formats import released
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
released.save_transformer(LensTransformer2DModel({SMALL!r}), Path(sys.argv[1]))
"""
    done = subprocess.run([sys.executable, "-c", child, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "File too large" in done.stderr
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_killed_while_saving(tmp_path):
    """SIGKILL leaves at most a hidden .part file, which nothing reads; the old weights still load."""
    folder = tmp_path / "transformer"
    model = LensTransformer2DModel(SMALL)
    save_transformer(model, folder, torch.float32)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    child = """
import sys, time
from pathlib import Path
from lens.formats.files import write_atomic
def write(temporary):
    with open(temporary, "wb") as file:
        file.write(b"x" * 1000)
        file.flush()
        print("half", flush=True)
        time.sleep(60)
write_atomic(Path(sys.argv[1]), write)
"""
    path = folder / "diffusion_pytorch_model.safetensors"
    process = subprocess.Popen([sys.executable, "-c", child, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = [p.name for p in folder.iterdir() if p.name not in before]
    assert len(left) == 1
    assert left[0].startswith(".")
    assert left[0].endswith(".part")
    assert {name: (folder / name).read_bytes() for name in before} == before
    again = load_transformer(folder, torch.float32, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_shards_hold_at_most_what_was_asked(tmp_path):
    tensors = {f"t{k}": torch.full((100,), float(k)) for k in range(7)} | {"large": torch.zeros(1000)}
    save_tensors(tmp_path, "model", tensors, shard_bytes=1200)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert sorted(index) == sorted(tensors)
    for name in set(index.values()):
        shard = load_file(tmp_path / name)
        assert len(shard) == 1 or sum(4 * t.numel() for t in shard.values()) <= 1200
        assert all(torch.equal(t, tensors[k]) for k, t in shard.items())
    assert {p.name for p in tmp_path.iterdir()} == {*index.values(), "model.safetensors.index.json"}


def test_saving_after_eviction(tmp_path):
    model = LensTransformer2DModel(SMALL)
    evict(model, "meta")
    with pytest.raises(
        ValueError, match=r"blocks\.0\.image\.modulation\.weight was dropped by lens.engine.schedule_table.evict"
    ):
        save_transformer(model, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


# ---------------------------------------------------------------------------------------------- fingerprint


VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tmp_path):
    root = tmp_path / "another name"
    shutil.copytree(FOLDER, root)
    return root


def test_fingerprint_is_of_the_tensors_that_are_loaded(copy):
    """Names, times, settings, shards, prefixes, variants and whatever else lies beside the weights do not count."""
    first = shared().fingerprint
    assert len(first) == 64
    os.utime(copy / VAE, (1, 1))
    (copy / "README.md").write_text("notes")
    shutil.copy(copy / VAE, copy / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    tensors = load_file(copy / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file(tensors, copy / "transformer" / "diffusion_pytorch_model_ema.safetensors")
    (copy / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    prefixed = {f"model.diffusion_model.{key}": value for key, value in tensors.items()}
    save_tensors(copy / "transformer", "diffusion_pytorch_model", prefixed, 500_000)
    encoder = load_file(copy / "text_encoder" / "model.safetensors")
    save_file({k: v for k, v in encoder.items() if k != "lm_head.weight"}, copy / "text_encoder" / "model.safetensors")
    assert fresh(copy).fingerprint == first


def test_fingerprint_of_known_bytes(tmp_path):
    """The recipe, once by hand: pictures carry it, so it may never change."""
    import hashlib

    large = torch.arange(600_000, dtype=torch.float32)  # more than two MiB
    save_tensors(tmp_path, "model", {"k": large, "a": torch.zeros(2, 3, dtype=torch.bfloat16)})
    data = large.numpy().tobytes()
    digest = hashlib.sha256(b"vae/a\0[2, 3]\0BF16\0" + bytes(12))
    digest.update(b"vae/k\0[600000]\0F32\0" + data[: 1 << 20] + data[-(1 << 20) :])
    assert fingerprint({"vae": stored_as(open_shards(tmp_path))}) == digest.hexdigest()


@pytest.mark.parametrize("change", ["value", "name", "shape", "dtype", "part"])
def test_fingerprint_sees_other_weights(tmp_path, change):
    def of(tensors, part="vae"):
        save_file(tensors, tmp_path / "model.safetensors")
        return fingerprint({part: stored_as(open_shards(tmp_path))})

    old = torch.arange(6, dtype=torch.int32).float()
    new = {
        "value": {"k": old + 1}, "name": {"l": old}, "shape": {"k": old.view(2, 3)}, "dtype": {"k": old.view(torch.int32)},
        "part": {"k": old},
    }[change]  # fmt: skip
    assert of(new, "transformer" if change == "part" else "vae") != of({"k": old})


def _save(folder, value, shard_bytes):
    save_tensors(folder, "model", {f"t{k}": torch.full((100,), value + k) for k in range(4)}, shard_bytes)


def _load(folder):
    found = {}
    for key, shard in open_shards(folder).items():
        shard.read(key, lambda value, key=key: found.update({key: value.clone()}))
    return {key: float(found[key][0]) for key in sorted(found)}


OLD, NEW = ({f"t{k}": float(v + k) for k in range(4)} for v in (0, 100))


@pytest.mark.parametrize("before", [400, 800, 10_000])
@pytest.mark.parametrize("after", [400, 800, 10_000])
def test_a_save_over_another_is_all_old_or_all_new(tmp_path, monkeypatch, before, after):
    """Whatever step of the save fails, the folder loads as one of the two models, never as a mix."""
    whole = tmp_path / "whole"
    _save(whole, 0.0, before)
    _save(whole, 100.0, after)
    assert _load(whole) == NEW
    assert len(list(whole.iterdir())) == {400: 5, 800: 3, 10_000: 1}[after]
    seen = set()
    for step in range(12):
        folder = tmp_path / str(step)
        _save(folder, 0.0, before)
        calls = iter(range(100))

        def fail_at(original, calls=calls, step=step):
            def call(*arguments, **named):
                if next(calls) == step:
                    raise KeyboardInterrupt
                return original(*arguments, **named)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fail_at(os.replace))
            patch.setattr(type(folder), "unlink", fail_at(type(folder).unlink))
            with contextlib.suppress(KeyboardInterrupt):
                _save(folder, 100.0, after)
        assert _load(folder) in (OLD, NEW)
        seen.add(_load(folder) == NEW)
    assert seen == {True, False}


def test_shards_without_their_index_are_refused(tmp_path):
    _save(tmp_path, 0.0, 400)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="a shard without its index"):
        open_shards(tmp_path)


def test_failed_writes_name_the_file_and_long_names_fit(tmp_path):
    longest = tmp_path / ("x" * 250 + ".png")
    files.write_atomic(longest, lambda temporary: temporary.write_bytes(b"1"))
    assert longest.read_bytes() == b"1"

    def full(temporary):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as error:
        files.write_atomic(tmp_path / "a.png", full)
    assert error.value.filename == str(tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == [longest]


def test_a_picture_too_large_to_open_is_refused(tmp_path, monkeypatch):
    from PIL import Image

    from lens import image_file

    Image.new("RGB", (64, 64)).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(image_file.RecipeError, match="not a readable PNG"):
        image_file.read_recipe(tmp_path / "big.png")
