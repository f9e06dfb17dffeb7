"""Captured steps draw what plain steps draw, whatever was captured; every copy into their buffers matters."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch

from lens import LensConfig, LensTransformer2DModel, packing, rope
from lens.engine import batch_invariance, run, step
from lens.engine.graphs import GraphCache
from lens.engine.job import Job, Text
from lens.engine.run import Engine
from lens.modulation import Modulation
from lens.ops import backend
from lens.ops.attention import choice as attention_choice
from lens.ops.attention import hopper
from lens.ops.linear import fused as linear_fused
from lens.sampler import Scheduler
from tests.recorded_graph import OFFSETS_ALONE, Recorder, RecordingDriver, launches, offsets_alone
from tests.reference_model import relative
from tests.small_pipeline import fresh, same_bits, shared

SMALL = dict(height=32, width=48, num_inference_steps=3, guidance_scale=4.0, output_type="latent")
PROMPTS = ["a red apple", "three cats under a green tree"]
LONG = "x" * 80 + " and a much longer sentence about many green trees in the evening light " * 2


@cache
def own():
    """Loaded once; every test leaves the weights as they were."""
    return fresh()


@pytest.fixture
def pipe(monkeypatch):
    """A pipeline whose steps are captured; its ``driver`` knows the graphs."""
    offsets_alone(monkeypatch)
    pipe = own()
    pipe.driver = RecordingDriver()
    monkeypatch.setattr(pipe, "scheduler", pipe.scheduler)
    # as on a GPU: the default of a CPU has the library multiply sample by sample, which no captured step of a bin can
    monkeypatch.setattr(pipe.transformer, "batch_invariant", False)
    monkeypatch.setattr(pipe, "engine", Engine(GraphCache(pipe.driver, 1 << 40)))
    yield pipe
    attention_choice.choose.cache_clear()


def both(pipe, *args, **kwargs):
    """(captured, plain) latents of the same call."""
    kwargs = {"seed": 3, **SMALL, **kwargs}
    return pipe(*args, **kwargs).images, shared()(*args, **kwargs).images


def close(pair) -> bool:
    return relative(*pair) <= 2e-5


@pytest.mark.parametrize(
    "call",
    [
        dict(prompt=PROMPTS[0]),
        dict(prompt=PROMPTS[0], guidance_scale=1.0),
        dict(prompt=PROMPTS, negative_prompt="blurry"),
        dict(prompt=[*PROMPTS, ""], negative_prompt=["blurry", "", "dull"]),
        dict(prompt=PROMPTS, num_images_per_prompt=2, guidance_scale=1.0),
        dict(prompt=PROMPTS[1], num_inference_steps=1),
    ],
    ids=lambda call: ",".join(call),
)
def test_same_pictures(pipe, call):
    assert close(both(pipe, **call))
    assert len(pipe.driver.graphs) == 1
    assert pipe.driver.graphs[0].replays == call.get("num_inference_steps", 3)


def test_one_graph_serves_every_text_of_a_bin_and_every_schedule(pipe, monkeypatch):
    monkeypatch.setattr(step, "TABLE_ROWS", 4)
    for prompt in PROMPTS:
        for steps in (1, 4):
            assert close(both(pipe, prompt, num_inference_steps=steps))
    assert len(pipe.driver.graphs) == 1
    assert close(both(pipe, PROMPTS[0], num_inference_steps=5))  # a larger table
    assert close(both(pipe, LONG))  # a larger bin
    assert close(both(pipe, PROMPTS[0], height=48, width=32))  # another grid
    assert close(both(pipe, PROMPTS[0], guidance_scale=3.0))  # a number of the kernel's
    assert len(pipe.driver.graphs) == 5
    assert close(both(pipe, PROMPTS[1]))
    assert len(pipe.driver.graphs) == 5


def test_exact_lengths(pipe):
    """With a bin of 1 each combination of lengths has its graph, and attention is told them by the host."""
    pipe.engine.text_bin = 1
    attention_choice.CANDIDATES[:] = [dataclasses.replace(OFFSETS_ALONE, device_lengths=False)]
    attention_choice.choose.cache_clear()
    for prompt in (PROMPTS[0], PROMPTS[1], PROMPTS[0], "a big apple"):
        assert close(both(pipe, prompt, negative_prompt="blurry"))
    distinct = {len(pipe.encode_text(p)[0][0][0]) for p in (*PROMPTS, "a big apple")}
    assert len(pipe.driver.graphs) == len(distinct) >= 2
    with pytest.raises(ValueError, match="text_bin must be positive, got 0"):
        Engine(text_bin=0)


def test_mixed_sizes_run_without_a_graph(pipe):
    sizes = dict(sizes=[(32, 48), (32, 32)], height=None, width=None)
    pipe.transformer.batch_invariant = True  # the fixture puts it back
    captured, plain = both(pipe, PROMPTS, **sizes)
    assert same_bits(captured, plain)
    assert pipe.driver.graphs == []
    assert pipe.engine.why_not_captured(pipe.transformer, [(2, 3), (2, 2)]) == "sizes are mixed"


def test_stochastic_steps(pipe):
    scheduler = dataclasses.replace(pipe.scheduler, stochastic_sampling=True)
    plain, plain.scheduler, pipe.scheduler = fresh(), scheduler, scheduler
    for prompt in PROMPTS:
        expected = plain(prompt, seed=5, **SMALL).images
        assert close((pipe(prompt, seed=5, **SMALL).images, expected))
    assert len(pipe.driver.graphs) == 1


def test_the_second_order_solver_is_captured_with_its_memory(pipe):
    """One graph for all texts of a bin, another than Euler's; a run that begins in the middle brings its memory."""
    for prompt in PROMPTS:
        assert close(both(pipe, prompt, solver="dpm2m"))
    assert len(pipe.driver.graphs) == 1
    other = {"prompt_embeds": [f * 0.5 for f in pipe.encode_text(PROMPTS[0])[0]]}
    halfway = dict(callback_on_step_end=lambda _p, i, _t, _k: other if i == 1 else {})
    pair = both(pipe, PROMPTS[0], solver="dpm2m", num_inference_steps=4, **halfway)
    assert close(pair)
    assert len(pipe.driver.graphs) == 1
    assert not close((pair[0], both(pipe, PROMPTS[0], num_inference_steps=4, **halfway)[0]))
    assert len(pipe.driver.graphs) == 2


