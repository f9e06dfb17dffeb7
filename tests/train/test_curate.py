"""The data engine: sources, odd files, planted defects, resuming, manifests, near-duplicates, the page, shards."""

import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pyarrow")

from train import curate_check
from train.__main__ import main
from train.curate_check import compared
from train.data.curation import engine
from train.data.curation.duplicates import near_pairs
from train.data.curation.manifest import Curation, manifests
from train.data.curation.records import STEPS, Item, Pairs, Record, Thresholds, read_rows, view, write_rows
from train.data.curation.steps import Limits
from train.data.shards import ShardSet
from train.evaluate.planted_defects import JUDGED, planted, settled
from train.evaluate.small_onnx import COLOUR_THRESHOLDS, colour_judges

ROOT = Path(__file__).resolve().parents[2]
UNJUDGED = ["--nsfw", "none", "--watermark", "none", "--embedding", "none"]


def curate(source, out, *more):
    return main(["curate", str(source), str(out), "--inline", *map(str, more)])


def reasons(out):
    """key -> the step that leaves it out, or None."""
    curation = Curation(out)
    return dict(zip(curation.columns["key"], curation.view().words(), strict=True))


def everything(out, but=()):
    """Every file below a folder but those named -> its bytes."""
    found = {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    return {name: data for name, data in found.items() if name not in but}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of planted images, and the step that each must hit."""
    pytest.importorskip("onnxruntime")
    folder, expected = tmp_path_factory.mktemp("planted"), {}
    for seed in (0, 1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45):
        for one in planted(seed, JUDGED):
            path = folder / one.name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(one.data)
            expected[one.name] = one.step
    return folder, expected


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    words = colour_judges(tmp_path_factory.mktemp("models"))
    options = [word for use, path in words.items() for word in (f"--{use}", path)]
    return [*options, *(word for threshold in COLOUR_THRESHOLDS for word in ("--set", threshold))]


@pytest.fixture(scope="module")
def curated(images, models, tmp_path_factory):
    """All of them, in one run."""
    out = tmp_path_factory.mktemp("curated") / "out"
    assert curate(images[0], out, "--chunk", 4, "--part", 10, "--licence", "CC0-1.0", *models) == 0
    return out


# ------------------------------------------------------------------------------------------------ steps


def test_planted_defects_hit_their_step_and_no_other(images, curated):
    assert set(images[1].values()) == {*STEPS, None}
    assert settled(reasons(curated), images[1]) == images[1]
    manifest = Curation(curated).manifest
    assert [step["step"] for step in manifest["steps"]] == list(STEPS)
    assert manifest["steps"][0]["came"] == len(images[1]) == manifest["records"]
    assert sum(step["dropped"] for step in manifest["steps"]) == manifest["records"] - manifest["kept"]
    assert all(step["not_judged"] == 0 for step in manifest["steps"])
    assert manifest["plan"]["models"]["nsfw"] == "small nsfw@1 float32"
    assert manifest["plan"]["licence"] == "CC0-1.0"
    one = next(Curation(curated).records())
    assert (one.nsfw_by, one.source, one.licence) == ("small nsfw@1 float32", "real", "CC0-1.0")


def animation(kind):
    stream, frames = io.BytesIO(), [Image.new("RGB", (400, 400), c) for c in ("red", "blue")]
    frames[0].save(stream, kind, save_all=True, append_images=frames[1:])
    return stream.getvalue()


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_odd_files_have_one_reason_each(tmp_path, capsys):
    """What is kept is decoded as it is meant to be seen; what is not says why."""
    folder = tmp_path / "odd"
    folder.mkdir()
    photo = Image.open(io.BytesIO(planted(0)[0].data))
    grey16 = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    turned = Image.Exif()
    turned[274] = 6
    jpeg, png = encoded(photo, "JPEG"), encoded(photo, "PNG")
    mpo = encoded(photo, "MPO", save_all=True, append_images=[photo.resize((80, 80))])
    files = {
        "cmyk.jpg": (encoded(photo.convert("CMYK"), "JPEG"), None),
        "grey 16 bits.png": (encoded(grey16, "PNG"), None),
        "turned.jpg": (encoded(photo, "JPEG", exif=turned.tobytes()), None),
        "preview.jpg": (mpo, None),
        "seen through.webp": (encoded(photo.convert("RGBA"), "WEBP"), None),
        "palette.PNG": (encoded(photo.quantize(64), "PNG"), None),
        "Bild ä 画像 🐱 %20.jpg": (jpeg, None),
        "moves.gif": (animation("GIF"), "animated: 2 frames"),
        "moves.webp": (animation("WEBP"), "animated: 2 frames"),
        "garbage behind its end.jpg": (jpeg + b"garbage" * 99, None),
        "half.jpg": (jpeg[: len(jpeg) // 2], "not decoded: image file is truncated"),
        "zero tail.png": (png[: len(png) // 2] + bytes(len(png) // 2), "not decoded: "),
        "empty.png": (b"", "empty file"),
        "text.jpg": (b"<html>no</html>", "not decoded: not an image"),
        "wide.png": (encoded(Image.new("1", (5000, 401)), "PNG"), "5000 x 401 pixels, more than 2000000"),
        "long.bmp": (encoded(photo, "BMP"), "518454 bytes, more than 500000"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")  # opened, it would wait for a writer for ever
    (folder / ".hidden.jpg").write_bytes(jpeg)
    (folder / "notes.txt").write_text("no image")
    with open(os.fsencode(folder) + b"/not utf \xff.jpg", "wb") as file:
        file.write(jpeg)
    limits = ["--max-pixels", 2_000_000, "--max-bytes", 500_000]
    assert curate(folder, tmp_path / "out", *UNJUDGED, *limits) == 0
    curation = Curation(tmp_path / "out")
    records = {record.key: record for record in curation.records()}
    expected = {name: why for name, (_, why) in files.items()}
    expected |= {
        "gone.jpg": "cannot be read: no such file",
        "pipe.jpg": "cannot be read: not a file",
        "not utf \\xff.jpg": "its name is not UTF-8",
    }
    assert set(records) == set(expected)
    for name, why in expected.items():
        if why is None:
            assert records[name].failure is None, name
            assert reasons(tmp_path / "out")[name] is None, name
        else:
            assert records[name].failure.startswith(why), (name, records[name].failure)
            assert reasons(tmp_path / "out")[name] == "broken"
    assert (records["turned.jpg"].height, records["turned.jpg"].width) == (photo.width, photo.height)
    assert (records["cmyk.jpg"].mode, records["grey 16 bits.png"].mode) == ("CMYK", "I;16")
    near = [records[name].luminance for name in ("cmyk.jpg", "preview.jpg", "seen through.webp")]
    assert np.ptp(near) < 0.02
    assert records["half.jpg"].clarity is None
    assert curation.manifest["failures"]["animated"] == 2
    printed = capsys.readouterr().out
    assert "nsfw: not judged: --nsfw names none" in printed
    assert "not judged: 8\n" in printed


def test_order_of_a_list_changes_no_record(images, curated, tmp_path, models):
    folder, expected = images
    names = [str(folder / name) for name in expected]
    random.Random(3).shuffle(names)
    path = tmp_path / "list.jsonl"
    lines = [json.dumps({"path": name, "caption": f"of {Path(name).name}"}) for name in names]
    path.write_text("\n".join(["", "not json", '{"path": 3}', "[1]", '{"path": "a", "url": "b"}', *lines]) + "\n")
    assert curate(path, tmp_path / "out", "--chunk", 7, *models) == 0
    found = {
        Path(key).relative_to(folder).as_posix(): r for key, r in reasons(tmp_path / "out").items() if "#" not in key
    }
    assert found == reasons(curated)
    scores = ("sha256", "clarity", "entropy", "luminance", "nsfw", "watermark", "aesthetic", "width", "failure")
    before = {r.key: [getattr(r, s) for s in scores] for r in Curation(curated).records()}
    after = {Path(r.key).name: r for r in Curation(tmp_path / "out").records()}
    for key, values in before.items():
        assert [getattr(after[Path(key).name], s) for s in scores] == values
    faults = {r.key: r.failure for r in after.values() if "#" in r.key}
    assert list(faults) == ["list.jsonl#2", "list.jsonl#3", "list.jsonl#4", "list.jsonl#5"]
    assert faults["list.jsonl#2"].startswith("not JSON")
    assert faults["list.jsonl#4"] == "expected an object with path or url, got list"
    assert after["000000.jpg"].caption == "of 000000.jpg"


def test_tars_with_captions_and_a_torn_one(tmp_path):
    photo = planted(0)[0].data
    folder = tmp_path / "tars"
    folder.mkdir()
    for name in ("a.tar", "b.tar"):
        with tarfile.open(folder / name, "w") as tar:
            for member, data in (("x/1.jpg", photo), ("x/1.txt", b" a cat \n"), ("2.png", b"no"), ("3.jpg", photo)):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    whole = (folder / "b.tar").read_bytes()
    (folder / "b.tar").write_bytes(whole[: len(photo) + 600])  # ends behind its first image
    assert curate(folder, tmp_path / "out", *UNJUDGED) == 0
    records = {r.key: r for r in Curation(tmp_path / "out").records()}
    assert list(records) == ["a.tar/x/1.jpg", "a.tar/2.png", "a.tar/3.jpg", "b.tar/x/1.jpg", "b.tar"]
    assert records["a.tar/x/1.jpg"].caption == "a cat"
    assert {records[key].failure for key in ("a.tar/3.jpg", "b.tar/x/1.jpg")} == {None}
    assert records["b.tar"].failure.startswith("the tar ends without an end mark")
    assert Curation(tmp_path / "out").image(records["a.tar/3.jpg"]) == photo


# ------------------------------------------------------------------------------------------------ resuming


def test_an_interrupted_run_ends_as_one_in_one_piece(images, curated, models, tmp_path, monkeypatch):
    """Interrupted within a part, between chunks and while one is written; nothing is done twice, no byte differs."""
    arguments = [images[0], tmp_path / "out", "--chunk", 4, "--part", 10, "--licence", "CC0-1.0", *models]
    real, done = engine.process, []

    def process(settings, chunk):
        if len(done) in (2, 5) and done[-1] is not None:
            done.append(None)
            if len(done) > 4:  # half a chunk's file, as a kill leaves it
                chunk.records(settings.out).with_suffix(".part").write_bytes(b"PAR1")
            raise KeyboardInterrupt
        done.append((chunk.part, chunk.number))
        return real(settings, chunk)

    monkeypatch.setattr(engine, "process", process)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            curate(*arguments)
        assert not manifests(tmp_path / "out")
    assert (tmp_path / "out" / "parts" / "000000").is_dir() or (tmp_path / "out" / "parts" / "000000.parquet").is_file()
    assert curate(*arguments) == 0
    worked = [chunk for chunk in done if chunk is not None]
    assert len(worked) == len(set(worked)) == 3 + 3 + 2
    assert everything(tmp_path / "out") == everything(curated)


def test_thresholds_make_a_new_manifest_and_nothing_else(images, curated, models, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(curated, tmp_path / "out")
    arguments = [images[0], out, "--chunk", 4, "--part", 10, "--licence", "CC0-1.0", *models]
    before = everything(out, but=("report.html",))
    monkeypatch.setattr(engine, "process", lambda *_: pytest.fail("nothing is computed anew"))
    assert curate(*arguments) == 0
    assert "(as before)" in capsys.readouterr().out
    assert everything(out, but=("report.html",)) == before
    assert curate(*arguments, "--set", "clarity_min=0", "--set", "duplicate_above=0.99999") == 0
    after = everything(out, but=("report.html",))
    assert {name for name in after if name not in before} == {"manifest-0002.json"}
    assert all(after[name] == data for name, data in before.items())
    found = Curation(out)
    assert found.thresholds.clarity_min == 0
    assert "clarity" in Curation(curated).view().words()
    assert "clarity" not in found.view().words()
    lower = Thresholds(duplicate_above=0.5)
    with pytest.raises(ValueError, match=r"duplicate_above=0\.5: pairs were only looked for above 0\.965"):
        found.view(lower)


def test_what_does_not_belong_to_the_folder_is_refused(images, curated, models, tmp_path):
    with pytest.raises(
        ValueError, match=r"plan\.json: licence is 'CC0-1\.0', now 'MIT'; expected the same, or a fresh OUT"
    ):
        curate(images[0], curated, "--chunk", 4, "--part", 10, "--licence", "MIT", *models)
    source = tmp_path / "in"
    source.mkdir()
    with pytest.raises(ValueError, match=r"in: holds no images \(folder\)"):
        curate(source, tmp_path / "out", *UNJUDGED)
    (source / "a.jpg").write_bytes(planted(0)[0].data)
    curate(source, tmp_path / "out", *UNJUDGED)
    (source / "b.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"in: has changed since .*plan\.json was written; expected a fresh OUT"):
        curate(source, tmp_path / "out", *UNJUDGED)
    for words, message in (
        (["--set", "sharp=3"], "--set sharp=3: no threshold 'sharp'"),
        (["--set", "clarity_min=much"], "expected a number, got 'much'"),
        (["--require", "aesthetic"], "--require aesthetic: --aesthetic names none; none ships"),
        (["--require", "taste"], "--require taste: expected some of nsfw"),
        (["--watermark", "opennsfw"], "expected a model for watermark, opennsfw is one for nsfw and embedding"),
        (["--aesthetic", tmp_path / "no"], "no: no such folder"),
        (["--max-pixels", 10**10], "--max-pixels 10000000000: expected 1 to 178956970"),
    ):
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            curate(source, tmp_path / "other", *UNJUDGED, *words)
    with pytest.raises(FileNotFoundError, match="no such source"):
        curate(tmp_path / "nothing", tmp_path / "other", *UNJUDGED)
    with pytest.raises(FileNotFoundError, match="no manifest here"):
        main(["curate_report", str(tmp_path / "other")])


def test_a_full_disk_leaves_whole_files_and_the_same_command_goes_on(images, curated, models, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = [images[0], out, "--chunk", 4, "--part", 10, "--licence", "CC0-1.0", *models]
    real, written = engine.write_rows, []

    def write(path, rows):
        if "parts" in path.parts and len(written) == 3:
            written.append(path)
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        real(path, rows)

    monkeypatch.setattr(engine, "write_rows", write)
    with pytest.raises(OSError, match="No space left"):
        curate(*arguments)
    assert not list(out.rglob("*.part"))
    assert curate(*arguments) == 0
    assert everything(out) == everything(curated)


@pytest.mark.nightly
def test_a_killed_process_loses_and_doubles_nothing(images, curated, models, tmp_path):
    out = tmp_path / "out"
    words = ["--chunk", "4", "--part", "10", "--licence", "CC0-1.0", *models]
    command = [sys.executable, "-m", "train", "curate", str(images[0]), str(out), "--inline", *words]
    for lines in (1, 2, 1):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        seen = 0
        for line in process.stdout:
            seen += line.startswith("part ")
            if seen == lines:
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
    assert curate(images[0], out, *words) == 0
    assert everything(out) == everything(curated)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "more", [["--cpus", "2"], ["--cpus", "3", "--judges", "1"]], ids=["a worker killed", "models in an actor"]
)
def test_ray_makes_the_same_files(images, curated, models, tmp_path, more):
    """By two workers, one of which is killed when the first chunk is there; and with the models in an actor of their own."""
    pytest.importorskip("ray")
    psutil = pytest.importorskip("psutil")
    out = tmp_path / "out"
    words = ["--chunk", "4", "--part", "10", "--licence", "CC0-1.0", *models, *more]
    command = [sys.executable, "-m", "train", "curate", str(images[0]), str(out), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    killed = "--judges" in more
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("part ") and not killed:
            # not Ray's agents, which have such names, too, and whose end is their machine's
            below = psutil.Process(process.pid).children(recursive=True)
            for worker in [p for p in below if p.name().startswith("ray::Map")][:1]:
                worker.kill()
                killed = True
    assert process.wait() == 0, printed
    assert killed
    assert everything(out) == everything(curated)


# ------------------------------------------------------------------------------------------------ duplicates


def turned_rows(cosines, width=64, seed=0):
    """float16 rows in pairs: 2 i and 2 i + 1 have that cosine, other rows are nearly orthogonal."""
    draw, rows = np.random.default_rng(seed), []
    for c in cosines:
        a, b = draw.normal(size=(2, width))
        a /= np.linalg.norm(a)
        b -= a * (a @ b)
        b /= np.linalg.norm(b)
        rows += [a, c * a + (1 - c * c) ** 0.5 * b]
    return np.array(rows).astype(np.float16)


def found_in(rows, floor, **how):
    n = len(rows)
    pairs = near_pairs(rows, np.arange(n), [str(i) for i in range(n)], floor, **how)
    return {(int(a), int(b)): c for a, b, c in zip(pairs.a, pairs.b, pairs.cosine)}


def test_pairs_above_the_floor_and_no_other_in_any_order():
    rows = turned_rows([0.99, 0.98, 0.986, 0.984] * 50)
    found = found_in(rows, 0.985)
    assert set(found) == {(2 * i, 2 * i + 1) for i in range(200) if i % 2 == 0}
    assert all(c > 0.985 for c in found.values())
    order = np.random.default_rng(1).permutation(len(rows))
    back = {tuple(sorted((int(order[a]), int(order[b])))): c for (a, b), c in found_in(rows[order], 0.985).items()}
    assert back == found
    scaled = (rows.astype(np.float32) * np.linspace(0.1, 9, len(rows))[:, None]).astype(np.float16)
    assert set(found_in(scaled, 0.985)) == set(found)


def test_large_sets_by_faiss_find_what_comparing_all_finds():
    pytest.importorskip("faiss")
    rows = turned_rows([0.99, 0.97] * 400, seed=2)
    found = found_in(rows, 0.985, exact=10)
    whole = found_in(rows, 0.985)
    assert set(found) <= set(whole)
    assert len(found) >= 0.99 * len(whole) == 0.99 * 400


def test_copies_of_one_file_cost_one_pair_each():
    rows = np.repeat(turned_rows([0.5]), [600, 1], axis=0)
    found = near_pairs(rows, np.arange(10, 611), ["a"] * 600 + ["b"], 0.9)
    assert found.a.tolist() == [10] * 599
    assert found.b.tolist() == list(range(11, 610))
    close = near_pairs(rows, np.arange(601), [str(i) for i in range(601)], 0.9)
    assert len(close.a) < 601 * 256
    linked = Pairs(close.a, close.b, close.cosine, 0.9)
    columns = empty_columns(601)
    assert view(columns, Thresholds(), linked, 0.985).kept.sum() == 2


def empty_columns(n):
    numbers = {name: np.full(n, np.nan) for name in STEPS[2:8]}
    area = np.full(n, 400.0 * 400)
    return {
        "key": [f"{i:05d}" for i in range(n)],
        "failed": np.zeros(n, bool),
        "embedded": np.ones(n, bool),
        "area": area,
        **numbers,
    }


def test_the_best_of_a_component_stays_and_what_others_drop_connects_nothing():
    columns = empty_columns(6)
    columns["area"][:] = [200_000, 200_000, 300_000, 200_000, 200_000, 200_000]
    columns["aesthetic"][:] = [5, 5, 5, np.nan, 9, 6]
    pairs = Pairs(np.array([0, 1, 3, 4]), np.array([1, 2, 4, 5]), np.array([0.99, 0.99, 0.99, 0.99]), 0.9)
    assert view(columns, Thresholds(), pairs, 0.985).words() == [
        "duplicate",
        "duplicate",
        None,
        "duplicate",
        None,
        "duplicate",
    ]
    columns["failed"][1] = columns["failed"][4] = True
    assert view(columns, Thresholds(), pairs, 0.985).words() == [None, "broken", None, None, "broken", None]
    assert view(columns, Thresholds(), pairs, 0.995).kept.sum() == 4
    assert view(columns, Thresholds(), None, None).counts[-1].dropped == 0


@pytest.mark.parametrize("field", ["clarity_min", "entropy_min", "luminance_max", "nsfw_max", "duplicate_above"])
def test_a_looser_threshold_never_keeps_fewer(field):
    draw, n = np.random.default_rng(4), 300
    columns = empty_columns(n)
    for name in STEPS[2:8]:
        columns[name] = draw.random(n) * (10 if name in ("clarity", "entropy", "aesthetic") else 1)
    a = draw.integers(0, n - 1, 200)
    pairs = Pairs(a, np.minimum(a + draw.integers(1, 9, 200), n - 1), 0.9 + draw.random(200) / 10, 0.9)
    strict_to_loose = sorted(np.linspace(0.91, 0.99, 9) if field == "duplicate_above" else np.linspace(0.1, 0.9, 9))
    if field.endswith("_min"):
        strict_to_loose = strict_to_loose[::-1]
    kept = []
    for value in strict_to_loose:
        asked = Thresholds(**{field: float(value)})
        found = view(columns, asked, pairs, asked.duplicate_above or 1.0)
        assert sum(c.dropped for c in found.counts) + found.kept.sum() == n
        kept.append(
            found.kept.sum()
            if field == "duplicate_above"
            else sum(found.reason != STEPS.index(field.partition("_")[0]))
        )
    assert kept == sorted(kept)


# ------------------------------------------------------------------------------------------------ files, page, shards


def test_records_read_back_as_they_were(tmp_path):
    rows = [
        Record("a", "real", "MIT", width=3, height=4, clarity=1.5, embedding=b"\0\1", embedding_by="x@1 float32"),
        Record("ä\n", "synthetic", "", caption="", failure="no"),
    ]
    write_rows(tmp_path / "r.parquet", rows)
    assert read_rows(tmp_path / "r.parquet", Record) == rows
    assert read_rows(tmp_path / "r.parquet", Record, 1, 1) == rows[1:]
    write_rows(tmp_path / "i.parquet", [Item("k", url="http://x/")])
    assert read_rows(tmp_path / "i.parquet", Item) == [Item("k", url="http://x/")]
    (tmp_path / "no.parquet").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"no\.parquet: not a Parquet file that can be read"):
        read_rows(tmp_path / "no.parquet", Record)
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"other\.parquet: expected records of format 1, got 'another Parquet file'"):
        read_rows(tmp_path / "other.parquet", Record)


def test_the_page_escapes_foreign_text_and_counts_in_order(tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    name = "<img src=x onerror=alert(1)>&.jpg"
    (source / name).write_bytes(planted(0)[0].data)
    (source / name.replace(".jpg", ".txt")).write_text("<script>alert(2)</script> five words in all")
    (source / "<b>broken</b>.png".replace("/", "_")).write_bytes(b"\0")
    curate(source, out, *UNJUDGED, "--licence", "<i>own</i>")
    page = (out / "report.html").read_text()
    assert [raw for raw in ("<img src=x", "<script", "<b>broken", "<i>own") if raw in page] == []
    assert "&lt;img src=x onerror=alert(1)&gt;&amp;.jpg" in page
    assert "data:image/jpeg;base64," in page
    assert "words of a caption: " in page
    places = [page.index(f"<td>{step}</td>") for step in STEPS]
    assert places == sorted(places)
    assert main(["curate_report", str(out), "--set", "area_min=1000000", "--out", str(tmp_path / "other.html")]) == 0
    assert "area               1 came         1 dropped" in capsys.readouterr().out
    assert "0 of 2 images kept" in (tmp_path / "other.html").read_text()
    assert (out / "report.html").read_text() == page


def test_calibration_shows_both_sides_of_every_threshold(curated, tmp_path, capsys):
    folder = shutil.copytree(curated, tmp_path / "out")
    assert main(["curate_calibrate", str(folder), "--images", "4"]) == 0
    page = (folder / "calibrate" / "index.html").read_text()
    for name in (
        "area_147456",
        "clarity_4",
        "entropy_2",
        "luminance_0.06",
        "nsfw_0.8",
        "aesthetic_0.02",
        "duplicate_0.985",
    ):
        assert f'src="{name}.png"' in page
        with Image.open(folder / "calibrate" / f"{name}.png") as sheet:
            assert sheet.width > 300
    assert f"<td>clarity</td><td>{sum(r.clarity is not None for r in Curation(folder).records())}</td>" in page


def test_shards_take_what_is_kept(tmp_path, images, models):
    pytest.importorskip("webdataset")
    source, out = tmp_path / "in", tmp_path / "curated"
    source.mkdir()
    for seed in (0, 1, 4):
        one = planted(seed)[0]
        (source / Path(one.name).name).write_bytes(one.data)
        (source / Path(one.name).name).with_suffix(".txt").write_text(f"number {seed}")
    (source / "000004.txt").unlink()
    (source / "broken.jpg").write_bytes(b"no")
    curate(source, out, *UNJUDGED, "--licence", "CC0-1.0")
    made = ["shards", "--curated", str(out), "--bases", "64", "--aspects", "1:1", "--out"]
    assert main([*made, str(tmp_path / "shards")]) == 0
    shards = ShardSet(tmp_path / "shards")
    (bucket,) = shards.sizes
    members = [shards.member(bucket, i) for i in range(shards.sizes[bucket])]
    captions = {m.read("txt").decode(): m for m in members}
    assert set(captions) == {"number 0", "number 1"}
    assert captions["number 0"].read("jpg") == (source / "000000.jpg").read_bytes()
    meta = json.loads(captions["number 0"].read("json"))
    assert (meta["source"], meta["kind"], meta["licence"]) == ("000000.jpg", "real", "CC0-1.0")
    assert shards.manifest["left_out"] == {"no caption": 1, "unusable": 0}
    extra = tmp_path / "captions.jsonl"
    extra.write_text("".join(json.dumps({"file": f"{i:06d}.jpg", "caption": "told"}) + "\n" for i in (0, 4)))
    assert main([*made, str(tmp_path / "told"), "--captions", str(extra)]) == 0
    assert ShardSet(tmp_path / "told").manifest["samples"] == 2


def test_the_check_counts_what_was_planted(tmp_path, capsys):
    words = ["curate_check", str(tmp_path), "--images", "8", *UNJUDGED]
    assert main([*words, "--at-least", "0.99"]) == 0  # seeds 0 to 4: torn, and too small
    told = json.loads((tmp_path / "check.json").read_text())
    assert told["steps"]["broken"] == {"planted": 3, "found": 3, "mistaken": 0, "recall": 1, "precision": 1}
    assert told["speed"]["images"] == 8
    assert main([*words, "--at-least", "0.99", "--set", "area_min=1000000"]) == 1
    assert json.loads((tmp_path / "check.json").read_text())["steps"]["area"]["mistaken"] == 5
    assert compared({"a": "area", "b": None}, {"a": None, "b": "area"})["area"]["recall"] == 0
    assert "broken           3       3        0 100.00%   100.00%" in capsys.readouterr().out


def test_the_check_plants_for_every_step_and_compares_a_second_interrupted_run(tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxruntime")
    words = ["curate_check", str(tmp_path), "--images", "84", "--side", "96", "--colours", "--again", "--at-least", "1"]
    assert main(words) == 0
    told = json.loads((tmp_path / "check.json").read_text())
    assert set(told["steps"]) == set(STEPS)
    assert told["different"] == []
    assert [row["images"] for row in told["memory_again"]] == [64, 84]
    assert all(row["this_process_mb"] > 50 for row in told["memory"] + told["memory_again"])
    assert "interrupted behind 64 images" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "again")
    (tmp_path / "curated" / "parts" / "extra").write_text("")  # what a run wrote twice, say
    monkeypatch.setattr(curate_check, "planted", lambda *_: pytest.fail("the images are there"))
    assert main(words) == 1
    assert json.loads((tmp_path / "check.json").read_text())["different"] == ["parts/extra"]
    with pytest.raises(ValueError, match="--kill: ends a worker of Ray; expected --ray"):
        main(["curate_check", str(tmp_path), "--kill"])


def test_folders_differ_where_a_byte_does(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "x").mkdir(parents=True)
        (tmp_path / name / "x" / "same").write_bytes(b"1")
        (tmp_path / name / "byte").write_bytes(name.encode())
        (tmp_path / name / f"only {name}").write_bytes(b"")
    assert curate_check.differing(tmp_path / "a", tmp_path / "b") == ["byte", "only a", "only b"]


def test_a_worker_is_known_by_its_name_with_its_memory_and_its_time():
    if not Path("/proc/self/stat").is_file():
        pytest.skip("no /proc here")
    busy = "import time; list(range(10**6)); print(flush=True); time.sleep(1000)"
    children = [subprocess.Popen([name, "-c", busy], executable=sys.executable, stdout=subprocess.PIPE)
                for name in ("ray::Map", "other")]  # fmt: skip
    try:
        for child in children:
            child.stdout.readline()
        assert curate_check.workers() == [children[0].pid]
        assert curate_check.busiest(curate_check.workers()) == children[0].pid
        assert 1 < curate_check.megabytes(children[0].pid) < 500
        assert curate_check.seconds_of(children[0].pid) > 0
    finally:
        for child in children:
            child.kill()
            child.wait()
            child.stdout.close()
    assert curate_check.workers() == []
    assert curate_check.megabytes(children[0].pid) == curate_check.seconds_of(children[0].pid) == 0
    with pytest.raises(ValueError, match="--kill: no worker of Ray below this process"):
        curate_check.busiest([])


def test_limits_refuse_what_none_can_meet():
    with pytest.raises(ValueError, match="expected more than 0"):
        Limits(bytes=0)
