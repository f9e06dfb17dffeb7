"""The transformer as one call, every kernel of it emulated, against the model in float64 and op by op."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor

from lens import LensConfig, LensTransformer2DModel
from lens.engine import run as engine
from lens.engine.denoise_step_buffers import DenoiseStep, bounds
from lens.engine.graphs import GraphCache
from lens.engine.job import Job, Text
from lens.engine.step import State, free_state, why_not
from lens.modulation import Modulation
from lens.ops import backend, denoise_step
from lens.ops.attention import choice as attention_choice
from lens.ops.attention.hopper import score_bound
from lens.ops.linear import choice as linear_choice
from lens.packing import Grid, Packing, plan
from tests.engine.test_engine import job
from tests.ops.harness import same_bits
from tests.recorded_graph import Recorder, RecordingDriver, launches

# heads of 64, columns in multiples of 64 (512 hidden), two blocks: one whose text goes on, one whose text ends
CONFIG = LensConfig(num_layers=2, num_attention_heads=3, enc_hidden_dim=64, selected_layer_index=(0,))
SAMPLES = {
    "unequal text": ([(5, 7), (4, 4)], [9, 70]),
    "one half without": ([(5, 7), (5, 7)], [0, 33]),
    "no text": ([(3, 5), (8, 9)], [0, 0]),
}


def model(dtype: torch.dtype = torch.bfloat16, config: LensConfig = CONFIG) -> LensTransformer2DModel:
    """Random weights whose branches matter: norms and biases away from 1 and 0."""
    made = LensTransformer2DModel(config).eval().requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        fresh = torch.randn(parameter.shape, generator=g)
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.3
        parameter.copy_(fresh * scale + (1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0))
    return made.bfloat16().to(dtype)


@dataclasses.dataclass
class Inputs:
    packing: Packing
    image: Tensor
    text: Tensor
    modulation: Modulation

    def to(self, dtype: torch.dtype) -> Inputs:
        p, angle = self.packing, torch.float64 if dtype == torch.float64 else torch.float32
        packing = dataclasses.replace(p, cos=p.cos.to(angle), sin=p.sin.to(angle))
        modulation = Modulation(self.modulation.blocks.to(dtype), self.modulation.final.to(dtype))
        return Inputs(packing, self.image.to(dtype), self.text.to(dtype), modulation)


def inputs(case: str) -> Inputs:
    return drawn(*SAMPLES[case], CONFIG, "cpu")


def drawn(grids: list[Grid], texts: list[int], config: LensConfig, device: str) -> Inputs:
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).bfloat16().to(device)

    packing, width = plan(grids, texts, config.axes_dims_rope, device), config.inner_dim
    table = Modulation(normal(len(grids), config.num_layers, 2, 6, width) * 0.5, normal(len(grids), 2, width) * 0.5)
    rows = sum(packing.image_lengths), sum(packing.text_lengths)
    return Inputs(packing, normal(rows[0], config.in_channels), normal(rows[1], width), table)


def plainly(model: LensTransformer2DModel, given: Inputs) -> Tensor:
    with backend.use("reference"), linear_choice.use("library"):
        return model.denoise(given.image, given.text, given.modulation, given.packing)


@contextlib.contextmanager
def on_device(model: LensTransformer2DModel, library: ctypes.CDLL) -> Iterator[None]:
    """The blocks' weights, which the call knows by address alone, lie in guarded buffers; none is written or left."""
    held = []
    for name, parameter in model.blocks.named_parameters():
        count = parameter.numel()
        address = library.lens_emulation_allocate(name.encode(), 2 * count, 0)
        there = torch.frombuffer((ctypes.c_uint8 * (2 * count)).from_address(address), dtype=torch.bfloat16)
        held.append((address, there, parameter, parameter.data))
        parameter.data = there.view(parameter.shape).copy_(parameter.data)
    try:
        yield
    finally:
        for address, there, parameter, before in held:
            assert torch.equal(there, before.flatten())
            parameter.data = before
            assert not library.lens_emulation_free(address)