# ------------------------------------------------------------------------------------------------ exactness of the bin


def filled(monkeypatch, value: float) -> None:
    """The rows that fill up a bin hold ``value`` instead of zero."""
    load = run.load

    def loaded(model, state, job, binned):
        load(model, state, job, binned)
        state.text[sum(len(t) for t in job.all_texts) :].fill_(value)

    monkeypatch.setattr(run, "load", loaded)


@pytest.mark.parametrize("value", [1e6, torch.nan])
@pytest.mark.parametrize("negative", ["", "blurry"])
def test_rows_that_fill_a_bin_change_no_bit(pipe, monkeypatch, value, negative):
    call = dict(prompt=PROMPTS, negative_prompt=negative, seed=3, **SMALL)
    expected = pipe(**call).images
    filled(monkeypatch, value)
    got = pipe(**call).images
    assert len(pipe.driver.graphs) == 1
    assert torch.equal(got, expected)


def test_a_bin_filled_to_the_brim():
    index = [torch.arange(40), torch.tensor([3, 4, 9]), torch.arange(21)]
    binned = packing.bin_texts((2, 3), index)
    assert binned.text_lengths == [40, 3, 21, 0]
    assert binned.image_lengths == [6, 6, 6, 0]
    assert binned.longest == 6 + 64
    assert not binned.in_one_piece
    plan = packing.plan([(2, 3)] * 3, index, (8, 28, 28))
    assert torch.equal(binned.image_offsets[:-1], plan.image_offsets)
    assert torch.equal(binned.text_offsets[:-1], plan.text_offsets)
    cos, _ = rope.grid_table((2, 3), 64, (8, 28, 28), torch.device("cpu"))
    torch.testing.assert_close(cos[binned.rope_rows], plan.cos)
    rows = torch.cat([binned.image_rows, binned.text_rows])
    assert sorted(rows.tolist()) == list(range(18 + 64))
    blank = packing.bin_texts((2, 3), [torch.arange(0), torch.arange(70)])
    assert blank.text_lengths == [0, 70, 58]
    assert blank.in_one_piece
    assert blank.image_rows.tolist() == list(range(12))
    assert blank.text_rows.tolist() == list(range(12, 12 + 128))


