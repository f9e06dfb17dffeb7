"""Ablations: attributes by hand, the same images for every arm, rounds that resume, paired verdicts, the page."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from train import ablate, configs
from train.ablations import arms as frame
from train.ablations.arms import Arm, Asked, Results
from train.ablations.attributes import accuracy, marks
from train.data.small_world.scene import Scene, Thing
from train.data.small_world.world import World
from train.evaluate.geneval import Detection
from train.evaluate.mini_bench import scenes_of


def scene(*things, relation=None):
    return Scene(1, "train", "colors", 64, 64, "meadow", 0, relation, tuple(things), None, "a caption", "dense", "en")


def test_attributes_of_one_object_by_hand():
    (asked,) = scenes_of("single_object", 1)
    (thing,) = asked.things
    true = World().render(asked)
    box = tuple(map(float, thing.box))
    right = marks(asked, true, [Detection(thing.kind, 0.9, box, thing.colour)])
    assert {name: values for name, values in right.items() if values} == {
        "class": [True], "colour": [True], "size": [True], "place": [True], "background": [True],
    }  # fmt: skip
    # of another colour, in a corner and small; a surer box of another class does not stand for it
    seen = [Detection("nothing", 0.99, box, "red"), Detection(thing.kind, 0.5, (0.0, 0.0, 12.0, 12.0), "no colour")]
    spoilt = marks(asked, np.zeros_like(true), seen)
    assert (spoilt["class"], spoilt["colour"], spoilt["size"], spoilt["place"]) == ([True], [False], [False], [False])
    none = marks(asked, true, [Detection(thing.kind, 0.3, box, thing.colour)])  # not above 0.3
    assert [none[name] for name in ("class", "colour", "size", "place")] == [[False]] * 4


def test_attributes_of_two_objects_by_hand():
    asked = scene(Thing("car", "blue", (2, 20, 30, 40)), Thing("car", "red", (34, 20, 62, 40)), relation="left")
    picture = np.zeros((64, 64, 3), np.uint8)
    blue, red = Detection("car", 0.9, (2, 20, 30, 40), "blue"), Detection("car", 0.8, (34, 20, 62, 40), "red")
    both = marks(asked, picture, [red, blue])
    assert (both["class"], both["colour"], both["relation"]) == ([True, True], [True, True], [True])
    one = marks(asked, picture, [blue])  # a box stands for one object
    assert (one["class"], one["colour"], one["relation"], one["size"]) == ([True, False], [True, False], [False], [])


def test_accuracy_by_hand():
    every = [
        {"class": [True, False], "colour": [False], "size": [], "place": [], "relation": [], "background": [True]},
        {"class": [True], "colour": [], "size": [], "place": [], "relation": [], "background": [True]},
    ]
    found = accuracy(every)
    assert found == {"class": 2 / 3, "colour": 0.0, "background": 1.0, "all": (2 / 4 + 2 / 2) / 2}


def small(*changes):
    return configs.override(
        configs.load("mini", "ablate"), ["POOL.chunk=12", "VALIDATION=4", "COMPILED=False", *changes]
    )


def encoded(config, read=None):
    """Scenes whose "features" are a caption's letters, and whose "latents" are pixels."""
    letters = read or (lambda texts: [torch.tensor([[float(ord(c))] for c in text]) for text in texts])
    return frame.EncodedScenes(config, range(100, 112), lambda pixels: pixels.float().flatten(1)[:, None], letters)


def test_arms_see_the_same_images_with_other_captions():
    scenes, arms = encoded(small()), configs.load("mini", "ablate").ARMS
    parts = {name: scenes.part(shares) for name, shares in arms.items()}
    brief, detailed, mixed = parts.values()
    for other in (detailed, mixed):
        assert torch.equal(brief.latents, other.latents)
    styles = scenes.styles(arms["mixed"])
    assert set(styles) == {"brief", "dense"}
    for row, style in enumerate(styles):  # the very captions of the other arms
        source, length = (brief if style == "brief" else detailed), mixed.lengths[row]
        assert length == source.lengths[row]
        assert torch.equal(mixed.features[row, :length], source.features[row, :length])
        assert not mixed.features[row, length:].any()
    assert mixed.features.shape[1] % 8 == 0
    assert brief.lengths.float().mean() * 2 < detailed.lengths.float().mean()
    world = World("train", small().TASKS, small().CLASSES, "dense")
    said = "".join(chr(int(v)) for v in detailed.features[3, : detailed.lengths[3], 0])
    assert said == world.scene(103, 64, 64).caption


