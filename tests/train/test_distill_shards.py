"""The command `distill` on shards, as the released recipe takes them: train, watch, resume, refuse, export."""

import json
from pathlib import Path

import pytest

from lens.formats.released import read_defaults
from train.__main__ import main
from train.loop.checkpoints import Checkpoints, read_state
from train.loop.trainer import ALONE

SHIPPED = Path(__file__).parents[2] / "lens" / "mini" / "base"
RECIPE = """
from train.configs.released.distill import *
BASES, ASPECTS, BATCH, SLOTS = (64,), ("1:1",), {64: 2}, 1
TAPS, HEAD_WIDTH, COMPUTE, RECOMPUTE, MU = (2, 4), 8, "float32", "none", 0.5
WATCH_EVERY, WATCHED, TEACHER_STEPS, GROUPS, GROUP = 1, 2, 1, 1, 2
FAKE_UPDATES, STUDENT_STEPS, LOG_EVERY, SAVE_EVERY = 1, 2, 1, 1
RULES = {"drift": (0.0, 1.0)}
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    (out / "recipe.py").write_text(RECIPE)
    command = "shards --world mini --bases 64 --aspects 1:1 --per-bucket 4 --precompute latents,text"
    for split in ("train", "held_out"):
        given = [*command.split(), "--split", split, "--model", str(SHIPPED), "--out", str(out / split)]
        assert main(given) == 0
    return out


def words(shards, out, *more):
    start = ["distill", "--config", str(shards / "recipe.py"), "--init", "mini-base", "--out", str(out)]
    return [*start, "--data", str(shards / "train"), *more]


def test_the_released_recipes_way_through_shards(shards, tmp_path, capsys):
    """One student step of another sampler, watched; one more; what would be another training is refused, and the export is of
    what was trained, not of what the command leaves out."""
    own = ["--validate", str(shards / "held_out"), "--set", "STUDENT_SAMPLER=renoise", "--set", "GRID=random"]
    assert main(words(shards, tmp_path, *own, "--steps", "1")) == 0
    capsys.readouterr()
    assert main(words(shards, tmp_path, *own, "--set", "FAKE_LR=1e-6", "--steps", "2")) == 0
    assert "FAKE_LR was 5e-07, is 1e-06" in capsys.readouterr().out
    state = Checkpoints(tmp_path / "checkpoints", ALONE).latest()
    assert (state.name, read_state(state)["settings"]["INIT"]) == ("step_0000004", "mini-base")
    with pytest.raises(ValueError, match="STUDENT_SAMPLER euler: this training has renoise"):
        main(words(shards, tmp_path, *own[:2], "--steps", "3"))
    with pytest.raises(ValueError, match="INIT mini-rl: this training has mini-base"):
        main(words(shards, tmp_path, *own, "--steps", "3", "--init", "mini-rl"))

    assert main(words(shards, tmp_path, "--export", str(tmp_path / "turbo"))) == 0
    defaults = read_defaults(tmp_path / "turbo", None, "turbo")
    assert (defaults.distilled.sampler, defaults.distilled.steps, defaults.distilled.grid) == ("renoise", 2, "random")
    made = json.loads((tmp_path / "turbo" / "recipe.json").read_text())["distill"]
    assert (made["STUDENT_SAMPLER"], made["STEP"]) == ("renoise", 4)
    assert "validation" not in json.loads((tmp_path / "turbo" / "model_index.json").read_text())["lens"]
    assert not (tmp_path / "turbo" / "scores.json").exists()  # the teacher's
    assert {path.name for path in (tmp_path / "turbo").glob("*.jsonl")} == {"distill.jsonl"}
    with pytest.raises(ValueError, match="GRID fixed: this training has random"):
        main(words(shards, tmp_path, "--set", "GRID=fixed", "--export", str(tmp_path / "turbo")))


def test_a_deaf_teacher_is_refused_without_held_out_shards_too(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("train.distill.LEAST_RESPONSE", 10.0)
    with pytest.raises(ValueError, match="this teacher does not respond to guidance"):
        main(words(shards, tmp_path, "--steps", "1"))
