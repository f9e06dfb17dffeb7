"""From photographs into a training: curate, caption what is kept, shards of it, a few steps."""

import hashlib
import io
import json
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("pyarrow")
pytest.importorskip("openai")

from tests.chat_server import serving
from tests.train.captioned_photographs import CAPTIONS, answers, photographs
from train.__main__ import main
from train.data.curation.manifest import Curation
from train.data.shards import ShardSet
from train.evaluate.planted_defects import dark, torn

MINI = Path(__file__).parents[2] / "lens" / "mini" / "base"
UNJUDGED = ["--nsfw", "none", "--embedding", "none"]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of it all, and how often the server was asked.

    The source is a list whose keys `Path` spells otherwise, as it does the URLs of one. Two files more must not come through.
    """
    root = tmp_path_factory.mktemp("chain")
    (root / "in").mkdir()
    own = photographs()
    first = Image.open(io.BytesIO(next(iter(own.values())))).convert("RGB")
    for name, data in {**own, "torn.jpg": torn(first), "dark.png": dark(first)}.items():
        (root / "in" / name).write_bytes(data)
    names = sorted(path.name for path in (root / "in").iterdir())
    (root / "list.jsonl").write_text("".join(json.dumps({"path": f"./in//{name}"}) + "\n" for name in names))
    curated, captions = str(root / "curated"), root / "captions"
    source = [str(root / "list.jsonl"), curated, "--inline", "--licence", "CC0-1.0", "--set", "area_min=40000"]
    assert main(["curate", *source, *UNJUDGED]) == 0
    said = answers()
    with serving(lambda call, _: said[call.images[0]]) as server:
        assert main(["caption", "--curated", curated, "--url", server.url, "--out", str(captions)]) == 0
        asked = len(server.calls)
    told = ["--captions", str(captions / "captions.jsonl"), "--bases", "64", "--aspects", "1:1"]
    assert main(["shards", "--curated", curated, *told, "--out", str(root / "shards")]) == 0
    return root, asked


def test_what_is_kept_is_captioned_and_nothing_else(built):
    root, asked = built
    own = photographs()
    assert asked == len(own) == 24
    curation = Curation(root / "curated")
    reasons = dict(zip(curation.columns["key"], curation.view().words(), strict=True))
    assert {key: why for key, why in reasons.items() if why} == {
        "./in//torn.jpg": "broken",
        "./in//dark.png": "luminance",
    }
    rows = lines(root / "captions" / "captions.jsonl")
    assert {row["key"]: row["sha256"] for row in rows} == {
        f"./in//{name}": hashlib.sha256(data).hexdigest() for name, data in own.items()
    }
    assert lines(root / "captions" / "left_out.jsonl") == []


def test_shards_hold_each_photograph_with_its_own_words(built):
    root, _ = built
    shards = ShardSet(root / "shards")
    assert shards.manifest["left_out"] == {"unusable": 0}
    ((bucket, count),) = shards.sizes.items()
    told = {f"./in//{row['file']}": row["dense"] for row in lines(CAPTIONS)}
    found, data = {}, photographs()
    for member in (shards.member(bucket, place) for place in range(count)):
        about = json.loads(member.read("json"))
        assert (about["kind"], about["licence"]) == ("real", "CC0-1.0")
        assert member.read("webp") == data[about["source"].rpartition("/")[2]]
        found[about["source"]] = member.read("txt").decode()
    assert found == told


@pytest.mark.nightly
def test_a_training_takes_them(built, tmp_path):
    """24 pictures, 8 to a step: three steps from the shipped weights see 24 members."""
    root, _ = built
    fields = ["BASES=(64,)", 'ASPECTS=("1:1",)', "BATCH={64: 8}", "SLOTS=1", "LOG_EVERY=1", "SAVE_EVERY=2"]
    words = ["pretrain", "--config", "mini/on_shards", "--data", str(root / "shards"), "--out", str(tmp_path)]
    words += ["--model", str(MINI), "--init", str(MINI), *(w for field in fields for w in ("--set", field))]
    assert main([*words, "--steps", "3"]) == 0
    rows = [row for row in lines(tmp_path / "log.jsonl") if "loss" in row]
    assert [(row["step"], row["samples"]) for row in rows] == [(1, 8), (2, 16), (3, 24)]
    assert all(0.1 < row["loss"] < 3 for row in rows)
    assert {row["skipped_members"] for row in rows} == {0}
    assert list(tmp_path.glob("sheet_*.png"))
