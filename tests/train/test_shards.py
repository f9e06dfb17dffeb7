"""Shards: what goes where, the tars and their index, resuming, full disks, what is left out and said to be."""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lens.resolution import MINI_BASES
from train import configs
from train.__main__ import main
from train.data import images
from train.data.buckets import ASPECTS, Bucket
from train.data.shards import LATENTS, ShardSet, array_bytes, array_of, digest_of, write_shard
from train.data.sources import Picture, assign, captions_of, fraction, key_of
from train.loop.clock import Interrupted
from train.pretrain_on_shards import bucket_sizes
from train.shards import completed

ROOT = Path(__file__).resolve().parents[2]


def gradient(height, width, mode="RGB"):
    """Red grows to the right, green downwards: where a pixel came from can be read off it."""
    y, x = np.mgrid[:height, :width]
    rows = np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), np.full_like(x, 90)], -1)
    return Image.fromarray(rows.astype(np.uint8)).convert(mode)


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture
def photos(tmp_path):
    """Ten pictures of several shapes, one torn, one without a caption, one too small, one that is no picture."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for i, (h, w) in enumerate(
        [(96, 96), (100, 100), (130, 128), (70, 140), (64, 128), (200, 100), (80, 64), (66, 64)]
    ):
        path = folder / ("sub" if i % 2 else "") / f"picture.{i}.png"
        gradient(h, w).save(path)
        path.with_suffix(".txt").write_text(f" picture number {i} \n", encoding="utf-8")
    gradient(300, 200).save(folder / "photo.jpg", quality=95)
    (folder / "photo.json").write_text('{"caption": "Fünf Äpfel"}', encoding="utf-8")
    gradient(90, 90).save(folder / "mute.png")
    gradient(40, 40).save(folder / "small.png")
    (folder / "small.txt").write_text("small")
    whole = encoded(gradient(90, 90))
    (folder / "torn.png").write_bytes(whole[: len(whole) // 2])
    (folder / "torn.txt").write_text("torn")
    (folder / "none.jpg").write_bytes(b"no picture at all")
    (folder / "none.txt").write_text("none")
    return folder


def build(*arguments):
    return main(["shards", *map(str, arguments)])


def everything(folder):
    """Every file below a folder -> its bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def members(shards):
    """(bucket, member) of all samples in stored order."""
    return [(b, shards.member(b, i)) for b, n in shards.sizes.items() for i in range(n)]


