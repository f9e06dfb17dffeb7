"""The two-sample judge: nothing where there is nothing, faults where they are, and a verdict between two of them."""

import numpy as np
import pytest
import torch

from train.data.small_world.backdrops import backdrop
from train.evaluate import student, two_sample
from train.loop.keys import keyed


def pictures(name, count, blur=0.0):
    """Coloured noise with a slope in it, uint8 [32, 32, 3] each; blur: the share of a picture that its neighbours make."""
    x = torch.randn(count, 32, 32, 3, generator=keyed(0, name)) * 40 + torch.linspace(60, 190, 32)[:, None]
    around = (x.roll(1, 1) + x.roll(-1, 1) + x.roll(1, 2) + x.roll(-1, 2)) / 4
    return list(((1 - blur) * x + blur * around).clamp(0, 255).byte().numpy())


@pytest.fixture(scope="module")
def found():
    """Features of true pictures, of others alike, and of two kinds that are blurred, one more than the other."""
    kinds = {"true": 0.0, "alike": 0.0, "soft": 0.04, "softer": 0.3}
    drawn = {name: pictures(name, 60, blur) for name, blur in kinds.items()}
    filters = two_sample.Patches(pictures("others", 60))
    return {name: filters(own) for name, own in drawn.items()}


def test_the_area_is_the_share_of_pairs_in_order():
    true, drawn = torch.tensor([0.1, 0.4, 0.4]), torch.tensor([0.4, 0.7])
    pairs = [(d > t).item() + 0.5 * (d == t).item() for t in true for d in drawn]
    assert two_sample.auc(true, drawn) == pytest.approx(np.mean(pairs))


def test_equal_kinds_are_not_told_apart_and_blurred_ones_are(found):
    values = {name: two_sample.auc(*two_sample.scores(found["true"], found[name])) for name in found}
    assert abs(values["alike"] - 0.5) < 0.12
    assert values["softer"] > 0.95
    assert values["alike"] < values["soft"] < values["softer"]
    with pytest.raises(ValueError, match="60 true and 9 drawn, expected as many, 10 or more"):
        two_sample.scores(found["true"], found["soft"][:9])


def test_a_student_fails_where_it_is_surely_told_better_than_its_teacher(found):
    worse = two_sample.compared(found["true"], found["soft"], found["softer"])
    assert worse.student - worse.teacher > two_sample.MOST
    assert 0 < worse.low < worse.student - worse.teacher < worse.high
    assert not worse.passes
    same = two_sample.compared(found["true"], found["soft"], found["soft"])
    assert same.low == same.high == same.student - same.teacher == 0
    assert same.passes
    assert two_sample.compared(found["true"], found["softer"], found["soft"]).passes


def test_backdrops_are_named_by_the_frame_and_their_shares_compared():
    shown = [backdrop(name, 0, 64, 64).astype(np.uint8) for name in ("checker", "snow")]
    for picture in shown:
        picture[8:56, 8:56] = (255, 0, 0)  # whatever stands there
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert student.backdrops([*shown, noise]) == ["checker", "snow", "none"]
    names = ["a", "a", "a", "b"]
    assert student.effective(names) == pytest.approx(np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))))
    assert student.largest_share(names, ["a", "b"]) == pytest.approx(1.5)
    assert student.largest_share(["c"], ["a"] * 10) == pytest.approx(1 / student.RARE)