def taken(model: LensTransformer2DModel, given: Inputs) -> DenoiseStep:
    """The one call with its inputs, in memory that held NaN."""
    step = DenoiseStep(model, given.packing, 1e-6)
    for buffer in (step.workspace, step.image_rows, step.modulation, step.final_modulation):
        buffer.fill_(torch.nan)
    samples, device = len(given.packing.grids), given.image.device
    ones = torch.ones(1, dtype=torch.int64, device=device)
    step.take(given.image.float(), given.modulation, torch.arange(samples, device=device) - 1, ones)
    return step


def whole(model: LensTransformer2DModel, given: Inputs) -> Tensor:
    """The velocity by the one call."""
    step = taken(model, given)
    velocity = torch.full_like(given.image, torch.nan)
    step.run(given.text, velocity)
    return velocity


@pytest.fixture
def forced(monkeypatch):
    """Everything is forced to our kernels, as on a machine that has them."""
    monkeypatch.setattr(linear_choice, "why_unsupported", lambda call: "")
    monkeypatch.setattr(backend, "without", lambda kernel: "")
    own = dataclasses.replace(attention_choice.CANDIDATES[0], name=denoise_step.OWN_ATTENTION)
    monkeypatch.setattr(attention_choice, "choose", lambda call: own)
    with linear_choice.use("fused"):
        yield


@pytest.fixture
def ours(emulated, forced):
    """A model whose weights lie in guarded buffers."""
    made = model()
    with on_device(made, emulated.library):
        yield made


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("case", SAMPLES)
def test_the_whole_transformer(emulated, case):
    """Error against float64 at most twice that of the model run op by op in bfloat16."""
    emulated.seed = 3
    given = inputs(case)
    with torch.no_grad():
        exact, own = plainly(model(torch.float64), given.to(torch.float64)), plainly(model(), given)
        ours = model()
        with on_device(ours, emulated.library):
            got = whole(ours, given)
    assert emulated.calls == ["denoise_step"]
    assert relative(own, exact) > 1e-4
    assert relative(got, exact) <= 2 * relative(own, exact)


def test_the_model_by_our_products(emulated, forced):
    """Op by op: four GEMMs a block, both streams in each; the last block's text is left out."""
    given, ours = inputs("unequal text"), model()
    with torch.no_grad():
        exact, own = plainly(model(torch.float64), given.to(torch.float64)), plainly(ours, given)
        got = ours.denoise(given.image, given.text, given.modulation, given.packing)
    products = [name for name in emulated.calls if name.startswith("linear")]
    block = ["linear_qkv_norm_rope", "linear_gated_residual", "linear_swiglu", "linear_gated_residual"]
    assert products == 2 * block
    assert relative(got, exact) <= 2 * relative(own, exact)


def test_clusters_are_forced_in_every_product(emulated, ours, monkeypatch):
    """Four of two blocks, the first and the last; with multiprocessors to spare each would take clusters itself."""
    monkeypatch.setattr(emulated, "multiprocessors", 4000)
    given, got = inputs("no text"), []
    with torch.no_grad():
        for blocks, launched in ((0, 10), (1, 0), (2, 10)):
            with linear_choice.in_clusters(blocks):
                got.append(whole(ours, given))
            assert emulated.library.lens_emulation_cluster_launches() == launched
    assert same_bits(got[0], got[1])
    assert same_bits(got[1], got[2])


# ---- in a step


def drawing(texts: tuple[int, int]) -> Job:
    """A guided job: three steps, the second is next."""
    made = job(CONFIG, (5, 7), texts, steps=3)
    table = Modulation(made.table.blocks.bfloat16() * 0.5, made.table.final.bfloat16() * 0.5)
    return rounded(dataclasses.replace(made, table=table, step=1))


def rounded(given: Job, device: str = "cpu") -> Job:
    """The job with its texts in bfloat16 on a device."""
    texts = {}
    for name in ("text", "negative"):
        text = getattr(given, name)
        texts[name] = Text([rows.to(device, torch.bfloat16) for rows in text.rows], text.index)
    return dataclasses.replace(given, **texts)


def storages(tensors: Iterable[Tensor]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}