def test_a_folder_becomes_shards_of_one_bucket_each(photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert build("--images", photos, "--out", out, "--bases", 64, 96, 128, "--samples", 2) == 0
    shards = ShardSet(out)
    placed = {}
    for bucket, member in members(shards):
        source = json.loads(member.read("json"))["source"]
        data = member.read(member.picture)
        assert data == (photos / source).read_bytes()  # as it was encoded
        placed.setdefault(source, []).append(bucket.name)
        assert member.picture == source.rpartition(".")[2]
        height, width = images.oriented_size(photos / source)
        assert bucket in assign(height, width, (64, 96, 128), ASPECTS, False)
    assert placed["picture.0.png"] == ["64_1x1", "96_1x1"]
    assert placed["picture.2.png"] == ["64_1x1", "96_1x1", "128_1x1"]
    assert placed["sub/picture.5.png"] == ["64_1x2", "96_1x2", "128_1x2"]  # 200 high, 100 wide
    assert placed["sub/picture.3.png"] == ["64_2x1", "96_2x1"]
    assert placed["picture.4.png"] == ["64_2x1", "96_2x1"]  # 64x128, the very size at 96
    assert "small.png" not in placed
    assert placed["picture.6.png"] == ["64_3x4"]  # 80x64 covers its 80x48, though that has less than 64 x 64 pixels
    captions = {json.loads(m.read("json"))["source"]: m.read("txt").decode() for _, m in members(shards)}
    assert captions["photo.jpg"] == "Fünf Äpfel"
    assert captions["picture.0.png"] == "picture number 0"  # without the space around it
    assert shards.manifest["left_out"] == {"no caption": 1, "too small": 1, "unusable": 2}
    left = [json.loads(line) for line in (out / "left_out.jsonl").read_text().splitlines()]
    assert {entry["source"] for entry in left} == {"mute.png", "small.png", "torn.png", "none.jpg"}
    for tar in out.rglob("*.tar"):
        with tarfile.open(tar) as file:
            names = file.getnames()
        assert len({name.partition(".")[0] for name in names}) <= 2
        assert len(names) == 3 * len({name.partition(".")[0] for name in names})
    total = shards.manifest["samples"]
    said = f"samples written, {total} in all; left out: 1 no caption, 1 too small, 2 unusable\n"
    printed = capsys.readouterr().out
    assert printed.endswith(f"{total} {said}")
    assert printed.startswith("1 pictures serve no bucket: they are too small for every size, without enlarging\n")


def test_shards_of_other_sizes_are_refused_with_the_command_that_rewrites_them(photos, tmp_path):
    out, made = tmp_path / "out", ["--images", photos, "--bases", 64, 96, "--aspects", "1:1", "3:4"]
    build(*made, "--out", out)
    path = out / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["sizes"] == {"64_1x1": [64, 64], "64_3x4": [80, 48], "96_1x1": [96, 96], "96_3x4": [112, 80]}
    manifest["sizes"]["64_3x4"] = [80, 64]
    path.write_text(json.dumps(manifest))
    again = f"python -m train shards {' '.join(map(str, made))} --out NEW"
    with pytest.raises(ValueError, match=r"manifest\.json: shards of other sizes") as refused:
        ShardSet(out)
    assert str(refused.value).endswith(f": 64_3x4 is 80x64, expected 80x48; `{again}` writes them anew")
    # those of before sizes were recorded have the formula's
    del manifest["sizes"], manifest["command"]
    path.write_text(json.dumps(manifest))
    assert len(ShardSet(out).sizes) == 4
    manifest["buckets"] = {"512_1x1": [], "512_16x9": [], "768_2x3": [], "1024_16x9": []}
    path.write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError,
        match="512_16x9 is 384x688, expected 384x672; 768_2x3 is 944x624, expected 960x640; `python -m train shards --tars ",
    ):
        ShardSet(out)


def test_a_training_maps_the_manifests_table_and_reads_the_manifest_where_that_is_not_its_own(
    photos, tmp_path, monkeypatch
):
    from train.data import shards

    out = tmp_path / "out"
    build("--images", photos, "--bases", 64, 96, "--samples", 2, "--out", out)
    whole = shards.table_of(shards.read_manifest(out))
    with monkeypatch.context() as patched:
        patched.setattr(shards, "read_manifest", lambda _folder: pytest.fail("the manifest was read"))
        found = ShardSet(out)
        assert (found.fingerprint, found.sizes) == (whole[0]["fingerprint"], {b: found.sizes[b] for b in found.sizes})
        assert all(isinstance(rows.base, np.memmap) or isinstance(rows, np.memmap) for rows in found._shards.values())
        keys = [member.key for _, member in members(found)]
    for stale in ("manifest.head.json", "manifest.table.npy"):
        kept = (out / stale).read_bytes()
        (out / stale).unlink()
        assert [member.key for _, member in members(ShardSet(out))] == keys
        (out / stale).write_bytes(kept)
    # a process is told by another of its node, a worker by its training: neither reads a manifest again
    shards._checked.clear()
    with monkeypatch.context() as patched:
        read, told = [], set()
        patched.setattr(shards, "digest_of", lambda path: read.append(path.name) or digest_of(path))
        first = SimpleNamespace(once_per_node=lambda make: told.update(make()) or told)
        shards.check_once_per_node([out, tmp_path / "gone"], first)
        assert read == ["manifest.json", "manifest.table.npy"]
        ShardSet(out)
        sent = pickle.dumps(shards.ShardSets([out]))
        shards._checked.clear()
        shards.check_once_per_node([out], SimpleNamespace(once_per_node=lambda _make: told))
        ShardSet(out)
        shards._checked.clear()
        assert [member.key for _, member in members(pickle.loads(sent))] == keys
        assert len(read) == 2
        os.utime(out / "manifest.json")  # as another file would be
        ShardSet(out)
        assert len(read) == 4
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["buckets"]["96_1x1"]  # another manifest than the table is of
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert Bucket(96, "1:1") not in ShardSet(out).sizes


