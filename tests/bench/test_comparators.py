"""The comparators and ours on one model: the same numbers, the same structure as promised, in every suite."""

import dataclasses

import pytest
import torch

from bench.case import ConstantData, distance
from bench.measure import measure
from bench.suites import SUITES, attention, cases
from bench.suites.e2e import _denoise
from bench.work import comparators
from bench.work.denoiser import STEP_BOUND, DenoiserSetup
from bench.work.drawing import BOUND, DrawingSetup
from bench.work.scale import TINY
from lens import ops
from lens.ops.attention import choice as attention_choice
from lens.ops.linear import choice as linear_choice
from tests.recorded_graph import candidates

CPU = torch.device("cpu")
CEILINGS = {"copy": 1e10, "matmul": 1e11}


@pytest.fixture(autouse=True)
def traced_not_compiled(monkeypatch):
    """Dynamo must take every block whole; what Inductor makes of it costs minutes here and is measured on a GPU."""
    monkeypatch.setattr(
        comparators, "compiled", lambda f: torch.compile(f, dynamic=False, backend="eager", fullgraph=True)
    )


@pytest.mark.parametrize(("guided", "batch"), [(True, 1), (False, 1), (True, 2), (False, 3)])
def test_every_subject_of_a_step_agrees_with_the_wide_reference(guided, batch):
    d = DenoiserSetup(TINY, CPU, (4, 5), 7, guided, batch=batch)
    (inputs,) = d.inputs(1)
    with torch.no_grad():
        oracle = d.reference(1, wide=True)(*inputs)
        assert oracle.dtype == torch.float64
        steps = (d.engine(1), d.engine(1, invariant=True), d.ours(1), d.exact(1, compile=False), d.reference(1))
        for step in steps:
            assert distance(step(*inputs), oracle) < 2e-6
        assert d.model.batch_invariant is False
        assert distance(d.engine(2)(*inputs), oracle) > 1e-3, "another step of the schedule is another result"


def test_a_step_is_by_measured_orders_where_every_gemm_has_one(monkeypatch):
    """One GEMM's on this device, or all of another's, leave the rest to the library."""
    d, both = DenoiserSetup(TINY, CPU, (4, 5), 7, True), ("library", "fused")
    for orders, rows, by in (
        ({("0.0", gemm): both for gemm in linear_choice.GEMMS}, 47, True),
        ({("0.0", gemm): both for gemm in linear_choice.GEMMS}, 48, False),
        ({("0.0", "qkv"): both}, 47, False),
        ({("9.0", gemm): both for gemm in linear_choice.GEMMS}, 47, False),
    ):
        monkeypatch.setattr(linear_choice, "ORDERS", orders)
        monkeypatch.setattr(linear_choice, "ROWS", rows)
        assert d.fields_of_step(False)()["by_measured_orders"] == by


def test_an_engine_that_cannot_start_is_the_failure_of_ours_alone(monkeypatch):
    from lens.engine.run import Engine

    def start(*_):
        raise RuntimeError("capture failed")

    monkeypatch.setattr(Engine, "start", start)
    (case,) = cases(("step",), ["step/64/single/text5/*"], tiny=True)
    rows = measure(case, CPU, 0.0, CEILINGS, ("ours", "ours_op_by_op"))
    assert rows["ours"] == {"failed": "RuntimeError: capture failed"}
    assert rows["ours_op_by_op"]["best"] > 0


def test_the_text_of_the_prompt_matters_to_every_subject():
    d = DenoiserSetup(TINY, CPU, (4, 4), 7, True)
    (x, features, _), (_, others, projected) = d.inputs(2)
    with torch.no_grad():
        for step in (d.engine(1), d.ours(1), d.exact(1, compile=False), d.reference(1)):
            assert (
                distance(step(x, others, projected), step(x, features, d.inputs(1)[0][2])) > STEP_BOUND[torch.bfloat16]
            )


def test_the_compiled_ones_are_one_graph_per_block():
    d = DenoiserSetup(TINY, CPU, (4, 4), 5, True)
    (inputs,) = d.inputs(1)
    with torch.no_grad():
        oracle = d.reference(1)(*inputs)
        assert distance(d.exact(1)(*inputs), oracle) < 2e-6
        assert distance(d.reference(1, compile=True)(*inputs), oracle) < 2e-6


