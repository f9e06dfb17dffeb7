"""Lens-Eye: what ships judges true renders right and wrong prompts wrong; its training resumes bit for bit."""

import argparse
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.train.clocks import StopAfter
from train import configs, detector
from train.data.small_world.backdrops import backdrop
from train.data.small_world.kinds import KINDS, PALETTE
from train.data.small_world.world import World
from train.evaluate import geneval, oracle
from train.evaluate.copies import copies
from train.evaluate.detector import ASSET, SIGN, Detector, Targets, loss, overlap, without_overlaps
from train.evaluate.geneval import Detection
from train.loop.checkpoints import load_state, save_state

SEED = 2_300_000_000  # of no other test, benchmark or training


@pytest.fixture(scope="module")
def judge():
    return Detector.load()


@pytest.fixture(scope="module")
def questions():
    return oracle.Questions.draw(112, SEED)


def test_the_asset_is_small_and_knows_the_world(judge):
    assert ASSET.stat().st_size <= 2_000_000
    assert sum(p.numel() for p in judge.parameters()) <= 1_000_000
    assert set(judge.kinds) == {*KINDS, SIGN}
    assert judge.colours == tuple(PALETTE)


def test_true_renders_are_right_and_wrong_prompts_wrong(judge, questions):
    shares = oracle.measure(judge, questions)["shares"]
    assert shares["thing_class"] >= 0.97
    assert shares["thing_colour"] >= 0.97
    assert shares["true"] >= 0.95
    for how in oracle.FALSE:
        assert shares[how] >= 0.97, how


@pytest.mark.parametrize("size", [(96, 96), (64, 128)])
def test_other_buckets(judge, size):
    shares = oracle.measure(judge, oracle.Questions.draw(32, SEED, *size))["shares"]
    assert shares["thing_class"] >= 0.95
    assert shares["class"] >= 0.95


def test_planted_faults(judge):
    """What was asked disappears, changes colour, or comes once more: the verdict turns."""
    world, right = World("train", {"color_attr": 1.0}, captions="geneval"), 0
    scenes = [world.scene(SEED + i) for i in range(12)]
    for name, change in {
        "missing": lambda s: s.things[:1],
        "colours swapped": lambda s: tuple(replace(t, colour=o.colour) for t, o in zip(s.things, s.things[::-1])),
    }.items():
        pictures = [world.render(replace(s, things=change(s))) for s in scenes]
        wrong = [not geneval.judge(geneval.asked(s), d).right for s, d in zip(scenes, judge.look(pictures))]
        assert sum(wrong) >= 11, name
        right += sum(wrong)
    assert right >= 23
    empty = [backdrop(s.background, 0, 64, 64).astype(np.uint8) for s in scenes]
    assert not any(d.score > geneval.FOUND for found in judge.look(empty) for d in found)
    many = World("train", {"counting": 1.0}, captions="geneval")
    more = [s for s in (many.scene(SEED + i) for i in range(40)) if len(s.things) == 4][:6]
    fewer = [world.render(replace(s, things=s.things[:3])) for s in more]
    wrong = [not geneval.judge(geneval.asked(s), d).right for s, d in zip(more, judge.look(fewer))]
    assert sum(wrong) >= len(more) - 1


def test_a_picture_is_refused_with_its_shape(judge):
    with pytest.raises(ValueError, match="multiples of 16"):
        judge.look([np.zeros((60, 64, 3), np.uint8)])
    with pytest.raises(ValueError, match="uint8"):
        judge.look([np.zeros((64, 64, 3), np.float32)])
    with pytest.raises(FileNotFoundError, match="train detector"):
        Detector.load(ASSET.with_name("nothing.safetensors"))


def test_a_saved_judge_is_the_same(tmp_path, judge):
    path = tmp_path / "detector.safetensors"
    judge.save(path, {"step": 1})
    again = Detector.load(path)
    picture = World().render(World().scene(SEED))
    assert again.look([picture]) == judge.look([picture])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["detector.json", "detector.safetensors"]


