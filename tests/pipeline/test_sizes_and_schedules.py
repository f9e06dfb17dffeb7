"""Buckets, ratios and sizes; mu, sigmas and the rounding of time: numbers, not code."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch

import lens.sampler
from lens import resolution
from lens.formats.released import released_scheduler, scheduler_config
from lens.sampler import Scheduler, conditioning_time
from tests.reference_model import reference_sigmas

# (height, width) of every bucket: the paper's 27, and those of 1440
BUCKETS = {
    512: {
        "1:2": (704, 352), "9:16": (672, 384), "2:3": (640, 416), "3:4": (608, 448), "1:1": (512, 512),
        "4:3": (448, 608), "3:2": (416, 640), "16:9": (384, 672), "2:1": (352, 704),
    },
    768: {
        "1:2": (1088, 544), "9:16": (1024, 576), "2:3": (960, 640), "3:4": (896, 672), "1:1": (768, 768),
        "4:3": (672, 896), "3:2": (640, 960), "16:9": (576, 1024), "2:1": (544, 1088),
    },
    1024: {
        "1:2": (1472, 736), "9:16": (1376, 768), "2:3": (1248, 832), "3:4": (1152, 864), "1:1": (1024, 1024),
        "4:3": (864, 1152), "3:2": (832, 1248), "16:9": (768, 1376), "2:1": (736, 1472),
    },
    1440: {
        "1:2": (2080, 1040), "9:16": (1936, 1088), "2:3": (1760, 1168), "3:4": (1616, 1216), "1:1": (1440, 1440),
        "4:3": (1216, 1616), "3:2": (1168, 1760), "16:9": (1088, 1936), "2:1": (1040, 2080),
    },
}  # fmt: skip


@pytest.mark.parametrize("base", BUCKETS)
def test_released_buckets(base):
    assert {ratio: resolution.bucket_size(base, ratio) for ratio in BUCKETS[base]} == BUCKETS[base]


@pytest.mark.parametrize("base", [64, 96, 128, 512, 768, 1024, 1440])
@pytest.mark.parametrize("ratio", ["5:4", "6:7", "1:2", "2:1", "16:9", "1:1", "1.85:1", "7:11"])
def test_other_ratios_follow_the_formula(base, ratio):
    h, w = resolution.bucket_size(base, ratio)
    assert h % 16 == w % 16 == 0
    if ratio in BUCKETS.get(base, {}):
        return
    stretch = math.sqrt(float(ratio.split(":")[1]) / float(ratio.split(":")[0]))
    assert h == max(16, 16 * math.floor(base * stretch / 16 + 0.5))
    assert w == max(16, 16 * math.floor(base / stretch / 16 + 0.5))


def test_spellings_of_one_ratio():
    assert resolution.bucket_size(1024, "2:4") == resolution.bucket_size(1024, "0.5:1") == (1472, 736)
    assert resolution.bucket_size(1440, "32 : 18") == (1088, 1936)
    assert resolution.bucket_size(1024, "5:4") == (912, 1152)
    assert resolution.bucket_size(64, "1:1") == (64, 64)


@pytest.mark.parametrize("ratio", ["", "1", "1:0", "0:1", "a:b", "1:2:3", "nan:1", "inf:1", "3:1", "1:2.01", 1.5])
def test_impossible_ratios(ratio):
    with pytest.raises(ValueError, match="aspect_ratio must"):
        resolution.bucket_size(1024, ratio)


@pytest.mark.parametrize("base", [0, 100, 2048, "1024", None, 1024.5])
def test_unknown_bases(base):
    with pytest.raises(ValueError, match=r"base_resolution must be one of \(512, 768, 1024, 1440\)"):
        resolution.bucket_size(base, "1:1")


def test_every_multiple_of_16_between_1_2_and_2_1():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for h in range(16, 1473, 112):
            for w in range(-(-h // 32) * 16, min(2 * h, 1472 * 736 // h) + 1, 112):
                grids = resolution.request_grids(1, h, w, None, None, None, 1024, 1440)
                assert grids == [(h // 16, w // 16)]
    for h, w in ((1440, 1440), (1040, 1056)):  # nothing between 1024^2 and 1440^2 was trained
        with pytest.warns(
            UserWarning, match=f"{h}x{w} is above 1024x1024, the largest base Lens was trained at; it is shown"
        ):
            resolution.request_grids(1, h, w, None, None, None, 1024, 1440)
    with pytest.warns(
        UserWarning, match="height 1440, width 1456 is larger than the largest size this model is shown to work at"
    ):
        resolution.request_grids(1, 1440, 1456, None, None, None, 1024, 1440)
    with pytest.warns(UserWarning, match="height 32, width 80 lies outside"):
        resolution.request_grids(1, 32, 80, None, None, None, 1024, 1440)


@pytest.mark.parametrize(
    ("tokens", "steps", "value"), [(4096, 20, 2.198), (4096, 4, 2.291), (8100, 20, 1.828), (8100, 4, 1.828)]
)
def test_mu(tokens, steps, value):
    assert lens.sampler.mu(tokens, steps) == pytest.approx(value, abs=5e-4)


def test_mu_is_the_fit_at_10_and_200_steps():
    for tokens in (1, 16, 4096, 4300):
        assert lens.sampler.mu(tokens, 10) == pytest.approx(8.73809524e-5 * tokens + 1.89833333, abs=1e-9)
        assert lens.sampler.mu(tokens, 200) == pytest.approx(1.6927e-4 * tokens + 0.45666666, abs=1e-9)
    assert lens.sampler.mu(4301, 10) == lens.sampler.mu(4301, 200)


@pytest.mark.parametrize("tokens", [1, 16, 64, 1024, 4096, 4300, 4301, 8100])
@pytest.mark.parametrize("steps", [1, 2, 4, 20, 50, 999])
def test_sigmas(tokens, steps):
    sigmas = lens.sampler.sigmas(tokens, steps)
    assert sigmas.dtype == torch.float32
    assert sigmas.shape == (steps + 1,)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    from diffusers import FlowMatchEulerDiscreteScheduler  # what the released pipeline asks

    oracle = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    oracle.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=lens.sampler.mu(tokens, steps))
    torch.testing.assert_close(sigmas, oracle.sigmas, rtol=0, atol=2e-7)
    torch.testing.assert_close(1000 * sigmas[:-1], oracle.timesteps, rtol=0, atol=2e-4)
    if steps <= 50:  # in float64
        torch.testing.assert_close(sigmas, reference_sigmas(tokens, steps), rtol=0, atol=2e-7)
    assert torch.equal(sigmas, scheduler_config({"use_dynamic_shifting": True, "shift": 9.0}).sigmas(tokens, steps))


def test_scheduler_of_the_release():
    from tests.small_pipeline import FOLDER

    config = json.loads((FOLDER / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler_config(config) == Scheduler(True, 3.0, False)
    assert scheduler_config(config | {"stochastic_sampling": True}) == Scheduler(True, 3.0, True)
    assert scheduler_config({}) == Scheduler(False, 1.0, False)
    for scheduler in (Scheduler(), Scheduler(False, 1.5, True)):
        assert scheduler_config(released_scheduler(scheduler)) == scheduler


def test_time_is_rounded_twice():
    sigmas = lens.sampler.sigmas(4096, 20)[:-1]
    twice = conditioning_time(sigmas, torch.bfloat16)
    by_hand = ((1000 * sigmas).to(torch.bfloat16) / 1000).to(torch.bfloat16).float()
    assert torch.equal(twice, by_hand)
    once = [sigmas.to(torch.bfloat16).float(), ((1000 * sigmas).to(torch.bfloat16).float() / 1000)]
    assert all((twice != o).any() for o in once)
    assert int((twice != once[0]).sum()) == 5  # of 20 steps
    assert torch.equal(conditioning_time(sigmas, torch.bfloat16, "float32"), sigmas)
    torch.testing.assert_close(conditioning_time(sigmas, torch.float32), sigmas, rtol=2e-7, atol=0)
    with pytest.raises(ValueError, match="time_dtype must be 'reference' or 'float32'"):
        conditioning_time(sigmas, torch.float32, "bfloat16")