def test_the_reference_masks_its_padding():
    """Padding of any content changes nothing: the additive mask is at work."""
    d = DenoiserSetup(TINY, CPU, (4, 4), 5, False)
    reference = comparators.Reference(d.model)
    (x, features, _), mask = d.inputs(1)[0], torch.arange(9)[None] < 5
    with torch.no_grad():
        plain = reference(x[None], [f[None] for f in features], mask[:, :5], d.time[:1], (4, 4))
        longer = [torch.cat([f, 100 * torch.ones(4, f.shape[1])])[None] for f in features]
        assert distance(reference(x[None], longer, mask, d.time[:1], (4, 4)), plain) < 2e-6


def test_a_whole_schedule_agrees_in_one_batch_and_in_mixed_sizes():
    for variant, grids in (("lens", [(4, 4)] * 2), ("turbo", [(4, 4), (3, 5)])):
        work = _denoise(DrawingSetup(TINY, CPU, variant, grids, 5))
        oracle = work.oracle(*work.inputs[0])
        with torch.no_grad():
            for name, subject in work.subjects.items():
                if name != "reference_compiled":
                    assert distance(work.select(subject.call(*work.inputs[0])), oracle) < 1e-4, (variant, name)
        assert ("exact_compiled" in work.left_out) == (variant == "turbo")
        if variant == "lens":
            other = work.subjects["ours"].call(work.inputs[0][0], work.inputs[1][1])
            assert distance(work.select(other), oracle) > BOUND[torch.bfloat16], "lost text must not pass for rounding"


@pytest.mark.parametrize(
    "pattern",
    [
        "step/64/cfg/text5/fp32",
        "step/64/b4/text5/fp32",
        "ops/qk_norm_rope/small/fp32/backward",
        "ops/rms_norm_modulate/small/bf16/forward",
        "gemm/table/table2/fp32",
        "gemm/w13/32+text12/fp32",
        "gemm/qkv_norm_rope/32+text12/fp32",
        "gemm/qkv_norm_rope/16/fp32",
        "gemm/w13_swiglu/32+text12/fp32",
        "gemm/out_residual_norm/32+text12/fp32",
        "gemm/w2_residual_norm/16+text5/fp32",
        "gemm/w2_residual/32/fp32",
        "attention/28,16/fp32/forward",
        "attention/3x17/fp32/forward",
        "attention/3x21/fp32/backward",
        "train/64/b2/fp32",
        "e2e/turbo/64/b1/fp32/text",
        "e2e/turbo/64/b1/fp32/total",
        "e2e/lens/64/b1/fp32/host",
        "e2e/turbo/64/b1/fp32/host_total",
        "e2e/turbo/64/b1/fp32/first_latents",
        "e2e/turbo/64/b1/fp32/stream",
        "e2e/turbo/mixed/queue/fp32/stream",
        "ops/sink_attention/window/bf16/forward",
        "data/image_scores/48x64/uint8",
    ],
)
def test_every_suite_measures_its_tiny_cases_on_a_cpu(pattern):
    (case,) = cases(SUITES, [pattern], tiny=True, gpu=False)
    assert case.id == f"tiny/{pattern}"
    wanted = tuple(s for s in case.subjects if "compiled" not in s)
    rows = measure(case, CPU, 0.0, CEILINGS, wanted)
    assert set(rows) == set(wanted)
    assert rows["ours"]["best"] > 0
    assert rows["ours"]["error"] <= rows["ours"]["bound"]
    kind = case.id.split("/")[-1]
    assert (rows["ours"]["flops"] + rows["ours"]["bytes"] > 0) is (kind not in ("host", "host_total", "first_latents"))
    assert (rows["ours"].get("images", 0) > 1) is (kind == "stream")