def stepped(model: LensTransformer2DModel, state: State, dtype: torch.dtype) -> Tensor:
    """The velocity of the state's step by the model, op by op, told on the host what only the device knows."""
    lengths = [o.diff().tolist() for o in (state.packing.image_offsets, state.packing.text_offsets)]
    packing = dataclasses.replace(state.packing, image_lengths=lengths[0], text_lengths=lengths[1], layout=None)
    given = Inputs(packing, state.x.repeat(2, 1), state.text, state.table.rows(state.first + state.index))
    return plainly(model, given.to(dtype))


@pytest.mark.parametrize("texts", [(0, 9), (3, 5)], ids=str)
def test_a_step_is_one_call_and_allocates_nothing(emulated, ours, texts):
    state = free_state(ours, drawing(texts))
    assert state.whole is not None
    with torch.no_grad():
        exact, own = stepped(model(torch.float64), state, torch.float64), stepped(ours, state, torch.bfloat16)
        before = storages([*state.tensors(), state.whole.weights, state.whole.score_bounds])
        with Recorder() as recorded:
            state.whole.take(state.x, state.table, state.first, state.index)
            state.whole.run(state.text, state.velocity)
    assert emulated.calls == ["denoise_step"]
    assert len(launches(recorded.calls)) == 5
    assert storages(t for call in recorded.calls for t in call[3]) <= before
    assert relative(state.velocity, exact) <= 2 * relative(own, exact)


def test_a_captured_step_takes_other_texts_and_changed_weights(emulated, ours):
    """Rows that fill the bin are a sample of their own; replays read the weights where they are."""
    runs = engine.Engine(GraphCache(RecordingDriver(), 1 << 40))
    with torch.no_grad():
        for texts in ((0, 9), (0, 30)):
            run = runs.start(ours, drawing(texts))
            assert run.captured
            state = run._state
            assert state.whole is not None
            assert sum(state.packing.text_lengths) == 64
            exact, own = (stepped(m, state, m.dtype) for m in (model(torch.float64), ours))
            run.step()
            run.close()
            assert relative(state.velocity, exact) <= 2 * relative(own, exact)
        before = state.velocity.clone()
        weight = ours.layers()[0].image.w13.weight
        unmerged = weight.clone()
        weight.mul_(1.25)  # as an adapter that is merged
        run = runs.start(ours, drawing((0, 30)))
        run.step()
        run.close()
        assert len(runs.cache) == 1
        assert relative(state.velocity, before.double()) > 1e-3
        weight.copy_(unmerged)
        key = next(iter(runs.cache._entries))
        ours.layers()[1].text.k_norm.mul_(1.0)  # the scores' bounds are numbers of the call
        runs.start(ours, drawing((0, 30))).close()
        assert len(runs.cache) == 2
        assert key in runs.cache._entries
    assert set(emulated.calls) == {"denoise_step", "guidance_step"}


# ---- in company


def rows_of(given: Inputs, k: int) -> slice:
    """Image rows of one sample."""
    start = sum(given.packing.image_lengths[:k])
    return slice(start, start + given.packing.image_lengths[k])


def sample(given: Inputs, k: int) -> Inputs:
    """One sample of the batch by itself."""
    p = given.packing
    texts = sum(p.text_lengths[:k])
    text = given.text[texts : texts + p.text_lengths[k]].clone()
    table = Modulation(given.modulation.blocks[k : k + 1].clone(), given.modulation.final[k : k + 1].clone())
    packing = plan([p.grids[k]], [p.text_lengths[k]], CONFIG.axes_dims_rope, given.image.device)
    return Inputs(packing, given.image[rows_of(given, k)].clone(), text, table)


@pytest.mark.parametrize("way", ["one call", "op by op"])
@pytest.mark.parametrize("case", ["unequal text", "no text"])
def test_a_sample_has_the_same_bits_alone_and_in_company(emulated, forced, case, way):
    """Under batch_invariant, by our GEMMs; other sizes beside it, before it and behind it."""
    together, ours = inputs(case), model()
    ours.batch_invariant = True

    def drawn_by(given: Inputs) -> Tensor:
        emulated.calls.clear()
        if way == "one call":
            assert why_not(ours, given.packing) == ""
            return whole(ours, given)
        return ours.denoise(given.image, given.text, given.modulation, given.packing)

    with torch.no_grad(), on_device(ours, emulated.library) if way == "one call" else contextlib.nullcontext():
        expected = drawn_by(together)
        for k in range(2):
            emulated.seed = 2 * k + 1  # the order of threads is another's
            assert same_bits(drawn_by(sample(together, k)), expected[rows_of(together, k)])
            assert ("denoise_step" in emulated.calls) == (way == "one call")


