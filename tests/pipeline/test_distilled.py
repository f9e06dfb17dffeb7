"""A distilled checkpoint: its metadata is obeyed and checked; what it was not trained for is warned of and done."""

import warnings
from pathlib import Path

import pytest

from lens.config import Defaults, Distilled
from lens.formats.files import CheckpointError
from lens.formats.released import check_sampler
from lens.request import Request
from lens.sampler import Scheduler

ABOUT = {"variant": "turbo", "distilled": {"sampler": "euler", "steps": 4, "grid": "fixed"}}


def test_the_metadata_says_how_the_student_was_trained():
    found = Defaults.choose(None, ABOUT, "x")
    assert (found.num_inference_steps, found.guidance_scale) == (4, 1.0)
    assert found.distilled == Distilled("euler", 4, "fixed")
    assert Defaults.choose("base", ABOUT, "x").distilled is None  # asked for as something else


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sampler": "ddim"}, r"lens.distilled.sampler must be one of \('euler', 'renoise'\), got 'ddim'"),
        ({"grid": 3}, r"lens.distilled.grid must be one of \('fixed', 'random'\), got 3"),
        ({"steps": True}, "lens.distilled.steps must be a positive integer, got True"),
        ({"more": 1}, "lens.distilled must be an object of sampler, steps, grid"),
    ],
)
def test_metadata_that_cannot_be_is_refused(change, words):
    about = {**ABOUT, "distilled": {**ABOUT["distilled"], **change}}
    with pytest.raises(ValueError, match=words):
        Defaults.choose(None, about, "x")


def test_a_scheduler_that_contradicts_the_student_is_refused():
    for sampler, noisy in (("euler", False), ("renoise", True)):
        defaults = Defaults("turbo", 4, 1.0, distilled=Distilled(sampler))
        check_sampler(Path("x"), defaults, Scheduler(stochastic_sampling=noisy))
        with pytest.raises(CheckpointError, match=f"stochastic_sampling must be {str(noisy).lower()}"):
            check_sampler(Path("x"), defaults, Scheduler(stochastic_sampling=not noisy))


@pytest.mark.parametrize(
    ("asked", "grid", "words"),
    [
        ({"guidance_scale": 3.0}, "fixed", "guidance 3: it has learned"),
        ({"guidance_scale": 3.0, "negative_prompt": "blur"}, "fixed", "guidance 3.*; a negative prompt$"),
        ({"negative_prompt": "blur"}, "fixed", "a negative prompt, which nothing reads at guidance 1"),
        ({"num_inference_steps": 8}, "fixed", "8 steps: it was trained on the times of 4"),
        ({"solver": "dpm2m"}, "random", "solver 'dpm2m'"),
        ({"num_inference_steps": 8}, "random", None),
        ({}, "fixed", None),
    ],
)
def test_what_a_student_was_not_trained_for_is_warned_of_and_done(asked, grid, words):
    defaults = Defaults("turbo", 4, 1.0, 64, distilled=Distilled(grid=grid))
    request = Request(prompt="a red apple", **asked)
    if words is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            request.resolved(defaults)
        return
    with pytest.warns(UserWarning, match=f"this checkpoint is distilled; .*{words}"):
        resolved = request.resolved(defaults)
    assert resolved.guidance_scale == asked.get("guidance_scale", 1.0)
    assert resolved.negative_prompt == [asked.get("negative_prompt", "")]


def test_the_released_turbo_warns_of_guidance_without_metadata():
    with pytest.warns(UserWarning, match="guidance 5"):
        Request(prompt="x", guidance_scale=5.0).resolved(Defaults("turbo", 4, 1.0, 64))