def test_a_caption_is_read_once_for_all_arms():
    read = []

    def letters(texts):
        read.extend(texts)
        return [torch.zeros(len(text), 1) for text in texts]

    scenes = encoded(small(), letters)
    for shares in configs.load("mini", "ablate").ARMS.values():
        scenes.part(shares)
    assert len(read) == 2 * 12
    assert scenes.part({"brief": 1.0}) is scenes.part({"brief": 1.0})
    assert len(read) == 2 * 12


def test_shares_of_captions_are_met():
    scenes = frame.EncodedScenes(small(), range(4000), None, None)
    drawn = scenes.styles({"brief": 0.5, "dense": 1.0, "geneval": 0.5})
    assert [drawn.count(style) / 4000 for style in ("brief", "dense", "geneval")] == pytest.approx(
        [0.25, 0.5, 0.25], abs=0.03
    )
    assert drawn == scenes.styles({"brief": 0.5, "dense": 1.0, "geneval": 0.5})


class Fake:
    """In place of an ArmTraining: detailed images are right from step 20 on; a clock is over after some advances."""

    def __init__(self, arm, seed, out, left):
        self.arm, self.seed, self.out, self.left = arm, seed, out, left
        self.trainer = argparse.Namespace(step=0)

    def advance(self, steps):
        if not self.left[0]:
            return False
        self.left[0] -= 1
        self.trainer.step = steps
        return True

    def draw(self, scenes):
        good = self.arm.name == "detailed" and self.trainer.step >= 20
        return [World().render(s) if good else np.zeros((64, 64, 3), np.uint8) for s in scenes]


def rounds(tmp_path, left, settings=None):
    results = Results(tmp_path / "results.json", settings or {"a": 1})
    asked = [Asked("dense", scenes_of("single_object", 4, style="dense"))]
    arms = [Arm(name, {name: 1.0}, Path("v"), None) for name in ("brief", "detailed")]
    clock = argparse.Namespace(over=False)
    for arm in arms:
        for seed in (0, 1):
            (tmp_path / f"{arm.name}_s{seed}").mkdir(exist_ok=True)

    def make(arm, seed):
        return Fake(arm, seed, tmp_path / f"{arm.name}_s{seed}", left)

    return frame.run_rounds(make, arms, (0, 1), (10, 20), asked, results, clock), results


def test_rounds_end_by_the_clock_and_go_on(tmp_path, capsys):
    done, results = rounds(tmp_path, [5])
    assert not done
    assert len(results.rows) == 5
    assert frame.common_step(results, ("brief", "detailed"), (0, 1)) == 10
    done, results = rounds(tmp_path, [9])
    assert done
    assert [(r["step"], r["seed"], r["arm"]) for r in results.rows] == [
        (t, s, a) for t in (10, 20) for s in (0, 1) for a in ("brief", "detailed")
    ]
    assert frame.common_step(results, ("brief", "detailed"), (0, 1)) == 20
    said = capsys.readouterr().out
    assert "detailed, seed 1, step 20: attribute accuracy by prompts dense 1.000" in said
    told = ablate.summary(results, ["brief", "detailed"], [0, 1], {"dense": range(4)}, tmp_path)
    assert told[0].startswith("detailed against brief at step 20, 2 seeds: +")
    assert told[0].endswith("better")
    assert told[1] == ablate.NOTE
    page = (tmp_path / "index.html").read_text()
    assert "over scenes at these seeds, not over seeds" in page
    assert page.count("<polygon") == 4  # two arms, all prompts and dense ones
    found = json.loads((tmp_path / "verdict.json").read_text())
    assert (found["step"], len(found["rows"])) == (20, 8)
    assert found["rows"][-1]["scores"]["dense"] == {
        k: v for k, v in results.rows[-1]["scores"]["dense"].items() if k != "each"
    }
    assert (tmp_path / "curves.svg").read_text().count("<polyline") == 2
    with pytest.raises(ValueError, match=r"of another ablation \(a differ\)"):
        rounds(tmp_path, [9], {"a": 2})