def test_webdataset_tars_are_taken_as_they_are(photos, tmp_path, capsys):
    """Our own shards of two bases hold a picture twice: written anew they are those of the folder, picture by picture."""
    build("--images", photos, "--bases", 64, 96, "--samples", 2, "--out", tmp_path / "a")
    build("--tars", tmp_path / "a", "--bases", 64, 96, "--out", tmp_path / "b", "--workers", 2)
    one, two = (
        sorted((b.name, m.key, m.read("txt"), m.read(m.picture)) for b, m in members(ShardSet(tmp_path / name)))
        for name in "ab"
    )
    assert one == two
    assert " twice" in capsys.readouterr().out
    with tarfile.open(tmp_path / "a" / "other.tar", "w") as tar:
        for name, data in (
            ("x/1.JPG", encoded(gradient(70, 70), "JPEG")),
            ("x/1.json", b'{"caption": "a slope"}'),
            ("x/2.png", b"?"),
        ):
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    build("--tars", tmp_path / "a", "--bases", 64, "--out", tmp_path / "c")
    found = {m.key: m.read("txt") for _, m in members(ShardSet(tmp_path / "c"))}
    assert found["x/1"] == b"a slope"
    assert "other.tar/x/2.png" in (tmp_path / "c" / "left_out.jsonl").read_text()


def test_pictures_may_grow_where_that_is_asked_for(photos, tmp_path, capsys):
    out = tmp_path / "out"
    build("--images", photos, "--bases", 64, "--aspects", "1:1", "--max-upscale", 1.6, "--out", out)
    assert "serve no bucket" not in capsys.readouterr().out
    shards = ShardSet(out)
    found = {member.key: member for _, member in members(shards)}
    assert images.fitted(found["small"].read("png"), (64, 64), shards.max_upscale).shape == (64, 64, 3)
    recipe = configs.load("mini/on_shards", "")
    with pytest.raises(ValueError, match=r"enlarges pictures up to 1\.6, MAX_UPSCALE is 1; .* --set MAX_UPSCALE=1\.6"):
        bucket_sizes(recipe, shards)
    assert bucket_sizes(configs.override(recipe, ["MAX_UPSCALE=1.6"]), shards) == {Bucket(64, "1:1"): 10}


def test_any_webdataset_reader_streams_them(photos, tmp_path):
    import webdataset

    out = tmp_path / "out"
    build("--images", photos, "--out", out, "--bases", 64, "--samples", 3)
    shards, seen = ShardSet(out), []
    for bucket in shards.sizes:
        tars = sorted(map(str, (out / bucket.name).glob("*.tar")))
        for sample in webdataset.WebDataset(tars, shardshuffle=False):
            seen.append((bucket, sample["__key__"], sample["txt"]))
    assert seen == [(b, m.key, m.read("txt")) for b, m in members(shards)]


def test_the_largest_base_alone(photos, tmp_path):
    build("--images", photos, "--out", tmp_path / "out", "--bases", 64, 96, 128, "--assign", "largest")
    keys = [m.key for _, m in members(ShardSet(tmp_path / "out"))]
    assert len(keys) == len(set(keys)) == 9
    assert assign(130, 128, (64, 96, 128), ASPECTS, True) == [Bucket(128, "1:1")]


