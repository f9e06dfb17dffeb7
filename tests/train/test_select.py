"""Classes without training, and selections: quotas, ties, nested subsets, what is refused."""

import argparse
import json
import random

import numpy as np
import pytest
from PIL import Image

from train import classify
from train.__main__ import main
from train.data.captions import SCENARIOS
from train.data.sources import fraction
from train.data.taxonomy import CATEGORIES
from train.data.zero_shot import PHRASES, classified, directions, phrases, unit
from train.select import BALANCED, best, joined, key_of, shares_of, subset


class Planted:
    """An embedder of a space where every phrase has an axis and a red image lies near "a portrait of a person"."""

    by = "planted"

    def __init__(self):
        every = [phrase for own in phrases().values() for some in own.values() for phrase in some]
        self.axes = {phrase: place for place, phrase in enumerate(dict.fromkeys(every))}

    def texts(self, texts):
        return np.eye(len(self.axes), dtype=np.float32)[[self.axes[text] for text in texts]]

    def images(self, images):
        rows = np.zeros((len(images), len(self.axes)), np.float32)
        for row, image in zip(rows, images):
            red = image[..., 0].mean() > 128
            if red:  # anything else is as near to every class
                row[[self.axes[p] for p in ("a portrait of a person", "a photo of a person")]] = 1
        return unit(rows)


def test_phrases_are_of_the_scenarios_and_categories():
    assert PHRASES.name.endswith(".v1.json")
    assert tuple(phrases()["scenario"]) == SCENARIOS[:-1]
    assert tuple(phrases()["category"]) == CATEGORIES


