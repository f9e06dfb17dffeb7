"""A step as one call (csrc/cuda/denoise_step.*) on a device of compute capability 9.0: a model of tile size first, then
two blocks of the released width."""

from __future__ import annotations

import concurrent.futures
import copy
import statistics
import time

import pytest
import torch
from torch import Tensor

from lens import LensConfig, LensTransformer2DModel
from lens.engine.denoise_step_buffers import DenoiseStep
from lens.engine.graphs import CudaDriver
from lens.engine.step import why_not
from lens.ops import backend
from lens.ops.attention import choice as attention_choice
from lens.ops.denoise_step import OWN_ATTENTION
from lens.ops.linear import choice as linear_choice
from tests.emulation import test_denoise_step as steps
from tests.emulation.test_denoise_step import CONFIG, SAMPLES, Inputs, plainly, relative
from tests.ops.harness import same_bits

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
RELEASED = LensConfig(num_layers=2)
BLOCKS = 48  # of the released model
PAIR = [(64, 64), (64, 64)], [0, 415]  # a guided pair at 1024x1024


@pytest.fixture(autouse=True)
def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the device is no sm_90")
    if why := backend.without("denoise_step"):
        pytest.fail(why)


def on_device(config: LensConfig) -> LensTransformer2DModel:
    made = steps.model(config=config).to(DEVICE)
    made.batch_invariant = False
    return made


@pytest.fixture(scope="module")
def released():
    return on_device(RELEASED), steps.drawn(*PAIR, RELEASED, DEVICE)


def small(case: str) -> tuple[LensTransformer2DModel, Inputs]:
    return on_device(CONFIG), steps.drawn(*SAMPLES[case], CONFIG, DEVICE)


def run(step: DenoiseStep, given: Inputs) -> Tensor:
    velocity = torch.full_like(given.image, torch.nan)
    step.run(given.text, velocity)
    return velocity


def against_model(model: LensTransformer2DModel, given: Inputs) -> None:
    """Error against float64 at most twice that of the model run op by op in bfloat16, both by torch on the device."""
    with torch.no_grad():
        exact = plainly(copy.deepcopy(model).double(), given.to(torch.float64))
        own, got = plainly(model, given), steps.whole(model, given)
    assert got.isfinite().all()
    assert relative(own, exact) > 1e-4
    assert relative(got, exact) <= 2 * relative(own, exact)


# ---- small models: emulated shapes, now by the hardware


def test_narrow_model():
    """Small enough for the sanitizer: what every kernel of a step reads and writes in the one workspace."""
    against_model(on_device(CONFIG), steps.drawn([(5, 7)], [9], CONFIG, DEVICE))


@pytest.mark.parametrize("case", SAMPLES)
def test_tile_model(case):
    against_model(*small(case))


def test_tile_model_from_a_thread_of_its_own():
    """Its first launch builds tensor maps, which needs a context that nothing has bound to the thread."""
    model, given = small("unequal text")
    step = steps.taken(model, given)
    here = run(step, given)
    there = torch.full_like(here, torch.nan)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(step.run, given.text, there).result()
    assert same_bits(there, here)


def test_tile_model_is_one_call_where_both_are_forced():
    model, given = small("unequal text")
    with linear_choice.use("fused"), attention_choice.use(OWN_ATTENTION):
        assert why_not(model, given.packing) == ""


# ---- two blocks of the released width


def test_released_width(released):
    against_model(*released)


def test_released_width_captured(released):
    """A replay has the bits of the call; it reads latents, table and text where they are, so also others."""
    model, given = released
    step, latents = steps.taken(model, given), given.image.float()
    first = torch.zeros(len(given.packing.grids), dtype=torch.int64, device=DEVICE)
    index, velocity = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.empty_like(given.image)

    def advance() -> None:
        step.take(latents, given.modulation, first, index)
        step.run(given.text, velocity)

    captured = CudaDriver().capture(advance)
    plain = []
    for number in range(2):
        latents.copy_(given.image).mul_(number + 1)
        index.fill_(number)
        advance()
        plain.append(velocity.clone())
        velocity.fill_(torch.nan)
        captured.replay()
        assert same_bits(velocity, plain[number])
    assert not torch.equal(*plain)


def test_released_width_same_bits_twenty_times(released):
    model, given = released
    step = steps.taken(model, given)
    first = run(step, given)
    assert first.isfinite().all()
    for _ in range(19):
        assert same_bits(run(step, given), first)


def test_host_is_ahead_of_the_device(released, capsys):
    """The released model's 48 blocks, here two by turns: the host returns before the device is done, once in ten at
    least, however busy the machine is."""
    model, given = released
    step = steps.taken(model, given)
    times = BLOCKS // RELEASED.num_layers
    step.weights, step.score_bounds = step.weights.repeat(times, 1, 1), step.score_bounds.repeat(times)
    step.modulation = step.modulation.repeat(1, times, 1, 1, 1)
    velocity = torch.empty_like(given.image)
    host, both, ahead = [], [], False
    for _ in range(10):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step.run(given.text, velocity)
        host.append(time.perf_counter() - begin)
        done = torch.cuda.Event()
        done.record()
        ahead |= not done.query()
        torch.cuda.synchronize()
        both.append(time.perf_counter() - begin)
    called, whole = (1e3 * statistics.median(seconds) for seconds in (host, both))
    with capsys.disabled():
        print(
            f"\ndenoise_step, {BLOCKS} blocks, 1024x1024 guided, 415 text tokens: host {called:.2f} ms of {whole:.2f} ms"
        )
    assert ahead
