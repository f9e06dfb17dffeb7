"""Rewards of the small world: rubrics that are read back, a judge that knows true from torn and wrong, groups that differ."""

import json

import numpy as np
import pytest

from train.data.prompts import read_prompts, subsets_of, write_prompts
from train.data.small_world.kinds import CORE
from train.data.small_world.world import World
from train.evaluate.detector import Detector
from train.rewards import diversity
from train.rewards.judge import Scores
from train.rewards.small_world import SmallWorldJudge
from train.rewards.small_world_rubrics import GLOBAL, SPECIFIC, parse, rubrics_of, sentence
from train.rewards.small_world_watch import SmallWorldWatch
from train.rl_prompts import FIRST_SEED, TASKS, prompt_of, scenes


@pytest.fixture(scope="module")
def asked():
    return scenes(30, CORE, {**TASKS, "row": 0.1, "text": 0.2}, FIRST_SEED)


@pytest.fixture(scope="module")
def detector():
    return Detector.load()


def test_rubrics_are_ten_and_read_back(asked):
    assert {scene.task for scene in asked} >= {"counting", "color_attr", "position", "text"}
    for scene in asked:
        own = rubrics_of(scene)
        assert len(own) == len(set(own)) == SPECIFIC
        assert [parse(sentence(rubric)) for rubric in own] == own
    assert parse(GLOBAL).check == "global"
    for other in ("Verify that the image shows a dragon.", "Is it nice?"):
        with pytest.raises(ValueError, match="expected a sentence"):
            parse(other)


def test_prompt_sets_are_read_as_written_and_subsets_are_nested(tmp_path, asked):
    prompts = [prompt_of(scene) for scene in asked]
    write_prompts(tmp_path / "p.jsonl", prompts)
    assert read_prompts(tmp_path / "p.jsonl") == prompts
    half, quarter = (read_prompts(tmp_path / "p.jsonl", subset) for subset in ("half", "quarter"))
    assert set(quarter) <= set(half) <= set(prompts)
    shares = [len([i for i in range(4000) if name in subsets_of(f"id-{i}")]) / 4000 for name in ("half", "quarter")]
    assert shares == pytest.approx([0.5, 0.25], abs=0.03)
    assert {p.sub_category for p in read_prompts(tmp_path / "p.jsonl", without=["counting", "attributes"])}.isdisjoint(
        {"counting", "colors", "color_attr"}
    )
    row = json.loads((tmp_path / "p.jsonl").read_text().splitlines()[0])
    (tmp_path / "few.jsonl").write_text(json.dumps({**row, "rubrics": row["rubrics"][:9]}) + "\n")
    with pytest.raises(ValueError, match=r"few.jsonl, line 1 \(mini-.*\): 9 rubrics, expected 10"):
        read_prompts(tmp_path / "few.jsonl")
    with pytest.raises(ValueError, match="--subset: 'third'"):
        read_prompts(tmp_path / "p.jsonl", "third")