def test_the_nearest_class_wins_and_what_is_near_to_none_is_unknown():
    rows = unit(np.array([[1.0, 0, 0], [0, 1, 0]]))
    images = unit(np.array([[1.0, 0.1, 0], [0.1, 1, 0], [1, 1, 0], [0, 0, 1]]))
    found = classified(images, ["a", "b"], rows, least=0.6)
    assert [label for label, _ in found] == ["a", "b", "unknown", "unknown"]
    assert [chance for _, chance in found][2:] == pytest.approx([0.5, 0.5])
    assert [label for label, _ in classified(images, ["a", "b"], rows, least=0.0)][:2] == ["a", "b"]
    with pytest.raises(ValueError, match=r"embeddings \[4, 2\], expected \[N, 3\] of the same model"):
        classified(images[:, :2], ["a", "b"], rows)
    np.testing.assert_allclose(np.linalg.norm(directions(phrases()["category"], Planted()), axis=1), 1, rtol=1e-6)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_images_and_stored_embeddings_give_the_same_classes(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    Image.new("RGB", (8, 8), "blue").save(folder / "b.png")
    (folder / "c.png").write_bytes(b"torn")
    options = argparse.Namespace(images=folder, records=None, batch=2, least=0.4, out=tmp_path / "c.jsonl")
    assert classify.classify(options, Planted()) == 0
    rows = lines(tmp_path / "c.jsonl")
    assert [(r["key"], r["scenario"], r["category"]) for r in rows] == [
        ("a.png", "portrait", "Human"),
        ("b.png", "unknown", "unknown"),
    ]
    stored = Planted().images([np.full((4, 4, 3), (255, 0, 0), np.uint8)])[0]
    record = {"key": "a.png", "embedding": [float(v) for v in stored], "embedding_by": "planted@12 float32"}
    (tmp_path / "r.jsonl").write_text(json.dumps(record) + "\n" + json.dumps({"key": "d.png"}) + "\n")
    options = argparse.Namespace(
        images=None, records=tmp_path / "r.jsonl", batch=2, least=0.4, out=tmp_path / "d.jsonl"
    )
    assert classify.classify(options, Planted()) == 0
    assert [(r["key"], r["scenario"]) for r in lines(tmp_path / "d.jsonl")] == [("a.png", "portrait")]
    (tmp_path / "r.jsonl").write_text(json.dumps({**record, "embedding_by": "opennsfw@1 float32"}) + "\n")
    with pytest.raises(ValueError, match="is by 'opennsfw', expected 'planted'"):
        classify.classify(options, Planted())


def test_clip_of_a_folder_embeds_both_sides(tmp_path):
    """A CLIP of random weights in the released layout: shapes, unit rows, and a folder that lacks a side."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    from train.data.zero_shot import Clip

    letters = [
        "<|startoftext|>",
        "<|endoftext|>",
        *[chr(c) for c in range(97, 123)],
        *[f"{chr(c)}</w>" for c in range(97, 123)],
    ]
    (tmp_path / "vocab.json").write_text(json.dumps({token: place for place, token in enumerate(letters)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")).save_pretrained(tmp_path)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **small,
            "vocab_size": len(letters),
            "max_position_embeddings": 32,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(tmp_path)
    size = {"shortest_edge": 32}
    CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    clip = Clip(tmp_path)
    images, texts = (
        clip.images([np.zeros((40, 60, 3), np.uint8), np.full((9, 9, 3), 200, np.uint8)]),
        clip.texts(["ab", "a c"]),
    )
    assert images.shape == texts.shape == (2, 8)
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([images, texts]), axis=1), 1, rtol=1e-5)
    assert np.abs(images[0] - images[1]).max() > 1e-3
    with pytest.raises(ValueError, match="expected a CLIP checkpoint"):
        Clip(tmp_path / "none")


# ------------------------------------------------------------------------------------------------ selection

NAMES, GRADES = list(BALANCED), [None, *range(9)]


def rows_of(count, seed=0):
    rng = random.Random(seed)
    return [
        {"key": f"k{n}", "file": f"k{n}.png", "scenario": rng.choice([*NAMES, "other", "unknown"]), "aesthetic": rng.choice(GRADES)}
        for n in range(count)
    ]  # fmt: skip


def test_the_best_of_each_scenario_in_any_order():
    rows = rows_of(600)
    found, asked, out = best(rows, 100, BALANCED, "scenario", "aesthetic")
    assert {name: len(own) for name, own in found.items()} == asked == dict.fromkeys(NAMES, 20)
    for name, own in found.items():
        scores = [row["aesthetic"] for row in own]
        every = sorted(
            (r["aesthetic"] for r in rows if r["scenario"] == name and r["aesthetic"] is not None), reverse=True
        )
        assert scores == every[:20]
    assert out["scenario other"] == sum(row["scenario"] == "other" for row in rows)
    assert out["no aesthetic"] == sum(row["scenario"] in NAMES and row["aesthetic"] is None for row in rows)
    mixed = rows_of(600)
    random.Random(5).shuffle(mixed)
    assert best(mixed, 100, BALANCED, "scenario", "aesthetic")[0] == found
    fewer, _, _ = best(rows, 50, BALANCED, "scenario", "aesthetic")
    assert all(fewer[name] == found[name][:10] for name in NAMES)


def test_subsets_are_nested_by_hash_alone():
    rows = rows_of(4000)
    large, small = list(subset(rows, 0.4)), list(subset(rows, 0.1))
    keys = [{key_of(row) for row in own} for own in (large, small)]
    assert keys[1] < keys[0]
    assert len(large) == pytest.approx(1600, rel=0.08)
    assert keys[0] == {key_of(row) for row in rows if fraction(row["key"]) < 0.4}
    quarter = {key_of(row) for row in large if "quarter" in row["subsets"]}
    half = {key_of(row) for row in large if "half" in row["subsets"]}
    assert quarter == keys[1]
    assert quarter < half < keys[0]
    assert len(half) == pytest.approx(800, rel=0.1)


def test_columns_come_from_other_lists(tmp_path):
    (tmp_path / "s.jsonl").write_text('{"key": "a", "aesthetic": 5, "scenario": null}\n{"key": "b", "aesthetic": 6}\n')
    rows = [{"key": "a", "scenario": "portrait", "embedding": b"00"}, {"file": "c"}]
    made = list(joined(rows, [tmp_path / "s.jsonl"], ("aesthetic", "scenario")))
    assert made == [{"key": "a", "scenario": "portrait", "aesthetic": 5}, {"file": "c"}]
    (tmp_path / "s.jsonl").write_text('{"key": "a"}\n{"key": "a"}\n')
    with pytest.raises(ValueError, match="the key 'a' is there twice"):
        list(joined(rows, [tmp_path / "s.jsonl"], ("aesthetic",)))
    with pytest.raises(ValueError, match="--rows: the key 'x' is there twice"):
        list(joined([{"key": "x"}, {"key": "x"}], [], ()))
    with pytest.raises(ValueError, match="neither key nor file"):
        list(joined([{"caption": "x"}], [], ()))


def test_the_command_writes_a_list_and_says_what_is_short(tmp_path, capsys):
    rows = [{**row, "caption": f"caption {row['key']}"} for row in rows_of(300, 2)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["select", "--rows", str(tmp_path / "r.jsonl"), "--out", str(tmp_path / "o.jsonl")]
    assert main([*command, "--total", "50"]) == 0
    made = lines(tmp_path / "o.jsonl")
    assert len(made) == 50
    assert {row["scenario"] for row in made} == set(NAMES)
    with pytest.raises(ValueError, match=r"rows of scenario 'portrait', expected 200; left out: .* with scenario"):
        main([*command, "--total", "1000"])
    assert main([*command, "--total", "1000", "--allow-short"]) == 0
    assert "too few of portrait" in capsys.readouterr().out
    shares = ["--shares", "portrait=0.75", "text-rich=0.25"]
    assert main([*command, "--total", "8", *shares]) == 0
    assert [row["scenario"] for row in lines(tmp_path / "o.jsonl")] == ["portrait"] * 6 + ["text-rich"] * 2
    assert main([*command, "--subset", "0.5"]) == 0
    assert {"full"} <= {name for row in lines(tmp_path / "o.jsonl") for name in row["subsets"]}
    with pytest.raises(ValueError, match="expected --total, --subset or both"):
        main(command)
    for words, message in (
        (["a=0.5"], "add up to 0.5"),
        (["a"], "expected VALUE=SHARE"),
        (["a=x"], "expected VALUE=SHARE"),
    ):
        with pytest.raises(ValueError, match=message):
            shares_of(words)


def test_rows_that_are_none_are_named(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"key": "a"}\nno\n')
    with pytest.raises(ValueError, match=r"r.jsonl, line 2: not valid JSON"):
        main(["select", "--rows", str(tmp_path / "r.jsonl"), "--subset", "1", "--out", str(tmp_path / "o.jsonl")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no .jsonl and no .parquet"):
        main(["select", "--rows", str(tmp_path / "empty"), "--subset", "1", "--out", str(tmp_path / "o.jsonl")])