def accompanied(alone: Job) -> Job:
    """The job with a second picture, whose text is three times as long."""
    longer, unwanted = alone.text.rows[0].repeat(3, 1) * 0.5, alone.negative
    return dataclasses.replace(
        alone,
        grids=alone.grids * 2,
        text=Text([*alone.text.rows, longer], [*alone.text.index, torch.arange(len(longer))]),
        negative=unwanted and Text(unwanted.rows * 2, unwanted.index * 2),
        sigma=alone.sigma.repeat(2, 1),
        first=alone.first.repeat(2),
        x=torch.cat([alone.x, -alone.x]),
    )


def velocities(runs: engine.Engine, model: LensTransformer2DModel, given: Job, rows: int) -> list[Tensor]:
    """Of the first picture in a captured step, with its text and without."""
    run = runs.start(model, given)
    try:
        assert run.captured
        run.step()
        return [v[:rows].clone() for v in run.velocities if v is not None]
    finally:
        run.close()


def test_a_captured_step_draws_a_picture_alone_as_beside_another(emulated, ours):
    """Guided, in bins of other fills."""
    ours.batch_invariant = True
    runs, alone = engine.Engine(GraphCache(RecordingDriver(), 1 << 40)), drawing((0, 9))
    with torch.no_grad():
        found = [velocities(runs, ours, given, len(alone.x)) for given in (alone, accompanied(alone))]
    assert set(emulated.calls) == {"denoise_step", "guidance_step"}
    for one, other in zip(*found, strict=True):
        assert same_bits(one, other)
    assert not same_bits(*found[0])


def test_when_a_step_is_one_call(forced, monkeypatch):
    packing, ours = inputs("no text").packing, model()

    def why() -> str:
        linear_choice.choose.cache_clear()
        return why_not(ours, packing)

    assert why() == ""
    with linear_choice.use("library"):
        assert why() == "the GEMMs are the library's"
    hook = ours.layers()[1].text.w2.register_forward_hook(lambda *_: None)
    monkeypatch.setattr(
        linear_choice, "why_unsupported", lambda call: "" if call.plain else "a layer is no plain Linear"
    )
    with pytest.raises(RuntimeError, match="fused was asked for but cannot run: a layer is no plain Linear"):
        why()
    hook.remove()
    assert why() == ""
    with monkeypatch.context() as patched:
        patched.setattr(attention_choice, "choose", lambda call: attention_choice.CANDIDATES[-1])
        assert why() == "attention is torch-sdpa's"
    with monkeypatch.context() as patched:
        patched.setattr(backend, "without", lambda kernel: f"lens._C was built without {kernel}")
        assert why() == "lens._C was built without denoise_step"
    ours.train()
    assert why() == "the model is in training"


def test_every_block_has_its_own_bound():
    made = model()
    before = bounds(made).tolist()
    for block, bound in zip(made.layers(), before, strict=True):
        streams = block.streams()
        assert bound == score_bound([s.q_norm for s in streams], [s.k_norm for s in streams])
    with torch.no_grad():
        made.layers()[1].text.k_norm.mul_(8)
    after = bounds(made).tolist()
    assert after[0] == before[0]
    assert after[1] > 2 * before[1]


def test_weights_elsewhere_than_on_16_bytes_are_refused():
    made = model()
    room = torch.empty(CONFIG.inner_dim + 1, dtype=torch.bfloat16)
    made.layers()[0].text.norm2.data = room[1:]
    with pytest.raises(ValueError, match=r"lens.denoise_step: weights must be dense and start on 16 bytes"):
        DenoiseStep(made, inputs("no text").packing, 1e-6)