def test_overlapping_boxes_of_a_class_are_one():
    box, near, far = (0, 0, 10, 10), (1, 0, 11, 10), (8, 0, 18, 10)
    assert overlap(box, near) == pytest.approx(9 / 11)
    found = [
        Detection("cat", 0.5, near),
        Detection("cat", 0.9, box),
        Detection("cat", 0.4, far),
        Detection("dog", 0.3, near),
    ]
    assert [(d.kind, d.score) for d in without_overlaps(found)] == [("cat", 0.9), ("cat", 0.4), ("dog", 0.3)]


def test_loss_by_hand():
    """One object in a 4x4 map of two classes; far from it the heat target is 0, at its cell 1."""
    targets = Targets(
        torch.tensor([0]),
        torch.tensor([1]),
        torch.tensor([-1]),
        torch.tensor([[1.25, 2.75]]),
        torch.tensor([[2.0, 3.0]]),
    )
    heat = torch.full((1, 2, 4, 4), -30.0)  # p = 0 everywhere: only the centre is wrong
    place, size, colour = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 4, 4)
    place[0, :, 2, 1] = torch.tensor([-0.25, 0.25])
    size[0, :, 2, 1] = torch.tensor([2.0, 3.0]).log()
    terms = loss((heat, place, size, colour), targets)
    assert terms["heat"].item() == pytest.approx(30.0, rel=1e-5)  # -(1-p)^2 log p = 30
    assert terms["class"].item() == pytest.approx(0.6931, rel=1e-3)  # two equal logits
    assert terms["colour"].item() == 0.0  # the object has none
    assert terms["box"].item() == pytest.approx(0.0, abs=1e-6)
    size[0, 0, 2, 1] += 0.5
    assert loss((heat, place, size, colour), targets)["box"].item() == pytest.approx(1.0, abs=1e-5)


def as_of_before_the_stage_was_renamed(folder):
    """What `python -m train eye` left behind in place of detector.pt."""
    state = load_state(folder / "detector.pt", "detector")
    assert state["ema_updates"].keys() == {"detector"}
    save_state(folder / "eye.pt", state | {"stage": "eye", "ema_updates": {"eye": state["ema_updates"]["detector"]}})
    (folder / "detector.pt").unlink()


def test_training_resumes_bit_for_bit(tmp_path, monkeypatch):
    config = configs.load("mini", "detector")
    small = argparse.Namespace(**{k: v for k, v in vars(config).items() if k.isupper()})
    small.BATCHES = ((0, ((64, 64, 3, 1.0),)), (1, ((64, 64, 3, 0.5), (64, 96, 2, 0.5))))
    small.VALIDATION, small.SHAPE = 2, {"widths": (8, 8, 16, 16), "blocks": (1, 1, 1), "neck": 16}
    for name, stops in (("whole", [3]), ("parts", [1, 2])):
        for stop in stops:
            monkeypatch.setattr(detector, "Clock", lambda _limit, stop=stop: StopAfter(stop))
            options = argparse.Namespace(
                out=tmp_path / name, vae=None, stop_after=None, steps=3, decay=None, init=None, device="cpu", workers=0
            )
            detector.train(small, options)
            if stop == 1:
                as_of_before_the_stage_was_renamed(tmp_path / name)
    assert not (tmp_path / "parts" / "detector.pt").exists()
    one, two = (load_state(detector.state_file(tmp_path / name).path, "detector") for name in ("whole", "parts"))
    assert one["step"] == two["step"] == 3
    for part in ("model", "ema"):
        first, second = one[part], two[part]
        pairs = (
            zip(first["average"].items(), second["average"].items())
            if part == "ema"
            else zip(first.items(), second.items())
        )
        assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs), part
    moments = [s["optimizer"]["exp_avg"] for s in (one, two)]
    assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])


def test_copies_keep_shape_and_differ():
    config = configs.load("mini", "detector")
    x = torch.from_numpy(World().batch([1, 2, 3, 4], 64, 96)[1]).permute(0, 3, 1, 2) / 127.5 - 1
    y = copies(x, config, 7, None)
    assert y.shape == x.shape
    assert y.abs().max() <= 1
    assert not torch.equal(x, y)
    assert torch.equal(y, copies(x, config, 7, None))
