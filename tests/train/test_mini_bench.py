"""Mini-Bench: its prompts, its numbers, and what it says where the reader is missing."""

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest

from train.data.small_world.kinds import CORE
from train.data.small_world.world import TASKS, World, is_held_out
from train.evaluate import mini_bench, ocr
from train.evaluate.detector import Detector
from train.evaluate.shape import Calibration
from train.evaluate.sources import Source, enlarged


def test_wilson():
    low, high = mini_bench.wilson(18, 20)
    assert (round(low, 3), round(high, 3)) == (0.699, 0.972)
    assert mini_bench.wilson(0, 10)[0] == 0.0
    assert mini_bench.wilson(10, 10)[1] == 1.0


def test_prompts_are_unseen_first_and_of_the_form_asked_for():
    for task in TASKS:
        scenes = mini_bench.scenes_of(task, 5)
        assert [s.task for s in scenes] == [task] * 5
        assert scenes == mini_bench.scenes_of(task, 5)
        assert scenes[:3] == mini_bench.scenes_of(task, 3)
        assert {t.kind for s in scenes for t in s.things} <= set(CORE)
        for scene in scenes:
            held = is_held_out([(t.kind, t.colour) for t in scene.things], scene.sign and scene.sign.text)
            assert held == (task != "single_object")
            assert scene.seed >= mini_bench.FIRST_SEED
            if task != "row":
                assert scene.style == "geneval"
                assert scene.caption.startswith("a photo of")
    assert {s.style for s in mini_bench.scenes_of("two_object", 3, style="dense")} == {"dense"}
    assert mini_bench.scenes_of("single_object", 1, side=96)[0].height == 96
    wide = mini_bench.scenes_of("single_object", 1, side=(64, 128))[0]
    assert (wide.height, wide.width) == (64, 128)


def test_text_scores_by_hand():
    assert ocr.edit_distance("kitten", "sitting") == 3
    assert ocr.edit_distance("", "abc") == 3
    assert ocr.cleaned("  Tea, 5!  ") == "Tea 5"
    assert ocr.same_text("TEA 5", "tea5")
    assert not ocr.same_text("TEA 5", "TEA S")
    # distances 0 and 1, one of two exact, 2 + 0 of 3 words read
    score = ocr.text_score([("TEA 5", "TEA 5"), ("OPEN", "0PEN")])
    assert score == pytest.approx({"ED": 0.5, "CR": 0.5, "WAC": 2 / 3, "score": 1 - 0.5 * 0.5 * (1 / 3) / 100})
    far = ocr.text_score([("A", "B" * 200)])
    assert far["score"] == 0.0  # ED is capped at 100
    assert ocr.text_score([("A B A", "A A C")])["WAC"] == pytest.approx(2 / 3)  # as a multiset
    with pytest.raises(ValueError, match="no asked word"):
        ocr.text_score([("!", "a")])


@pytest.mark.skipif(not ocr.available(), reason="needs lens[eval]")
def test_signs_are_read():
    world, reader, detector = World("train", {"text": 1.0}, captions="geneval"), ocr.Reader(), Detector.load()
    scenes = [world.scene(2_400_000_000 + i) for i in range(10)]
    pictures = [world.render(scene) for scene in scenes]
    judges = mini_bench.Judges(detector, CORE, reader)
    read = [judges.read(p, d) for p, d in zip(pictures, detector.look(pictures))]
    assert sum(ocr.same_text(s.sign.text, r) for s, r in zip(scenes, read)) >= 9, read
    assert reader.read(np.full((64, 64, 3), 200, np.uint8)) == ""
    with pytest.raises(ValueError, match="uint8"):
        reader.read(np.zeros((64, 64)))


def perfect(scenes):
    """A source that draws what was asked, except for the first prompt of every call; its VAE loses nothing."""
    by_prompt = {s.caption: World().render(s) for group in scenes.values() for s in group}

    def draw(prompts, seeds, guidance, size):
        pictures = [by_prompt[p] for p in prompts]
        return [np.zeros_like(pictures[0]), *pictures[1:]]

    return Source("perfect", 64, draw, lambda pictures: pictures, CORE, {"text_explains": 0.5})


