"""The engine on a device: every attention library against the spec, captured steps against plain ones, memory plans."""

from __future__ import annotations

import dataclasses
import os
import time

import pytest
import torch

from lens import LensConfig, LensPipeline, LensTransformer2DModel, ops, packing
from lens.config import Defaults
from lens.cost import step_buffer_bytes, step_workspace_bytes
from lens.engine import run
from lens.engine.graphs import CudaDriver, GraphCache
from lens.engine.residency import PRESETS
from lens.engine.run import Engine
from lens.engine.step import advance
from lens.formats.released import load_scheduler, load_transformer
from lens.formats.text_encoder import load_text_encoder
from lens.modulation import Modulation
from lens.ops.attention import choice as attention_choice
from lens.ops.attention.layout import DeviceLayout
from lens.request import Request
from lens.text_encoder import ChatTokenizer, TextEncoder
from tests.emulation.test_denoise_step import rounded
from tests.engine.test_engine import job
from tests.reference_model import relative
from tests.small_pipeline import FOLDER, fresh

pytestmark = pytest.mark.gpu
SMALL = dict(height=64, width=64, num_inference_steps=4, guidance_scale=4.0, output_type="latent", seed=1)
PROMPTS = ["a red apple", "three cats under a green tree"]
SHAPES = {
    "released pair": ([4096, 4096], [300, 0], 24, 64),
    "ragged": ([1, 333, 0, 64, 2], [5, 0, 7, 100, 1], 3, 64),
    "short": ([64] * 9, [12] * 9, 2, 64),
}


def attention_inputs(shape, grad=False):
    image, text, heads, head_dim = SHAPES[shape]
    g = torch.Generator("cuda").manual_seed(1)
    rows = sum(image) + sum(text)
    qkv = torch.randn(3, rows, heads, head_dim, generator=g, device="cuda").to(torch.bfloat16)
    offsets = [torch.tensor([0, *n]).cumsum(0).to("cuda", torch.int32) for n in (image, text)]
    return [x.detach().requires_grad_(grad) for x in qkv], image, text, offsets


def runnable(name: str, **changes) -> None:
    candidate = next(c for c in attention_choice.CANDIDATES if c.name == name)
    if why := candidate.why_unsupported(attention_choice.released_call(**changes)):
        pytest.skip(f"{name} {why}")


# a private op that reads out of bounds takes the process's device with it: LENS_TEST_PRIVATE=1 runs it, and it alone
PRIVATE = {"torch-cudnn-varlen"}
CANDIDATES = [
    c for c in attention_choice.CANDIDATES if (c.name in PRIVATE) == bool(os.environ.get("LENS_TEST_PRIVATE"))
]
NAMES = [c.name for c in CANDIDATES]
MASKED = {"torch-varlen", "flash-attn-2"}  # tiles of V are read up to the sample's end; others read them whole


