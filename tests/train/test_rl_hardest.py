"""Which prompts have something to teach: by the spread of their pictures' scores, as a step of the training draws and judges them."""

import numpy as np
import pytest

from tests.train.clocks import FOREVER, StopAfter
from tests.train.small_rl import PROMPTS, method_of, recipe
from train import rl
from train.__main__ import main
from train.data.prompts import read_prompts
from train.loop.clock import Interrupted
from train.rewards.judge import Scores
from train.rl_hardest import Difficulty, hardest, measured

SPREAD = {"prompt 0": 0.0, "prompt 1": 0.4, "prompt 2": 0.1, "prompt 3": 0.2, "prompt 4": 0.3}


class Wavering:
    """The pictures of every other slot score more than 1/2 by SPREAD, the next as much less. failing: this prompt is never judged."""

    def __init__(self, failing=""):
        self.failing, self.calls, self.sizes = failing, 0, []

    def score(self, prompts, rubrics, images):
        self.calls += 1
        score = np.array([0.5 + SPREAD[prompt] * (-1) ** self.calls for prompt in prompts], np.float32)
        self.sizes += [image.shape for image in images]
        valid = np.array([prompt != self.failing for prompt in prompts])
        table = np.repeat(score[:, None], len(rubrics[0]), 1)
        return Scores(np.where(valid, score, np.nan).astype(np.float32), valid, table, [[""] for _ in prompts])


def test_a_prompts_deviation_is_that_of_its_pictures_at_every_base():
    judge = Wavering()
    found = measured(method_of(recipe(BASES=(64, 128), ASPECTS=("1:1",)), judge=judge), FOREVER)
    assert [one.prompt.prompt for one in found] == list(SPREAD)
    np.testing.assert_allclose([one.deviation for one in found], list(SPREAD.values()), atol=1e-6)
    np.testing.assert_allclose([one.mean for one in found], 0.5, atol=1e-6)
    assert judge.sizes.count((64, 64, 3)) == judge.sizes.count((128, 128, 3)) == 3 * 2 * 4  # three steps' groups
    assert [prompt.prompt for prompt in hardest(found, 2)] == ["prompt 1", "prompt 4"]  # in the set's order
    assert found[1].row() == {"id": "p1", "prompt": "prompt 1", "mean": 0.5, "deviation": 0.4}


def test_prompts_that_cannot_be_judged_are_none_of_the_hardest():
    found = measured(method_of(recipe(), judge=Wavering("prompt 1")), FOREVER)
    assert [prompt.prompt for prompt in hardest(found, 2)] == ["prompt 3", "prompt 4"]
    assert found[1].row()["deviation"] is found[1].row()["mean"] is None
    with pytest.raises(ValueError, match="--hardest 5: 4 prompts could be judged"):
        hardest(found, 5)
    with pytest.raises(Interrupted, match="2 of 5 prompts are measured, nothing is written"):
        measured(method_of(recipe(), judge=Wavering()), StopAfter(0))


def test_the_command_writes_a_set_that_the_training_reads(tmp_path, monkeypatch):
    found = [Difficulty(prompt, 0.5, SPREAD[prompt.prompt]) for prompt in PROMPTS]
    monkeypatch.setattr(rl, "measured", lambda method, clock: found)
    monkeypatch.setattr(rl, "Clock", lambda limit: FOREVER)
    assert main(["rl", "--config", "mini", "--out", str(tmp_path), "--hardest", "2"]) == 0
    assert [prompt.id for prompt in read_prompts(tmp_path / "hardest.jsonl")] == ["p1", "p4"]
    assert len((tmp_path / "difficulty.jsonl").read_text().splitlines()) == 5
    assert not (tmp_path / "checkpoints").exists()