def test_the_schedule_of_an_arm_ends_with_its_steps(monkeypatch, tmp_path):
    """More steps than the recipe's once went on at rate 0."""
    planned = []

    def make(recipe, config, arm, seed, out, clock):
        planned.append(config.STEPS)
        return Fake(arm, seed, out, [0])

    monkeypatch.setattr(ablate, "ArmTraining", make)
    monkeypatch.setattr(ablate, "summary", lambda *_: [])
    parser = argparse.ArgumentParser()
    ablate.add_arguments(parser)
    for given, expected in (([], configs.load("mini", "ablate").STEPS), (["--steps", "6000"], 6000)):
        planned.clear()
        ablate.run(parser.parse_args(["captions", "--out", str(tmp_path), "--per-task", "1", *given]))
        assert set(planned) == {expected}


def test_a_verdict_is_paired_over_seeds_and_images(tmp_path):
    results = Results(tmp_path / "r.json", {})
    rng = np.random.default_rng(0)
    for seed in (0, 1):
        base = rng.uniform(0, 0.5, 50)
        for arm, gain in (("one", 0.2), ("two", 0.0), ("three", 0.0)):
            noise = rng.normal(0, 0.1, 50) if arm == "three" else 0.0
            results.add(arm, seed, 5, {"p": {"all": 0.0, "each": list(base + gain + noise)}})
    # a constant gain has no spread at all: what differs from image to image is no noise where it is paired
    prompts = {"p": range(50)}
    assert frame.difference(results, "one", "two", (0, 1), 5, prompts) == pytest.approx((0.2, 0.2, 0.2))
    middle, low, high = frame.difference(results, "three", "two", (0, 1), 5, prompts)
    assert low < 0 < high
    assert abs(middle) < 0.05
    assert ablate.verdict(results, ["two", "three"], [0, 1], 5, prompts)[0].endswith("not told apart")


def test_more_seeds_and_languages_of_the_same_scenes_do_not_narrow_an_interval(tmp_path):
    """Where images of a scene are all alike, they say no more than one of them."""
    results, each = Results(tmp_path / "r.json", {}), np.random.default_rng(0).normal(0, 0.3, 40)
    for seed in (0, 1):
        for arm, own in (("one", each), ("two", 0 * each)):
            results.add(
                arm, seed, 5, {p: {"each": list(own)} for p in ("en", "zh", "fr")} | {"de": {"each": list(own[::-1])}}
            )
    alone = frame.difference(results, "one", "two", (0,), 5, {"en": range(40)})
    scenes = dict.fromkeys(("en", "zh", "fr"), range(40)) | {
        "de": range(39, -1, -1)
    }  # told apart by name, not by place
    assert frame.difference(results, "one", "two", (0, 1), 5, scenes) == pytest.approx(alone)
    assert alone[2] - alone[1] == pytest.approx(2 * 1.96 * each.std() / 40**0.5, rel=0.1)


def test_a_scene_is_the_same_in_every_style_and_task():
    one, two = (frame.asked_of(style, 12, small()) for style in ("dense", "geneval"))
    shared = [
        (s, t)
        for s, name in zip(one.scenes, one.pictures)
        for t, other in zip(two.scenes, two.pictures)
        if name == other
    ]
    assert len(shared) > 50
    assert all((s.things, s.background) == (t.things, t.background) for s, t in shared)
    assert any(s.task != t.task for s, t in shared)


def test_other_weights_under_the_same_name_are_another_ablation(tmp_path):
    state, text = tmp_path / "vae" / "codec.pt", tmp_path / "base" / "text_encoder" / "model.safetensors"
    for path in (state, text, tmp_path / "base" / "tokenizer" / "tokenizer.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("one")
    arm = Arm("a", {}, tmp_path / "vae", tmp_path / "base")
    first = arm.weights
    Results(tmp_path / "r.json", {"weights": {"a": first}}).add("a", 0, 1, {})
    (tmp_path / "vae" / "log.jsonl").write_text("which are no weights")
    (tmp_path / "base" / "scores.json").write_text("{}")
    assert arm.weights == first
    text.write_text("two")
    assert (arm.weights[0] == first[0], arm.weights[1] == first[1]) == (True, False)
    state.write_text("two")
    assert arm.weights[0] != first[0]
    assert Arm("a", {}, tmp_path / "vae", None).weights == [arm.weights[0], None]
    assert Arm("a", {}, tmp_path / "vae", state).weights[1] is not None  # a state file of the encoder stage
    with pytest.raises(ValueError, match=r"of another ablation \(weights differ\)"):
        Results(tmp_path / "r.json", {"weights": {"a": arm.weights}})
    (tmp_path / "r.json").write_text('{"settings": {}, "rows": []}')  # as it was once
    Results(tmp_path / "r.json", {"weights": {"a": arm.weights}})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--vaes", "a=x"], "at least two NAME=PATH"),
        (["--vaes", "a=x", "a=y"], "different names"),
        (["--vaes", "a=nowhere", "b=here"], "no such file or folder: nowhere"),
    ],
)
def test_arms_that_cannot_be_told_apart(given, message):
    parser = argparse.ArgumentParser()
    ablate.add_arguments(parser)
    options = parser.parse_args(["vae", *given])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ablate.arms_of(options, configs.load("mini", "ablate"), configs.load("mini", "world"))