def test_our_attention_is_timed_in_all_its_modes_beside_each_other(monkeypatch):
    (case,) = cases(("attention",), ["attention/28,16/fp32/forward"], tiny=True)
    assert set(attention.MODES) <= set(case.subjects)
    assert set(attention.MODES).isdisjoint(
        cases(("attention",), ["attention/3x17/fp32/forward"], tiny=True)[0].subjects
    )
    told = []

    def forward(q, k, v, image_offsets, text_offsets, images, text_queries, scale, bound, polynomial, lse):
        told.append((bound, polynomial))
        places = image_offsets.diff().tolist(), text_offsets.diff().tolist(), image_offsets, text_offsets
        return *ops.reference.joint_attention(q, k, v, *places, text_queries, scale), None

    monkeypatch.setattr(attention.hopper, "forward", forward)
    own = next(c for c in attention_choice.CANDIDATES if c.name == attention.OWN)
    left_out = case.prepare(CPU).left_out
    assert {left_out[name] for name in attention.MODES} == {left_out[attention.OWN]}
    able = dataclasses.replace(own, device="cpu", arch=((0, 0), (0, 0)), dtypes=(torch.float32,), kernel="")
    candidates(monkeypatch, able)
    work = case.prepare(CPU)
    with torch.no_grad():
        for name in attention.MODES:
            assert distance(work.subjects[name].call(*work.inputs[0]), work.oracle(*work.inputs[0])) < 1e-6
    bounds = {name: bound for name, (bound, _) in zip(attention.MODES, told, strict=True)}
    assert all((bound == float("inf")) == ("running" in name) for name, bound in bounds.items())
    q, k, _ = work.inputs[0]
    scores = torch.einsum("qnh,knh->nqk", q, k).abs().max() * 64**-0.5
    assert scores < bounds["lens-hopper-fixed"] < 60, "a fixed shift is taken up to 60"
    assert [polynomial for _, polynomial in told] == [0, 1, 0, 1]


def test_constant_latents_are_refused():
    work = cases(("step",), ["step/64/single/text5/*"], tiny=True)[0].prepare(CPU)
    work.inputs[0][0].zero_()
    from bench.measure import compare_results
    from bench.timing import clock_of

    with pytest.raises(ConstantData):
        compare_results(cases(("step",), tiny=True)[0], work, clock_of(CPU), ("ours",))


def test_ids_are_unique_and_of_one_form():
    everything = [*cases(), *cases(gpu=False), *cases(tiny=True)]
    for some in (cases(), cases(gpu=False), cases(tiny=True)):
        assert len({c.id for c in some}) == len(some)
    for case in everything:
        assert case.suite in SUITES
        assert case.subjects[0] == "ours"
        assert {"fp32", "bf16", "uint8"} & set(case.id.split("/"))


@pytest.mark.parametrize(
    "id",
    [
        "step/1024/cfg/text415/bf16",
        "step/1440/single/text64/bf16",
        "step/1024/b4/text200/bf16",
        "step/1024/b8/text200/bf16",
        "e2e/lens/1024/b1/bf16/total",
        "e2e/turbo/1440/b1/bf16/denoise",
        "e2e/turbo/1024/b1/bf16/host",
        "e2e/turbo/1024/b1/bf16/host_total",
        "e2e/turbo/1024/b1/bf16/first",
        "e2e/turbo/1024/b1/bf16/first_latents",
        "e2e/turbo/1024/b8/bf16/stream",
        "e2e/turbo/mixed/queue/bf16/stream",
        "e2e/mini/64/b8/bf16/total",
        "ops/swiglu/1024cfg/bf16/backward",
        "attention/4511,4096/bf16/forward",
        "attention/2x4511/bf16/forward",
        "gemm/qkv/8192+text415/bf16",
        "gemm/table/table20/bf16",
        "gemm/w13_swiglu/8192+text415/bf16",
        "gemm/qkv_norm_rope/4096+text200/bf16",
        "gemm/out_residual/8192/bf16",
        "attention/8x968/bf16/forward",
        "train/512/b24/bf16",
        "train/1024/b6/bf16",
    ],
)
def test_ids_that_results_are_kept_by(id):
    """Never rename these: old results would compare with nothing."""
    assert [c.id for c in cases(SUITES, [id])] == [id]