def test_captions_from_one_file(photos, tmp_path):
    lines = [{"file": "mute.png", "caption": "a gradient"}, {"file": "sub/picture.1.png", "caption": "other words"}]
    captions = tmp_path / "captions.jsonl"
    captions.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    build("--images", photos, "--captions", captions, "--out", tmp_path / "out", "--bases", 64)
    got = {json.loads(m.read("json"))["source"]: m.read("txt").decode() for _, m in members(ShardSet(tmp_path / "out"))}
    assert got == {line["file"]: line["caption"] for line in lines}
    captions.write_bytes(json.dumps({"file": "mute.png", "caption": "größer"}, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(ValueError, match=r"captions.jsonl, line 1: not valid JSON: .utf-8. codec"):
        build("--images", photos, "--captions", captions, "--out", tmp_path / "other", "--bases", 64)
    captions.write_text('{"file": "a.png"}\n')
    with pytest.raises(ValueError, match=r"captions.jsonl, line 1: expected"):
        build("--images", photos, "--captions", captions, "--out", tmp_path / "other", "--bases", 64)


def test_captions_from_parquet(tmp_path, monkeypatch):
    path = tmp_path / "captions.parquet"
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(
            ValueError, match=r"--captions .*captions\.parquet: Parquet needs pyarrow: pip install pyarrow"
        ):
            captions_of(path)
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(
        pyarrow.table({"file": ["a/b.png", "c.jpg"], "caption": ["größer", "x"], "other": [1, 2]}), path
    )
    assert captions_of(path) == {"a/b.png": "größer", "c.jpg": "x"}
    parquet.write_table(pyarrow.table({"file": ["a.png"], "text": ["x"]}), path)
    with pytest.raises(ValueError, match="no column 'caption'; it has file, text"):
        captions_of(path)


def test_marks_and_other_encodings_of_captions(photos, tmp_path):
    (photos / "mute.txt").write_bytes(b"\xef\xbb\xbfwith a mark")
    (photos / "photo.json").write_bytes('{"caption": "Fünf"}'.encode("latin-1"))
    build("--images", photos, "--out", tmp_path / "out", "--bases", 64)
    got = {json.loads(m.read("json"))["source"]: m.read("txt").decode() for _, m in members(ShardSet(tmp_path / "out"))}
    assert got["mute.png"] == "with a mark"
    assert "photo.jpg" not in got
    left = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    assert any(row["source"] == "photo.jpg" and "no caption: photo.json" in row["reason"] for row in left)
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text(manifest.read_text()[:100])
    with pytest.raises(ValueError, match=r"manifest.json: not a manifest of shards: "):
        ShardSet(tmp_path / "out")


def test_the_same_sources_give_the_same_bytes_whatever_the_workers(photos, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(photos, copy)  # other times, another path
    for name, folder, workers in (("a", photos, 0), ("b", copy, 2)):
        build("--images", folder, "--out", tmp_path / name, "--bases", 64, 96, "--samples", 2, "--workers", workers)
    a, b = ({k: v for k, v in everything(tmp_path / name).items() if k.endswith(".tar")} for name in ("a", "b"))
    assert len(a) > 5
    assert a == b
    assert ShardSet(tmp_path / "a").fingerprint == ShardSet(tmp_path / "b").fingerprint


def test_an_interrupted_build_goes_on_and_ends_alike(photos, tmp_path, capsys):
    arguments = ("--images", photos, "--bases", 64, 96, "--samples", 2)
    build(*arguments, "--out", tmp_path / "whole")
    build(*arguments, "--out", tmp_path / "cut")
    tars = sorted((tmp_path / "cut").rglob("*.tar"))
    (tmp_path / "cut" / "manifest.json").unlink()
    tars[0].with_suffix(".json").unlink()  # killed between a tar and its index
    tars[1].unlink()
    kept = {p: p.stat().st_mtime_ns for p in tars[2:]}
    capsys.readouterr()
    with pytest.raises(FileNotFoundError, match="no finished shards"):
        ShardSet(tmp_path / "cut")
    build(*arguments, "--out", tmp_path / "cut")
    assert f"{len(tars)} shards, 2 to write" in capsys.readouterr().out
    assert everything(tmp_path / "cut") == everything(tmp_path / "whole")
    assert {p: p.stat().st_mtime_ns for p in tars[2:]} == kept


def test_shards_of_something_else_are_not_mixed_in(photos, tmp_path):
    build("--images", photos, "--out", tmp_path / "out", "--bases", 64)
    (photos / "picture.0.txt").write_text("other words")
    with pytest.raises(ValueError, match="was made from other sources or settings"):
        build("--images", photos, "--out", tmp_path / "out", "--bases", 64)


def test_a_full_disk_is_said_and_the_same_command_goes_on(photos, tmp_path):
    """A real limit of the system: no file may grow beyond 12 KB."""
    command = [sys.executable, "-m", "train", "shards", "--images", photos, "--out", tmp_path / "out", "--bases", "64"]

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_288, 12_288))

    done = subprocess.run(command, cwd=ROOT, preexec_fn=limited, capture_output=True, text=True)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert ".tar" in done.stderr
    assert "goes on from there" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not list((tmp_path / "out").rglob("*.part"))
    written = list((tmp_path / "out").rglob("*.tar"))
    assert written  # those that fitted
    for name in ("out", "other"):
        build("--images", photos, "--out", tmp_path / name, "--bases", 64)
    assert everything(tmp_path / "out") == everything(tmp_path / "other")


@dataclasses.dataclass(frozen=True)
class Deadly:
    """A shard whose building kills its process."""

    path: Path

    def build(self):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_said_with_its_shard():
    with pytest.raises(
        Interrupted, match=r"^64_1x1/000000.tar: a worker died; what is finished is kept, the same command"
    ):
        list(completed([Deadly(Path("64_1x1/000000.tar"))], 1))


def test_nothing_usable_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    gradient(64, 64).save(tmp_path / "empty" / "a.png")
    said = "no usable picture with a caption for --split train; left out:"
    with pytest.raises(ValueError, match=f"{said} 1 no caption$"):
        build("--images", tmp_path / "empty", "--out", tmp_path / "out", "--bases", 64)
    (tmp_path / "empty" / "a.png").unlink()
    with pytest.raises(ValueError, match=f"{said} nothing$"):
        build("--images", tmp_path / "empty", "--out", tmp_path / "out", "--bases", 64)


def test_shards_that_a_later_build_forgets_are_named(photos, tmp_path, capsys):
    def said(*bases):
        build("--images", photos, "--out", tmp_path / "out", "--aspects", "1:1", "2:1", "--bases", *bases)
        return capsys.readouterr().out.splitlines()

    said(64, 96)
    *lines, last = said(64)
    (forgotten,) = [line for line in lines if "no longer" in line]
    assert forgotten.startswith("in the manifest before and no longer, files kept: 96_1x1 (1), 96_2x1 (1); expected ")
    assert last.startswith("0 samples written, ")
    assert (tmp_path / "out" / "96_1x1" / "000000.tar").is_file()
    assert not any("no longer" in line for line in said(64, 96))
    assert Bucket(96, "1:1") in ShardSet(tmp_path / "out").sizes


def test_held_out_keys_are_never_trained_on(photos, tmp_path):
    for split in ("train", "held_out"):
        build("--images", photos, "--out", tmp_path / split, "--bases", 64, "--held-out", 0.4, "--split", split)
    build("--images", photos, "--out", tmp_path / "all", "--bases", 64)
    train, held, every = ({m.key for _, m in members(ShardSet(tmp_path / n))} for n in ("train", "held_out", "all"))
    assert train
    assert held
    assert not train & held
    assert train | held == every
    assert held == {key for key in every if fraction(key) < 0.4}
    shares = [fraction(str(i)) for i in range(4_000)]
    assert sum(x < 0.25 for x in shares) == pytest.approx(1_000, abs=90)


def test_damage_is_found(photos, tmp_path, capsys):
    build("--images", photos, "--out", tmp_path / "out", "--bases", 64, "--samples", 2)
    assert build("--verify", tmp_path / "out") == 0
    one, two, three, *_ = sorted((tmp_path / "out").rglob("*.tar"))
    data = bytearray(one.read_bytes())
    data[700] ^= 1
    one.write_bytes(data)
    two.unlink()
    three.with_suffix(".json").write_text("{}")
    capsys.readouterr()
    assert build("--verify", tmp_path / "out") == 1
    said = capsys.readouterr().out
    assert f"{one}: not the file that was written" in said
    assert f"{two}: missing" in said
    assert f"{three.with_suffix('.json')}: not the file" in said
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match=r"manifest.json: not a manifest of shards of format 1"):
        ShardSet(tmp_path / "out")