def test_encoder_arms_are_scored_in_five_languages():
    parser = argparse.ArgumentParser()
    ablate.add_arguments(parser)
    options = parser.parse_args(["encoder", "--per-task", "2"])
    config, world = configs.load("mini", "ablate"), configs.load("mini", "world")
    shipped, random = ablate.arms_of(options, config, world)
    assert (shipped.encoder, random.encoder) == (ablate.BASE, None)
    assert set(shipped.captions) == {"brief", "dense"}  # English alone
    asked = ablate.asked(options, config)
    assert {a.name for a in asked} == {"en", "zh", "fr", "ja", "es"}
    assert len({tuple(s.seed for s in a.scenes) for a in asked}) == 1  # the same scenes
    assert len({a.scenes[0].caption for a in asked}) == 5


def test_rl_arms_are_nested_and_one_is_without_text(tmp_path, monkeypatch):
    from train import rl
    from train.data.prompts import Prompt, subsets_of, write_prompts

    def prompts(*categories):
        rows = [Prompt(str(k), c, "s", "i", (), "p", ("r",) * 10, subsets_of(str(k))) for k, c in enumerate(categories)]
        write_prompts(tmp_path / "p.jsonl", rows)
        return tmp_path / "p.jsonl"

    asked: list = []
    monkeypatch.setattr(rl, "run", lambda options: asked.append(options) or 0)
    parser = argparse.ArgumentParser()
    ablate.add_arguments(parser)
    given = [
        "rl_data",
        "--prompts",
        str(prompts("text", "animals", "text")),
        "--out",
        str(tmp_path),
        "--rl",
        "--stop-after 5m",
    ]
    assert ablate.run(parser.parse_args(given)) == 0
    assert [(o.subset, o.without) for o in asked] == [("quarter", []), ("half", []), ("full", []), ("full", ["text"])]
    assert {o.stop_after for o in asked} == {300.0}
    assert len({o.out for o in asked}) == 4
    prompts("animals")
    with pytest.raises(ValueError, match="no prompt of category 'text'"):
        ablate.run(parser.parse_args(given))


@pytest.mark.nightly
def test_an_arm_learns_and_resumes(tmp_path):
    """A real one, of one block: 12 steps at once, and with a break; another seed is another training; the loss falls."""
    config = small(
        "POOL.chunk=64", "VALIDATION=16", "MODEL.num_layers=1", "MODEL.num_attention_heads=1", "WARMUP=2", "LR=1e-2",
        "LOG_EVERY=6", "VALIDATE_EVERY=6", "EMA=0.5", "GEMM=float32", "SHEET.steps=2",
    )  # fmt: skip
    arm = Arm("brief", {"brief": 1.0}, ablate.BASE / "vae", ablate.BASE)

    def training(name, seed=0):
        clock = argparse.Namespace(asked=False, over=False, elapsed=0.0)
        return frame.ArmTraining("mini", config, arm, seed, tmp_path / name, clock)

    def weights(one):
        return torch.cat([p.detach().flatten() for p in one.model.parameters()])

    whole, other = training("a"), training("c", seed=1)
    assert not torch.equal(weights(whole), weights(other))
    assert whole.advance(12)
    assert training("b").advance(6)
    again = training("b")
    assert again.trainer.step == 6
    assert again.advance(12)
    assert torch.equal(weights(whole), weights(again))
    rows = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    losses = [row["validation"] for row in rows if "validation" in row]
    assert losses[-1] < losses[0]
    scenes = scenes_of("colors", 3)
    pictures = whole.draw(scenes)
    assert [p.shape for p in pictures] == [(64, 64, 3)] * 3
    assert np.array_equal(pictures, again.draw(scenes))
    learned = weights(whole)
    whole.draw(scenes)  # by the averages, which go away again
    assert torch.equal(weights(whole), learned)