# ------------------------------------------------------------------------------------------------ planted faults

COPIES = {
    "x": lambda s: s.x,
    "text": lambda s: s.text,
    "table blocks": lambda s: s.table.blocks,
    "table final": lambda s: s.table.final,
    "sigma": lambda s: s.sigma,
    "index": lambda s: s.index,
    "text offsets": lambda s: s.packing.text_offsets,
    "joint offsets": lambda s: s.packing.layout.joint_offsets,
    "image rows": lambda s: s.packing.layout.image_rows,
    "text rows": lambda s: s.packing.layout.text_rows,
    "cos": lambda s: s.packing.cos,
    "sin": lambda s: s.packing.sin,
}


@pytest.mark.parametrize("copy", COPIES)
def test_a_forgotten_copy_shows(pipe, monkeypatch, copy):
    """After a first call, one buffer keeps its contents in the second: another seed, text and schedule."""
    first = dict(prompt=[PROMPTS[0], PROMPTS[1]], negative_prompt="blurry")
    second = dict(prompt=["a large blue bell", ""], negative_prompt="dull and dark", num_inference_steps=2, seed=9)
    assert close(both(pipe, **first))
    load = run.load

    def forgetful(model, state, job, binned):
        kept = COPIES[copy](state).clone()
        load(model, state, job, binned)
        COPIES[copy](state).copy_(kept)

    monkeypatch.setattr(run, "load", forgetful)
    captured, plain = both(pipe, **second)
    assert len(pipe.driver.graphs) == 1
    assert not relative(captured, plain) <= 1e-3


def test_a_rebound_buffer_shows(pipe, monkeypatch):
    """The stand-in is a graph, not a call of the function again: it goes on reading the old memory."""
    assert close(both(pipe, PROMPTS[0]))
    load = run.load

    def rebinding(model, state, job, binned):
        state.text = state.text.clone()
        load(model, state, job, binned)

    monkeypatch.setattr(run, "load", rebinding)
    captured, plain = both(pipe, PROMPTS[1])
    assert not relative(captured, plain) <= 1e-3


@pytest.mark.parametrize("fault", ["value", "numbers"])
def test_a_step_that_looks_at_a_value_cannot_be_captured(pipe, monkeypatch, fault):
    advance = run.advance

    def looking(model, state):
        if fault == "value":
            state.x.mul_(1.0 if int(state.index) < 99 else 2.0)
        else:
            state.x.mul_(torch.tensor([1.0]))
        advance(model, state)

    monkeypatch.setattr(run, "advance", looking)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        pipe(PROMPTS[0], seed=1, **SMALL)
    monkeypatch.setattr(run, "advance", advance)
    assert close(both(pipe, PROMPTS[0])), "the cache was given back"
    assert len(pipe.driver.graphs) == 1


# ------------------------------------------------------------------------------------------------ callbacks


def edits(what: str):
    """A callback that replaces something in the middle of a run."""

    def callback(pipe, i, t, tensors):
        if i == 0 and what == "latents":
            return {"latents": tensors["latents"] * 0.5 + i}
        if i == 1 and what == "noise_pred":
            return {"noise_pred": tensors["noise_pred"] * 1.1}
        if i == 0 and what == "prompt_embeds":
            return {"prompt_embeds": [f.flip(1)[:, 1:] for f in tensors["prompt_embeds"]]}
        return None

    names = ("latents", "noise_pred", "prompt_embeds")
    return dict(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)