def test_the_small_world_at_all_27_sizes_of_mini(tmp_path):
    out = tmp_path / "world"
    build("--world", "mini", "--bases", *MINI_BASES, "--per-bucket", 2, "--first-seed", 70, "--out", out)
    shards = ShardSet(out)
    assert shards.sizes == {Bucket(base, aspect): 2 for base in MINI_BASES for aspect in ASPECTS}
    seeds = []
    for bucket, member in members(shards):
        meta = json.loads(member.read("json"))
        seeds.append(meta["seed"])
        pixels = images.fitted(member.read(member.picture), bucket.size)
        assert pixels.shape == (*bucket.size, 3)
        if bucket.aspect == "16:9":
            from train import configs

            world = configs.world("mini")
            scene = world.scene(meta["seed"], *bucket.size)
            assert np.array_equal(pixels, world.render(scene))  # every pixel as it was drawn
            assert member.read("txt").decode() == scene.caption
    assert seeds == list(range(70, 70 + 54))
    build(
        "--world",
        "mini",
        "--bases",
        64,
        "--aspects",
        "1:1",
        "--per-bucket",
        3,
        "--split",
        "held_out",
        "--out",
        tmp_path / "h",
    )
    held = ShardSet(tmp_path / "h")
    assert all(m.key.startswith("held_out_") for _, m in members(held))
    assert held.manifest["split"] == "held_out"


