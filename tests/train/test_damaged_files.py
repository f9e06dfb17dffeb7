"""What a training reads and people write or disks damage: whatever is wrong with it, one error names the file and the place."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from lens.chat_client import read_transcript
from tests.train import small_training
from train import configs, prompt_search
from train.__main__ import main, mistake
from train.data import sources, tables
from train.data.prompts import Prompt, read_prompts, write_prompts
from train.data.shards import HEAD, MANIFEST, TABLE, ShardSet, digest_of
from train.evaluate.published.longtext import prompts_of
from train.evaluate.published.oneig import judged_elsewhere
from train.loop import ranks
from train.loop.checkpoints import Damaged, StateFile, save_state
from train.loop.clock import Interrupted

READERS = {
    "rows": lambda path: list(tables.read_rows(path)),
    "prompts": read_prompts,
    "items": prompt_search.read_items,
    "captions": sources.captions_of,
    "oneig": lambda path: judged_elsewhere(path, {"reasoning": ["anime/000"]}),
    "longtext": prompts_of,
    "transcript": read_transcript,
}
LINES = {
    "not UTF-8": b'{"a": "\xff"}',
    "too deep": b"[" * 100_000,
    "a list": b"[1]",
    "half": b'{"a"',
    "digits": b'{"a": ' + b"1" * 5000 + b"}",
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_line_that_is_no_object_is_named(tmp_path, read, line):
    path = tmp_path / "list.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(ValueError, match=r"list\.jsonl, line 1: ") as raised:
        read(path)
    assert mistake(raised.value), "a command says so in one line"
    assert len(str(raised.value)) < 2000


@pytest.mark.parametrize(("field", "value"), [("id", ["a"]), ("rubrics", 7), ("rubrics", [1] * 10), ("prompt", None)])
def test_a_prompt_of_another_kind_is_named(tmp_path, field, value):
    path = tmp_path / "prompts.jsonl"
    write_prompts(path, [Prompt("a", "c", "s", "i", ("d",), "p", ("r",) * 10, ("full",))])
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}) + "\n")
    with pytest.raises(ValueError, match=rf"prompts\.jsonl, line 1: {field} must be a "):
        read_prompts(path)


def test_a_separator_inside_a_text_ends_no_line(tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text('{"file": "a.png", "caption": "one\u2028two"}\n\n', encoding="utf-8")
    assert sources.captions_of(path) == {"a.png": "one\u2028two"}


# ------------------------------------------------------------------------------------------------ shards


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(2):
        Image.fromarray(np.full((64, 64, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    out = tmp_path_factory.mktemp("out") / "shards"
    assert main(["shards", "--images", str(folder), "--out", str(out), "--bases", "64"]) == 0
    return out


@pytest.fixture
def shards(written, tmp_path):
    return shutil.copytree(written, tmp_path / "shards")


def changed(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("buckets"),
        lambda m: m.pop("precomputed"),
        lambda m: m.update(buckets=[1]),
        lambda m: m["buckets"].update({"64_1x1": [{}]}),
    ],
)
def test_a_damaged_manifest_is_named(shards, change):
    changed(shards / MANIFEST, change)
    with pytest.raises(ValueError, match=r"manifest\.json: not a manifest of shards, or a damaged one"):
        ShardSet(shards)
    (shards / MANIFEST).write_bytes(b"[" * 100_000)
    with pytest.raises(ValueError, match=r"manifest\.json: not a manifest of shards: maximum recursion"):
        ShardSet(shards)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["rows"].update({"64_1x1": 1}),
        lambda h: h["rows"].update({"64_1x1": [0, 2**63]}),
        lambda h: h.update(sizes={"64_1x1": "x"}),
        lambda h: h.pop("max_upscale"),
    ],
)
def test_a_head_of_another_form_is_not_believed_whatever_its_hashes_say(shards, change):
    sizes = ShardSet(shards).sizes
    changed(shards / HEAD, change)
    assert ShardSet(shards).sizes == sizes


@pytest.mark.parametrize("name", [HEAD, TABLE])
@pytest.mark.parametrize("data", [b"", b"{", b"\x93NUMPY\x01\x00\x76\x00{'descr'"])
def test_a_damaged_table_is_made_anew_from_the_manifest(shards, name, data):
    sizes = ShardSet(shards).sizes
    (shards / name).write_bytes(data)
    assert ShardSet(shards).sizes == sizes


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x["parts"]["png"][0].__setitem__(1, {}),
        lambda x: x["parts"]["png"][0].__setitem__(1, float("inf")),
        lambda x: x["parts"]["png"].append([1, 2, 3]),
        lambda x: x["parts"].update(png=None),
        lambda x: x.update(keys=3),
    ],
)
def test_a_damaged_index_is_named(shards, change):
    changed(shards / "64_1x1" / "000000.json", change)
    found = ShardSet(shards)
    ((bucket, _),) = found.sizes.items()
    with pytest.raises(Interrupted, match=r"000000\.json: not the index that was written, asked for member 0"):
        found.member(bucket, 0)


# ------------------------------------------------------------------------------------------------ states


def test_a_latest_that_names_nothing_is_told_and_the_states_are_found(tmp_path):
    group = ranks.Ranks(torch.device("cpu"))
    trainer = small_training.trainer_on(group, tmp_path)
    trainer.train_step(small_training.batches(0, 0, 1))
    trainer.save(last=True)
    pointer, state = tmp_path / "checkpoints" / "latest", tmp_path / "checkpoints" / "step_0000001"
    for data in (b"step_\xff\n", b"step_\n", b"..\n", b"x" * 5000):
        pointer.write_bytes(data)
        said = []
        assert trainer.states.latest() == state
        trainer.states.last_whole(None, trainer.resume, said.append)
        assert len(said) == 1
        assert all(line.endswith("the newest state is missing") and len(line) < 400 for line in said)
    (state / ".metadata").write_bytes(b"no pickle")
    sums = json.loads((state / "checksums.json").read_text())
    with pytest.raises(Damaged, match=r"\.metadata: not the file that was saved"):
        trainer.resume(state)
    (state / "checksums.json").write_text(json.dumps(sums | {".metadata": digest_of(state / ".metadata")}))
    with pytest.raises(Damaged, match=r"\.metadata: not PyTorch's table of a state"):
        trainer.resume(state)


WHOLE = {"stage": "encoder", "step": 1, "model": {"a": torch.zeros(3)}, "ema": {"average": {}}, "optimizer": {}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "a state without tensors of a model"),
        ({"ema": []}, "a state without tensors of a model"),
        ({"optimizer": {"m": 3}}, "a state without tensors of a model"),
        ({"model": {"a": 1}}, r"model\.a has shape \[\], expected \[3\]"),
        ({"stage": [1]}, r"stage \[1\] format 1, expected 'encoder'"),
    ],
)
def test_a_state_file_of_other_values_is_named(tmp_path, change, message):
    save_state(tmp_path / "s.pt", WHOLE | change)
    with pytest.raises(ValueError, match=rf"s\.pt: {message}"):
        StateFile(tmp_path / "s.pt").load(tmp_path / "s.pt", {"model.a": torch.zeros(3)}, "encoder")


def test_a_damaged_state_file_is_named(tmp_path):
    path = tmp_path / "s.pt"
    save_state(path, WHOLE)
    whole = bytearray(path.read_bytes())
    at = whole.index(b"optimizer")  # inside the pickle, which the archive's table does not check
    whole[at - 8 : at] = b"\xff" * 8
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"s\.pt: not a training state that can be read: ") as raised:
        StateFile(path).load(path, {"model.a": torch.zeros(3)}, "encoder")
    assert mistake(raised.value)


@pytest.mark.parametrize("value", ["[" * 5000, "-" * 50_000 + "1", "{1: 2, []: 3}", "1" * 5000])
def test_a_set_that_python_does_not_read_is_text(value):
    """Text is no number: refused as that, and not with all of it repeated."""
    with pytest.raises(ValueError, match=r"^--set LOG_EVERY=.*: expected int, got str '") as raised:
        configs.override(configs.load("mini/on_shards", "pretrain"), [f"LOG_EVERY={value}"])
    assert len(str(raised.value)) < 500