@pytest.mark.parametrize("what", ["nothing", "latents", "noise_pred", "prompt_embeds"])
def test_callbacks(pipe, what):
    pair = both(pipe, PROMPTS[1], **edits(what))
    assert close(pair)
    assert len(pipe.driver.graphs) == 1
    if what != "nothing":
        assert not close((pair[0], both(pipe, PROMPTS[1])[0]))


def test_embeddings_given_after_the_last_step_begin_no_run(pipe, monkeypatch):
    """A run that began there would read the row behind a table that is full."""
    monkeypatch.setattr(step, "TABLE_ROWS", 3)
    expected = pipe(PROMPTS[0], seed=3, **SMALL).images

    def last(pipe, i, t, tensors):
        return {"prompt_embeds": [f.repeat(1, 20, 1) for f in tensors["prompt_embeds"]]} if i == 2 else None

    names = dict(callback_on_step_end=last, callback_on_step_end_tensor_inputs=("prompt_embeds",))
    assert torch.equal(pipe(PROMPTS[0], seed=3, **SMALL, **names).images, expected)
    assert len(pipe.driver.graphs) == 1


def test_a_callback_may_draw(pipe):
    """The inner call finds the graphs in use and runs its steps plainly: the same bits, and the outer picture too."""
    alone = pipe("a red apple", seed=7, **SMALL).images
    expected = pipe(PROMPTS[1], seed=8, **SMALL).images
    inner = []

    def draw(p, i, t, tensors):
        inner.append(p("a red apple", seed=7, **SMALL).images)

    outer = pipe(PROMPTS[1], seed=8, callback_on_step_end=draw, **SMALL).images
    assert torch.equal(outer, expected)
    assert all(torch.equal(picture, alone) for picture in inner)
    assert len(pipe.driver.graphs) == 1


def test_an_exception_in_a_callback_gives_the_graphs_back(pipe):
    def stop(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pipe(PROMPTS[0], seed=1, callback_on_step_end=stop, **SMALL)
    assert pipe.engine.cache.claim()
    pipe.engine.cache.release()


# ------------------------------------------------------------------------------------------------ the cache


def test_the_oldest_go_beyond_the_budget(pipe):
    cache = pipe.engine.cache
    pipe("a", seed=1, **SMALL)
    (size,) = [entry.bytes for entry in cache._entries.values()]
    assert size > sum(t.numel() * t.element_size() for t in next(iter(cache._entries.values())).state.tensors())
    cache.budget = int(size * 2.5)
    for guidance in (3.0, 2.0, 3.0, 6.0):  # 4 is the oldest, then 2, because 3 was used again
        pipe("a", seed=1, **{**SMALL, "guidance_scale": guidance})
    assert [key[-4] for key in cache._entries] == [3.0, 6.0]
    assert cache.bytes <= cache.budget
    cache.budget = 1
    pipe("a", seed=1, **{**SMALL, "guidance_scale": 7.0})
    assert [key[-4] for key in cache._entries] == [7.0]


def test_moved_weights_are_captured_anew_and_changed_ones_are_read(pipe):
    assert close(both(pipe, PROMPTS[0]))
    weight = pipe.transformer.blocks[1].image.qkv.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.5)
    plain = fresh()
    plain.transformer.load_state_dict(pipe.transformer.state_dict())
    call = dict(prompt=PROMPTS[0], seed=3, **SMALL)
    assert close((pipe(**call).images, plain(**call).images))
    assert len(pipe.driver.graphs) == 1
    weight.data = before  # elsewhere in memory
    assert close(both(pipe, PROMPTS[0]))
    assert len(pipe.driver.graphs) == 2
    assert len(pipe.engine.cache) == 1