@pytest.mark.parametrize("text_queries", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_attention_library_against_the_spec(name, shape, text_queries):
    runnable(name)
    qkv, image, text, offsets = attention_inputs(shape)
    with torch.no_grad(), attention_choice.use(name):
        got = ops.joint_attention(*qkv, image, text, *offsets, text_queries)
        again = ops.joint_attention(*qkv, image, text, *offsets, text_queries)
    exact = ops.reference.joint_attention(*(x.float() for x in qkv), image, text, *offsets, text_queries)
    for a, b, e in zip(got, again, exact, strict=True):
        assert torch.equal(a, b), "same bits again"
        assert not len(e) or relative(a.float(), e) <= 8e-3


@pytest.mark.parametrize("name", NAMES)
def test_attention_library_with_lengths_on_the_device(name):
    runnable(name, device_lengths=True)
    qkv, image, text, offsets = attention_inputs("ragged")
    rows = ops.reference.joint_rows(*offsets, sum(image), sum(text))
    places = DeviceLayout(rows[: sum(image)], rows[sum(image) :], 400, 500, offsets[0] + offsets[1])
    other = [0, sum(image), 0, 0, 0], [0, 0, 0, 0, sum(text)]
    with torch.no_grad(), attention_choice.use(name):
        got = ops.joint_attention(*qkv, *other, *offsets, layout=places)
    exact = ops.reference.joint_attention(*(x.float() for x in qkv), image, text, *offsets)
    for a, e in zip(got, exact, strict=True):
        assert relative(a.float(), e) <= 8e-3


@pytest.mark.parametrize("shape", ["ragged", "released pair"])
@pytest.mark.parametrize("name", NAMES)
def test_attention_library_gradients_and_their_bits(name, shape):
    runnable(name, backward=True)
    qkv, image, text, offsets = attention_inputs(shape, grad=True)
    weight = torch.linspace(-1, 1, qkv[0][0].numel(), device="cuda")

    def gradients(op, inputs):
        out = torch.cat(op(*inputs, image, text, *offsets))
        return torch.autograd.grad((out.float() * weight).sum(), inputs)

    with attention_choice.use(name):
        first, second = gradients(ops.joint_attention, qkv), gradients(ops.joint_attention, qkv)
    exact = gradients(ops.reference.joint_attention, [x.detach().float().requires_grad_() for x in qkv])
    for a, b, e in zip(first, second, exact, strict=True):
        assert torch.equal(a, b), "no float atomics"
        assert relative(a.float(), e) <= 2e-2


# ------------------------------------------------------------------------------------------------ captured steps


def without_decoder(dtype: torch.dtype) -> LensPipeline:
    """The small pipeline for latents: its autoencoder would need diffusers."""
    transformer = load_transformer(FOLDER / "transformer", dtype, "cuda")
    layers = transformer.config.selected_layer_index
    model = load_text_encoder(FOLDER / "text_encoder", dtype, "cuda", max(layers) + 1)
    encoder = TextEncoder(ChatTokenizer(FOLDER / "tokenizer"), model, layers)
    scheduler = load_scheduler(FOLDER / "scheduler")
    return LensPipeline(transformer, encoder, None, scheduler, Defaults("lens", 20, 5.0))


@pytest.fixture(scope="module")
def pipe():
    return without_decoder(torch.bfloat16)


def test_captured_steps_draw_what_plain_steps_draw(pipe, monkeypatch):
    """bfloat16 moves these latents by some 5 %, so both are held to float32: the captured ones are no further from it."""
    exact = without_decoder(torch.float32)
    for call in (dict(prompt=PROMPTS[0]), dict(prompt=PROMPTS, negative_prompt="blurry"), dict(prompt=PROMPTS[1])):
        captured = pipe(**call, **SMALL).images
        assert torch.equal(captured, pipe(**call, **SMALL).images)
        monkeypatch.setenv("LENS_GRAPHS", "off")
        plain, truth = pipe(**call, **SMALL).images, exact(**call, **SMALL).images
        monkeypatch.delenv("LENS_GRAPHS")
        assert relative(plain, truth) <= 0.1
        assert relative(captured, truth) <= 2 * relative(plain, truth)
    assert len(pipe.engine.cache) == 2  # two texts of one bin share a graph


def test_a_run_without_the_graph_has_the_graphs_bits(pipe):
    captured = pipe(PROMPTS[0], **SMALL).images
    assert pipe.engine.cache.claim()
    try:
        assert torch.equal(pipe(PROMPTS[0], **SMALL).images, captured)
    finally:
        pipe.engine.cache.release()


@pytest.mark.parametrize("value", [3e4, torch.nan])
@pytest.mark.parametrize("name", [c.name for c in CANDIDATES if c.device_lengths])
def test_rows_that_fill_a_bin_change_no_bit_of_a_picture(pipe, monkeypatch, name, value):
    runnable(name, device_lengths=True)
    if name not in MASKED and value != value:
        pytest.skip(f"{name} multiplies what lies behind a sample by zero: the engine's fill is finite for its sake")
    load = run.load

    def filled(model, state, given, binned):
        load(model, state, given, binned)
        state.text[sum(len(t) for t in given.all_texts) :].fill_(value)

    with attention_choice.use(name):
        expected = pipe(PROMPTS, negative_prompt="blurry", **SMALL).images
        monkeypatch.setattr(run, "load", filled)
        assert torch.equal(pipe(PROMPTS, negative_prompt="blurry", **SMALL).images, expected)


def test_the_oldest_graph_goes_and_its_memory_is_used_again(pipe):
    own = Engine(budget=1)
    before, pipe.engine = pipe.engine, own
    try:
        for guidance in (2.0, 3.0, 4.0, 2.0):
            pipe(PROMPTS[0], **{**SMALL, "guidance_scale": guidance})
        assert len(own.cache) == 1
        held = torch.cuda.memory_reserved()
        for guidance in (3.0, 4.0, 2.0):
            pipe(PROMPTS[0], **{**SMALL, "guidance_scale": guidance})
        assert torch.cuda.memory_reserved() <= held + (32 << 20)
    finally:
        pipe.engine = before


def test_streamed_pictures_and_the_second_stream():
    pytest.importorskip("diffusers")
    pipe = fresh(device="cuda", dtype=torch.bfloat16)
    requests = [Request(PROMPTS[k % 2], seed=k, size=(64, 64), num_inference_steps=4) for k in range(10)]
    drawn = {k: picture for k, picture, _ in pipe.stream(requests, max_images=2, output_type="np")}
    inline = {k: picture for k, picture, _ in pipe.stream(requests, max_images=2, output_type="np")}
    assert sorted(drawn) == list(range(10))
    for k, picture in drawn.items():
        assert (picture == inline[k]).all()
        alone = pipe(PROMPTS[k % 2], **{**SMALL, "guidance_scale": None, "output_type": "np", "seed": k}).images[0]
        assert abs(picture - alone).mean() <= 3e-2  # a neighbour is rounding; another picture would be 0.18


@pytest.mark.parametrize("name", PRESETS)
def test_pictures_are_the_same_wherever_parts_live_on_a_device(name, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setenv("LENS_GRAPHS", "off")
    plain = fresh(device="cuda", dtype=torch.bfloat16)
    call = dict(prompt=PROMPTS[0], **{**SMALL, "output_type": "np"})
    expected = plain(**call).images
    placed = fresh(device="cuda", dtype=torch.bfloat16, residency=name)
    assert placed.device == plain.device
    # a table made on the host is rounded elsewhere: bfloat16 moves these pictures by 0.01 on average
    assert abs(placed(**call).images - expected).mean() <= (3e-2 if name in ("trimmed", "balanced") else 0)
    for part, module in placed.parts().items():
        if PRESETS[name].tier(part) != "resident":
            assert {t.device.type for t in module.parameters() if not t.is_meta} == {"cpu"}


# ------------------------------------------------------------------------------------------------ released size


@pytest.fixture(scope="module")
def released():
    """Twelve of the 48 blocks: a quarter of the weights, the whole of a step's activations."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free device memory")
    config = dataclasses.replace(LensConfig(), num_layers=12)
    with torch.device("cuda"):
        model = LensTransformer2DModel(config).eval().to(torch.bfloat16).requires_grad_(False)
    model.batch_invariant = False
    given = job(dataclasses.replace(config, num_layers=1), (64, 64), (0, 300), steps=20)
    blocks = torch.randn(20, 12, 2, 6, 1536, device="cuda", dtype=torch.bfloat16) * 0.1
    table = Modulation(blocks, torch.randn(20, 2, 1536, device="cuda", dtype=torch.bfloat16) * 0.1)
    return model, rounded(dataclasses.replace(given, table=table, x=given.x.cuda()), "cuda")


@torch.no_grad()
def test_predicted_memory_of_a_step_is_the_measured_peak(released):
    model, given = released
    binned = packing.bin_texts((64, 64), given.all_indices)
    before = torch.cuda.memory_allocated()
    state = run.fixed_state(model, given, binned)
    run.load(model, state, given, binned)
    buffers = step_buffer_bytes(model.config, 8192, binned.rows, 2)
    assert torch.cuda.memory_allocated() - before == pytest.approx(buffers, rel=0.1, abs=8 << 20)
    advance(model, state)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    advance(model, state)
    torch.cuda.synchronize()
    measured = torch.cuda.max_memory_allocated() - held
    assert measured == pytest.approx(step_workspace_bytes(model.config, 8192, binned.rows), rel=0.12)


@torch.no_grad()
def test_no_replay_waits_for_the_device(released, capsys):
    """By torch's own check; what the host needs is told, for a busy machine may be slow."""
    model, given = released
    runs = Engine(GraphCache(CudaDriver(), 8 << 30))
    runs.start(model, given).close()  # captures
    torch.cuda.synchronize()
    began = time.process_time()
    run = runs.start(model, given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            run.step()
        host = time.process_time() - began
    finally:
        torch.cuda.set_sync_debug_mode("default")
        run.close()
    torch.cuda.synchronize()
    assert torch.isfinite(run.x).all()
    assert len(runs.cache) == 1
    with capsys.disabled():
        print(f"\n20 replayed steps and their loading: {host * 1e3:.2f} ms of the host, predicted below 2")