def test_keys_are_plain_and_unlike():
    taken = set()
    for file in ("a/b.png", "a/b.jpg", "a.b.png", "a_b.png", "ä.png", "x" * 200 + ".png", "a b.png", "a_b.webp"):
        key = key_of(file, taken)
        assert key not in taken
        assert "." not in key
        assert len(key) <= 80
        assert key.isascii()
        taken.add(key)
    assert key_of("sub/a-1.png", set()) == "sub/a-1"


# ---------------------------------------------------------------------------------------------- pictures


def test_orientation_is_applied_before_the_aspect_is_chosen(tmp_path):
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6  # stored lying, meant upright
    data = encoded(gradient(100, 200), "JPEG", quality=95, exif=exif)
    (tmp_path / "turned.jpg").write_bytes(data)
    assert images.oriented_size(tmp_path / "turned.jpg") == (200, 100)
    assert assign(200, 100, (64,), ASPECTS, False) == [Bucket(64, "1:2")]
    upright = images.decoded(data)
    assert (upright.height, upright.width) == (200, 100)
    rows = np.asarray(upright).astype(int)
    assert rows[10, 50, 0] < 40 < 200 < rows[190, 50, 0]  # what grew to the right grows downwards now
    assert rows[100, 90, 1] < 40 < 200 < rows[100, 10, 1]