def test_a_benchmark_of_known_pictures(tmp_path, capsys):
    few = CORE[:12]
    scenes = {task: mini_bench.scenes_of(task, 4, few) for task in ("colors", "position", "text")}
    options = argparse.Namespace(ceilings="with", guidance=[3.0], out=tmp_path, per_task=4)
    judges = mini_bench.Judges(Detector.load(), few, None)
    found = mini_bench.benchmark(perfect(scenes), judges, scenes, options)
    for task in ("colors", "position"):
        row = found["guidance"]["3"][task]
        assert row["score"] == 0.75
        assert row["marks"] == [False, True, True, True]
        assert row["audit"] == row["shape"] == 0.75
        assert row["soft"] == pytest.approx(0.75 * Calibration.load().soft(0, 0), abs=0.02)
        assert row["distance"] == pytest.approx(0.25, abs=0.01)  # nothing stands in the first picture
        assert found["ceilings"]["render"][task]["score"] == found["ceilings"]["vae"][task]["score"] == 1.0
        assert (tmp_path / f"{task}_g3.png").is_file()
    assert found["guidance"]["3"]["text"]["not_measured"] == "not measured: needs lens[eval]"
    assert "score" not in found["guidance"]["3"]["text"]
    printed = capsys.readouterr().out
    assert "text           not measured: needs lens[eval]" in printed
    assert "0.750 [0.301, 0.954]" in printed
    json.dumps(found)


def test_binding_has_eighty_prompts_and_counting_is_told_per_number():
    assert [mini_bench.images_per_task(t, 4) for t in ("color_attr", "counting")] == [80, 4]
    assert mini_bench.images_per_task("color_attr", 100) == 100
    scenes = mini_bench.scenes_of("counting", 12, CORE[:12])
    pictures = [World().render(s) for s in scenes]
    fewer = next(i for i, s in enumerate(scenes) if len(s.things) == 4)
    pictures[fewer] = World().render(replace(scenes[fewer], things=scenes[fewer].things[:3]))
    row = mini_bench.Judges(Detector.load(), CORE[:12], None, audit=False).score("counting", scenes, pictures)
    assert sum(e["pictures"] for e in row["numbers"].values()) == 12
    for number, entry in row["numbers"].items():
        asked = sum(len(s.things) == int(number) for s in scenes)
        wrong = number == "4"
        assert (entry["pictures"], entry["score"], entry["shape"]) == (asked, asked - wrong, asked - wrong)
    rows = {
        task: {"score": 1.0, "shape": 0.5, "soft": 0.25, "distance": i} for i, task in enumerate(mini_bench.GENEVAL)
    }
    assert mini_bench.means(rows) == {"score": 1.0, "shape": 0.5, "soft": 0.25, "distance": 2.5}
    assert mini_bench.means({**rows, "counting": {"not_measured": "x"}}) == {}


def test_sizes_are_scored_each_by_itself_and_enlarged_pictures_are_those_of_the_small_size(tmp_path, monkeypatch):
    asked = []

    def draw(prompts, seeds, guidance, size):
        asked.append(size)
        scenes = {s.caption: s for s in mini_bench.scenes_of("colors", 3, CORE, side=size)}
        return [World().render(scenes[p]) for p in prompts]

    source = Source("perfect", 64, draw, lambda pictures: pictures, CORE)
    monkeypatch.setattr(mini_bench, "from_pipeline", lambda model, steps: source)
    parser = argparse.ArgumentParser()
    mini_bench.add_arguments(parser)
    start = ["--model", "x", "--quick", "--tasks", "colors", "--per-task", "3", "--no-audit", "--ceilings", "none"]
    mini_bench.run(parser.parse_args([*start, "--sizes", "96x96", "64x128", "--out", str(tmp_path)]))
    found = json.loads((tmp_path / "scores.json").read_text())["sizes"]
    assert asked == [(96, 96), (64, 128)]
    assert [found[name]["guidance"]["3"]["colors"]["score"] for name in ("96x96", "64x128")] == [1.0, 1.0]
    assert (tmp_path / "64x128" / "colors_g3.png").is_file()
    for wrong in ("96", "96x100", "0x64"):
        with pytest.raises(SystemExit):
            parser.parse_args([*start, "--sizes", wrong])

    small = [np.random.default_rng(i).integers(0, 255, (64, 64, 3), np.uint8) for i in range(2)]
    seen = []
    once = Source("noise", 64, lambda p, s, g, size: seen.append(size) or small, lambda p: p, CORE)
    large = enlarged(once, 64).draw(["a", "b"], [0, 1], 3.0, (128, 128))
    assert seen == [(64, 64)]
    assert [p.shape for p in large] == [(128, 128, 3)] * 2
    assert np.abs(large[0].reshape(64, 2, 64, 2, 3).mean((1, 3)) - small[0]).mean() < 20  # the same picture
    with pytest.raises(ValueError, match=r"--enlarge 64: expected squares of at least 64 pixels, got 96x128"):
        enlarged(once, 64).draw(["a"], [0], 3.0, (96, 128))


def test_a_class_that_the_judge_does_not_know_is_an_error():
    with pytest.raises(ValueError, match="does not know"):
        mini_bench.Judges(Detector.load(), [*CORE, "dragonfruit"], None)