def test_norms_written_behind_torchs_back_have_their_bound_computed_anew(pipe):
    """A bound of attention's scores that they have outgrown would let exponentials overflow, also in graphs that hold it."""
    pipe(PROMPTS[0], seed=3, **SMALL)
    norms, changes = pipe.transformer.blocks[1].norms(), pipe.engine._changes
    bound = hopper.known_bound(norms, 0.25)
    try:
        for norm in norms:
            norm.data.mul_(2)
        pipe(PROMPTS[0], seed=3, **SMALL)
        assert hopper.known_bound(norms, 0.25) == pytest.approx(4 * bound)
        assert pipe.engine._changes == changes + 1
        pipe(PROMPTS[0], seed=3, **SMALL)
        assert pipe.engine._changes == changes + 1, "nothing was written, no graph is captured anew"
    finally:
        for norm in norms:
            norm.data.div_(2)


def test_a_module_put_around_another_is_captured_anew(pipe):
    """As an adapter is: the weights below it stay where they are, and the graph knows nothing of it."""
    before = pipe(PROMPTS[0], seed=3, **SMALL).images
    block = pipe.transformer.blocks[1].image
    layer = block.qkv
    try:
        block.qkv = torch.nn.Sequential(layer, torch.nn.Softsign())
        assert not relative(pipe(PROMPTS[0], seed=3, **SMALL).images, before) <= 1e-3
    finally:
        block.qkv = layer
    assert torch.equal(pipe(PROMPTS[0], seed=3, **SMALL).images, before)


def test_out_of_memory_drops_the_others_once(pipe, monkeypatch):
    pipe("a", seed=1, **SMALL)
    pipe.driver.fail_at = 1
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert close(both(pipe, PROMPTS[0], guidance_scale=2.0))
    assert len(pipe.engine.cache) == 1
    pipe.engine.cache.clear()
    pipe.driver.fail_at = 2
    with pytest.raises(torch.OutOfMemoryError):
        pipe("a", seed=1, **SMALL)
    assert close(both(pipe, PROMPTS[0]))


def test_why_steps_are_not_captured(pipe, monkeypatch):
    why, model = pipe.engine.why_not_captured, pipe.transformer
    assert why(model, [(2, 3)]) == ""
    assert Engine().why_not_captured(model, [(2, 3)]) == "there are no graphs on cpu"
    model.train()
    assert why(model, [(2, 3)]) == "the model is in training"
    model.eval()
    with backend.use("reference"):
        assert "reference" in why(model, [(2, 3)])
    monkeypatch.setenv("LENS_GRAPHS", "off")
    assert why(model, [(2, 3)]) == "LENS_GRAPHS=off"
    monkeypatch.delenv("LENS_GRAPHS")
    monkeypatch.setattr(attention_choice, "CANDIDATES", [])
    attention_choice.choose.cache_clear()
    assert "no attention backend can serve" in why(model, [(2, 3)])


def test_attention_is_chosen_by_the_rows_of_pictures_and_their_text(pipe, monkeypatch):
    """A graph's key names the library of its step, whose class of lengths counts the text."""
    asked: list = []
    choose = attention_choice.choose
    monkeypatch.setattr(attention_choice, "LONG", 10)  # a picture has 6 rows
    monkeypatch.setattr(pipe.engine, "why_not_captured", lambda *_: "")
    with monkeypatch.context() as watched:
        watched.setattr(attention_choice, "choose", lambda call: asked.append(call) or choose(call))
        pipe(PROMPTS[1], seed=3, **SMALL)
    assert len(pipe.driver.graphs) == 1
    assert {call.device_lengths for call in asked} == {True}
    assert {call.longest for call in asked} == {10}