def test_true_renders_score_above_torn_and_wrong_ones(asked, detector):
    judge = SmallWorldJudge(detector, CORE)
    chosen = [next(s for s in asked if s.task == task) for task in ("single_object", "color_attr", "position", "text")]
    pictures = [World().render(scene) for scene in chosen]
    torn = [picture.copy() for picture in pictures]
    for picture, scene in zip(torn, chosen):
        x0, y0, x1, y1 = scene.things[0].box
        picture[y0:y1:4, x0:x1] = picture[0, 0]
        picture[y0 + 1 : y1 : 4, x0:x1] = picture[0, 0]
    prompts, rubrics = [s.caption for s in chosen], [[*map(sentence, rubrics_of(s)), GLOBAL] for s in chosen]
    true, damaged = judge.score(prompts, rubrics, pictures), judge.score(prompts, rubrics, torn)
    other = judge.score(prompts, rubrics, [*pictures[1:], pictures[0]])
    assert true.valid.all()
    assert (true.score[:3] > 0.85).all()
    assert (true.score - damaged.score > 0.1).all()
    assert (true.per_rubric[:, -1] > damaged.per_rubric[:, -1]).all()  # the global rubric sees the shape
    assert (true.score - other.score > 0.2).all()
    unread = [i for i, text in enumerate(rubrics[3]) if "reads" in text]
    assert np.isnan(true.per_rubric[3, unread]).all()  # without a reader it is left out, not 0
    assert any(reason.startswith("not read") for reason in true.reasons[3])
    alone = judge.score(prompts[1:2], rubrics[1:2], pictures[1:2])
    assert alone.score[0] == true.score[1]
    assert 0 <= judge.score(["anything"], [[GLOBAL]], [pictures[0] // 9 * 9]).score[0] <= 1  # nothing is asked for
    look, fresh = judge.look(pictures[0]), SmallWorldJudge(detector, CORE).look(pictures[0])
    assert (look.backdrop, look.place) == (fresh.backdrop, fresh.place) == (chosen[0].background, look.place)


def test_the_independent_judge_knows_a_true_render(asked, detector):
    chosen = [s for s in asked if s.task == "single_object"][:1]
    watch = SmallWorldWatch(detector, CORE, chosen)
    (found,) = watch.independent([World().render(chosen[0])], [0])
    assert found["geneval"] == found["template"] == 1
    assert found["distance"] < 0.1
    assert watch.look(World().render(chosen[0])).backdrop == chosen[0].background


def test_a_group_is_paid_for_what_its_others_have_not():
    assert diversity.rarity(["a", "a", "b", None], [0] * 4).tolist() == pytest.approx([2 / 3, 2 / 3, 1, 0])
    assert diversity.rarity(["a", "a", "a", "b"], [0, 1, 1, 1]).tolist() == pytest.approx([0, 0.5, 0.5, 1])
    assert diversity.effective_number(["a", "b", "c", "c"]) == pytest.approx(2**1.5)
    flat, other = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 51, np.uint8)
    looks = [diversity.Look(None, None, diversity.thumbnail(p)) for p in (flat, other, flat)]
    assert diversity.spread(looks, [0, 0, 1]) == pytest.approx(0.2)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    assert diversity.sharpness(flat) == 0 < diversity.sharpness(noise)


def test_no_backdrop_and_no_place_earns_anything_by_itself():
    """Of many pictures effects are gone, of a few they are shrunk; a picture without a backdrop keeps its score."""

    def case(count):
        rng = np.random.default_rng(3)
        groups = [i // 8 for i in range(count)]
        backdrops = [("sky", "sand", "grey", "night")[i] for i in rng.integers(0, 4, count)]
        places = [("left", "right", "middle")[i] for i in rng.integers(0, 3, count)]
        skill, worth = rng.normal(size=count), {"sky": 0.0, "sand": 3.0, "grey": -2.0, "night": 1.0}
        own = skill + rng.normal(size=count // 8)[groups]
        score = own + [worth[name] for name in backdrops] + 2.0 * (np.array(places) == "left")
        return groups, backdrops, places, own, score

    def left(fair, groups, values):  # of every value, the sum over its pictures, by picture
        rest = fair - np.bincount(groups, fair)[groups] / 8
        return np.array([rest[np.array(values) == value].mean() for value in sorted(set(values))])

    groups, backdrops, places, _, score = case(9600)
    fair = diversity.neutral(score, np.ones(9600, bool), groups, [backdrops, places])
    for values in (backdrops, places):
        assert np.abs(left(score, groups, values)).min() > 0.3
        np.testing.assert_allclose(left(fair, groups, values), 0, atol=0.02)
    groups, backdrops, places, _, score = case(96)
    valid = np.ones(96, bool)
    whole = diversity.neutral(score, valid, groups, [backdrops, places], 0.0)
    for values in (groups, backdrops, places):
        np.testing.assert_allclose(left(whole, groups, values), 0, atol=1e-9)
    fair = diversity.neutral(score, valid, groups, [backdrops, places])
    assert np.abs(left(fair, groups, backdrops)).max() < np.abs(left(score, groups, backdrops)).max() / 2
    np.testing.assert_allclose(fair.mean(), score.mean())
    torn = np.zeros(8)  # one of a few
    torn[0] = -1.0
    some = diversity.neutral(torn, np.ones(8, bool), [0] * 8, [["sky"] * 4 + ["sand"] * 4])
    assert some[0] < -0.9
    assert some[1:].max() < 0.05

    unknown, failed = [None, *backdrops[1:]], np.array([True, False] + [True] * 94)
    score[1] = np.nan
    some = diversity.neutral(score, failed, groups, [unknown])
    assert some[0] == score[0]
    assert np.isnan(some[1])
    assert np.isfinite(some[2:]).all()
    ones = np.ones(96)
    np.testing.assert_allclose(diversity.neutral(ones, valid, groups, [backdrops, [None] * 96]), ones)
    assert diversity.neutral(score, failed, groups, []) is not score
    np.testing.assert_array_equal(diversity.neutral(score, failed, groups, []), score)


@pytest.mark.parametrize(
    ("score", "valid", "words"),
    [
        ([0.5, np.nan], [True, True], "finite score"),
        ([0.5, 1.5], [True, True], r"in \[0, 1\]"),
        ([0.5], [True], "expected float32"),
    ],
)
def test_scores_that_break_the_contract_are_refused(score, valid, words):
    with pytest.raises(ValueError, match=words):
        Scores(np.array(score, np.float32), np.array(valid), np.zeros((2, 3), np.float32), [[], []])