def test_the_crop_is_the_centre_and_the_resize_covers():
    data = encoded(gradient(120, 360))
    pixels = images.fitted(data, (96, 96)).astype(int)
    assert pixels.shape == (96, 96, 3)
    assert pixels[48, 0, 0] == pytest.approx(255 / 3, abs=3)  # the middle third of the width
    assert pixels[48, -1, 0] == pytest.approx(255 * 2 / 3, abs=3)
    assert pixels[0, 48, 1] == pytest.approx(0, abs=3)  # all of the height
    assert pixels[-1, 48, 1] == pytest.approx(255, abs=3)
    exact = gradient(96, 96)
    assert np.array_equal(images.fitted(encoded(exact), (96, 96)), np.asarray(exact))


def test_the_resize_is_antialiased():
    board = np.indices((256, 256)).sum(0) % 2 * 255
    pixels = images.fitted(encoded(Image.fromarray(board.astype(np.uint8))), (64, 64)).astype(int)
    assert abs(pixels - 127.5).max() < 6  # a checkerboard becomes grey, not a pattern


@pytest.mark.parametrize(("height", "width"), [(63, 200), (200, 63), (10, 10)])
def test_no_picture_is_ever_enlarged(height, width):
    with pytest.raises(images.Unusable, match=f"{height}x{width} is smaller than 64x64"):
        images.fitted(encoded(gradient(height, width)), (64, 64))


def test_modes_of_pictures():
    clear = gradient(64, 64).convert("RGBA")
    clear.putalpha(Image.new("L", (64, 64), 0))
    assert (np.asarray(images.decoded(encoded(clear))) == 255).all()  # transparent is white
    grey = Image.fromarray((np.mgrid[:64, :64][1] * 1040).astype(np.uint16))
    found = np.asarray(images.decoded(encoded(grey)))
    assert found[0, 32].tolist() == [129] * 3  # 16 bits are scaled, not clipped
    for mode, kind in (("L", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("1", "PNG"), ("LA", "PNG")):
        assert images.decoded(encoded(gradient(64, 64, mode), kind)).mode == "RGB"


def test_arrays_keep_every_bit():
    for dtype in (torch.float32, torch.bfloat16, torch.int32):
        value = (torch.randn(5, 3, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
        again = array_of(array_bytes(value))
        assert again.dtype == dtype
        assert torch.equal(again, value)
    with pytest.raises(images.Unusable, match="not an array"):
        array_of(b"\x93NUMPY nothing")


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full():
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as caught:
        write_shard(tmp_path / "000000.tar", Bucket(64, "1:1"), [("a", full)], "plan")
    assert caught.value.filename == str(tmp_path / "000000.tar")
    assert not list(tmp_path.iterdir())


def test_precomputed_needs_its_networks_fingerprints(tmp_path):
    out = tmp_path / "pre"
    arguments = ("--world", "mini", "--bases", 64, "--aspects", "1:1", "--per-bucket", 2, "--out", out)
    build(*arguments, "--precompute", "latents", "--model", ROOT / "lens/mini/base", "--dtype", "bfloat16")
    shards = ShardSet(out)
    assert set(shards.precomputed) == {"latents"}
    latents = array_of(shards.member(Bucket(64, "1:1"), 1).read(LATENTS))
    assert latents.dtype == torch.bfloat16
    assert latents.shape == (16, 32)
    with pytest.raises(ValueError, match="other sources or settings"):
        build(*arguments)
    assert digest_of(out / "manifest.json") == hashlib.sha256((out / "manifest.json").read_bytes()).hexdigest()


def test_a_torn_file_with_a_whole_header_is_found_when_its_shard_is_written(tmp_path):
    data = encoded(gradient(96, 96), "JPEG", quality=95)
    (tmp_path / "torn.jpg").write_bytes(data[: len(data) // 2])
    assert images.oriented_size(tmp_path / "torn.jpg") == (96, 96)
    with pytest.raises(images.Unusable, match="truncated"):
        Picture(str(tmp_path), "torn.jpg", "torn", "a gradient", (0, 0)).sample()