def test_batch_invariance_by_the_library_is_captured_for_exact_lengths_alone(pipe):
    """It multiplies text sample by sample, by lengths that a bin does not tell. A picture keeps its bits in any batch."""
    why, model = pipe.engine.why_not_captured, pipe.transformer
    model.batch_invariant = True  # the fixture puts it back
    said = why(model, [(2, 3)])
    assert "sample by sample (qkv: fused runs on cuda, not on cpu), by lengths the host must know" in said
    pipe(PROMPTS[0], seed=3, **SMALL)
    assert pipe.driver.graphs == []
    pipe.engine.text_bin = 1
    assert why(model, [(2, 3)]) == ""
    attention_choice.CANDIDATES[:] = [dataclasses.replace(OFFSETS_ALONE, device_lengths=False)]
    attention_choice.choose.cache_clear()
    together = pipe(PROMPTS, seed=[3, 4], **SMALL).images
    assert same_bits(together[:1], pipe(PROMPTS[0], seed=3, **SMALL).images)
    assert same_bits(together[1:], pipe(PROMPTS[1], seed=4, **SMALL).images)
    assert len(pipe.driver.graphs) >= 2
    before = len(pipe.driver.graphs)
    model.batch_invariant = False
    pipe(PROMPTS[0], seed=3, **SMALL)
    assert len(pipe.driver.graphs) == before + 1, "other kernels are another graph"


def test_batch_invariance_by_ours_is_captured_in_bins(pipe, monkeypatch):
    """Its choices are asked for without the batch's rows; both ends stay the library's, of pictures whose rows are known."""
    model = pipe.transformer
    model.batch_invariant = True
    monkeypatch.setattr(batch_invariance, "why_library_gemm_of_model", lambda model: "")
    assert pipe.engine.why_not_captured(model, [(2, 3)]) == ""
    asked: list = []
    monkeypatch.setattr(linear_fused, "_use_fused", lambda gemm, op, x, layers, lengths, *_: asked.append(lengths))
    with pytest.raises(
        RuntimeError, match="the library's GEMM runs sample by sample, by lengths that the host must know"
    ):
        pipe(PROMPTS, seed=3, **SMALL)
    rows = 6
    assert asked == [([rows] * 4 + [0], linear_fused.ON_DEVICE)]


# ------------------------------------------------------------------------------------------------ the host's share


def job(config: LensConfig, grid=(2, 3), texts=(0, 5), steps=4) -> Job:
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    width, rows = config.inner_dim, grid[0] * grid[1]
    table = Modulation(normal(steps, config.num_layers, 2, 6, width), normal(steps, 2, width))
    return Job(
        grids=[grid],
        text=Text([normal(texts[1], width)], [torch.arange(texts[1])]),
        negative=Text([normal(texts[0], width)], [torch.arange(texts[0])]),
        guidance=5.0,
        sigma=Scheduler().sigmas(rows, steps)[None],
        first=torch.tensor([0]),
        table=table,
        x=normal(rows, config.in_channels),
    )


@pytest.mark.parametrize("layers", [2, 5])
def test_no_step_looks_at_a_value_and_launches_are_counted(monkeypatch, layers):
    """A step on tensors without contents: looking at one, or taking one to the host, raises."""
    offsets_alone(monkeypatch, dataclasses.replace(OFFSETS_ALONE, device="meta"))
    monkeypatch.setattr(backend, "choose", lambda op, x: "cuda")
    config = dataclasses.replace(LensConfig.tiny(), num_layers=layers)
    given = job(config)
    binned = packing.bin_texts(given.grids[0], given.all_indices)
    with torch.device("meta"):
        model = LensTransformer2DModel(config).eval()
        given = dataclasses.replace(
            given, table=Modulation(given.table.blocks.to("meta"), given.table.final.to("meta"))
        )
    state = run.fixed_state(model, given, binned)
    assert {t.device.type for t in state.tensors()} == {"meta"}
    with torch.no_grad(), Recorder() as recorded:
        run.advance(model, state)
    moved = [c[0] for c in recorded.calls if any(t.device.type != "meta" for t in c[3])]
    assert moved == []
    count = launches(recorded.calls)
    # per block: four GEMMs, two row passes and an activation for each stream, the heads, attention. Once per step:
    # both ends, the rows of the table and of the sigmas, three copies, the sampler. The last block drops its text.
    assert len(count) <= 16 * layers + 21, (len(count), count)
    assert count.count("lens::guidance_step") == 1
    assert count.count("aten::cat") == 0  # each stream lies in one piece: nothing is gathered
    assert count.count("aten::index_select") + count.count("aten::index") == 6  # whatever the blocks
