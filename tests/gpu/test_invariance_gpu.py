"""batch_invariant on a device: a picture's bits alone and in company, by our GEMMs and by the library, captured too."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lens import LensConfig, LensTransformer2DModel
from lens.engine import batch_invariance
from lens.engine.graphs import CudaDriver, GraphCache
from lens.engine.job import Job
from lens.engine.run import Engine
from lens.modulation import Modulation
from lens.ops import backend, denoise_step
from lens.ops.attention import choice as attention_choice
from lens.ops.linear import choice as linear_choice
from tests.emulation import test_denoise_step as steps
from tests.emulation.test_denoise_step import CONFIG, SAMPLES, accompanied, rounded, velocities
from tests.engine.test_engine import job
from tests.ops.harness import same_bits

pytestmark = pytest.mark.gpu
RELEASED = LensConfig(num_layers=2)
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
ours_alone = pytest.mark.skipif(not HOPPER, reason="our GEMMs need an sm_90")
INVARIANT = [c.name for c in attention_choice.CANDIDATES if not c.why_not_invariant]


def invariant_model(config: LensConfig = CONFIG) -> LensTransformer2DModel:
    made = steps.model(config=config).cuda()
    made.batch_invariant = True
    return made


def drawing(config: LensConfig, grid: tuple[int, int], tokens: int) -> Job:
    """A guided picture, its second step next, the text-free half first."""
    made = job(config, grid, (0, tokens), steps=3)
    table = Modulation(*(t.bfloat16().cuda() * 0.5 for t in (made.table.blocks, made.table.final)))
    return rounded(dataclasses.replace(made, table=table, step=1, x=made.x.cuda()), "cuda")


def runnable(name: str) -> None:
    candidate = next(c for c in attention_choice.CANDIDATES if c.name == name)
    if why := candidate.why_unsupported(attention_choice.released_call(batch_invariant=True)):
        pytest.skip(f"{name} {why}")


@pytest.fixture(autouse=True)
def whole_build():
    if HOPPER and (why := backend.without("denoise_step")):
        pytest.fail(why)


def in_company(given: Job, model: LensTransformer2DModel, runs: Engine) -> None:
    with torch.no_grad():
        found = [velocities(runs, model, g, len(given.x)) for g in (given, accompanied(given), given)]
    for one, other, again in zip(*found, strict=True):
        assert one.isfinite().all()
        assert same_bits(one, other)
        assert same_bits(one, again)
    assert not same_bits(*found[0])


# ---- our GEMMs


@ours_alone
@pytest.mark.parametrize("case", SAMPLES)
@pytest.mark.parametrize("name", INVARIANT)
def test_samples_of_other_sizes(name, case):
    """Not captured: two sizes beside each other; nothing but the attention is forced."""
    runnable(name)
    given, model = steps.drawn(*SAMPLES[case], CONFIG, "cuda"), invariant_model()
    assert batch_invariance.why_library_gemm_of_model(model) == ""
    with torch.no_grad(), attention_choice.use(name):
        together = model.denoise(given.image, given.text, given.modulation, given.packing)
        for k in range(2):
            one = steps.sample(given, k)
            alone = model.denoise(one.image, one.text, one.modulation, one.packing)
            assert alone.isfinite().all()
            assert same_bits(alone, together[steps.rows_of(given, k)])


@ours_alone
@pytest.mark.parametrize(
    "name", [c.name for c in attention_choice.CANDIDATES if not c.why_not_invariant and c.device_lengths]
)
def test_released_width_captured(name):
    """1024 x 1024 in one bin of text and beside a longer one; by lens-hopper the step is one call."""
    runnable(name)
    model, runs = invariant_model(RELEASED), Engine(GraphCache(CudaDriver(), 8 << 30))
    with attention_choice.use(name):
        assert runs.why_not_captured(model, [(64, 64)]) == ""
        in_company(drawing(RELEASED, (64, 64), 50), model, runs)
        run = runs.start(model, drawing(RELEASED, (64, 64), 50))
        assert (run._state.whole is not None) == (name == denoise_step.OWN_ATTENTION)
        run.close()


@ours_alone
def test_the_choice_does_not_look_at_the_batch():
    model = invariant_model(RELEASED)
    for rows in (1, 600, 4511):
        calls = [
            attention_choice.attention_call(model.device, model.dtype, 64, rows, device_lengths, batch_invariant=True)
            for device_lengths in (True, False)
        ]
        assert len({attention_choice.choose(call).name for call in calls}) == 1
    assert all(
        linear_choice.choose(call) == "fused"
        for call in linear_choice.gemm_calls(
            RELEASED.block_gemms, 64, model.device, model.dtype, 0, batch_invariant=True
        )
    )


# ---- the library, as on every other device


def test_by_the_library_it_is_captured_for_exact_lengths():
    model = invariant_model(RELEASED)
    with linear_choice.use("library"):
        runs = Engine(GraphCache(CudaDriver(), 8 << 30))
        assert "sample by sample (qkv: forced)" in runs.why_not_captured(model, [(32, 32)])
        runs.text_bin = 1
        in_company(drawing(RELEASED, (32, 32), 50), model, runs)
        given = steps.drawn([(9, 7), (32, 32)], [33, 0], RELEASED, "cuda")
        with torch.no_grad():
            together = model.denoise(given.image, given.text, given.modulation, given.packing)
            for k in range(2):
                one = steps.sample(given, k)
                alone = model.denoise(one.image, one.text, one.modulation, one.packing)
                assert same_bits(alone, together[steps.rows_of(given, k)])
