"""One denoise step and its buffers.

A step reads everything that changes from step to step or from text to text out of device memory: its own number, the
sigmas and modulation rows of all steps, the texts' offsets. So one captured step serves every step of every schedule,
and all texts of one bin: text rows are rounded up to a multiple of 64 by rows that form a sample of their own behind
the others. Attention never crosses samples and every other operation is row by row, so those rows change nothing; they
are finite, so no kernel that reads a tile across the border meets a NaN. On a CPU nothing is rounded up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lens import sampler
from lens.engine.denoise_step_buffers import DenoiseStep
from lens.engine.job import Job
from lens.model import BLOCK_EPS, LensTransformer2DModel
from lens.modulation import Modulation
from lens.ops import backend
from lens.ops.attention import choice as attention_choice
from lens.ops.denoise_step import OWN_ATTENTION
from lens.ops.linear import choice as linear_choice
from lens.ops.linear.fused import plain
from lens.packing import Binned, Packing, offsets_of, plan
from lens.rope import grid_table

TABLE_ROWS = 32  # a captured step holds the schedules of 32, 64, 128... steps


@dataclass(eq=False)
class Memory:
    """What the multistep solver knows of the steps before."""

    weight: Tensor  # float32 [K, B], how much of the difference of both below a step adds
    clean: Tensor  # float32 [R, C], x0 of the last step taken
    earlier: Tensor  # float32 [R, C], x0 of the step before that one


@dataclass(eq=False)
class State:
    """The buffers a step reads and writes. S samples: B pictures, twice with guidance, and the bin's own."""

    x: Tensor  # float32 [R, C], latents: the step replaces them
    before: Tensor  # float32 [R, C], the latents the step began with
    velocity: Tensor  # [halves * R, C]
    text: Tensor  # [RT, D]
    packing: Packing
    table: Modulation  # K rows, or more
    first: Tensor  # int64 [S]
    index: Tensor  # int64 [1], the step's number
    sigma: Tensor  # float32 [K + 1, B]
    offsets: Tensor  # int32 [B + 1], of the pictures' rows
    noise: Tensor | None  # float32 [R, C] for stochastic steps
    memory: Memory | None  # of a multistep solver
    guidance: float
    halves: int
    adapter: str | None = None
    whole: DenoiseStep | None = None  # the transformer as one call, where every kernel is one of lens._C

    def tensors(self) -> list[Tensor]:
        p, t = self.packing, self.table
        layout = [] if p.layout is None else [p.layout.image_rows, p.layout.text_rows, p.layout.joint_offsets]
        own = [self.x, self.before, self.velocity, self.text, self.first, self.index, self.sigma, self.offsets]
        whole = [] if self.whole is None else self.whole.tensors()
        if (m := self.memory) is not None:
            own += [m.weight, m.clean, m.earlier]
        all_ = [*own, self.noise, t.blocks, t.final, p.image_offsets, p.text_offsets, p.cos, p.sin, *layout, *whole]
        return [x for x in all_ if x is not None]

    @property
    def velocities(self) -> tuple[Tensor, Tensor | None]:
        """(with the text, without it): views [R, C]."""
        *uncond, cond = self.velocity.chunk(self.halves)
        return cond, uncond[0] if uncond else None


@torch.no_grad()
def advance(model: LensTransformer2DModel, state: State) -> None:
    """One step, in place. Nothing in it looks at a value on the host."""
    if state.whole is not None:
        state.whole.take(state.x, state.table, state.first, state.index)
        state.whole.run(state.text, state.velocity)
    else:
        modulation = state.table.rows(state.first + state.index)
        x = state.x.to(model.dtype).repeat(state.halves, 1)
        state.velocity.copy_(model.denoise(x, state.text, modulation, state.packing, adapter=state.adapter))
    state.before.copy_(state.x)
    if state.memory is not None:
        state.memory.earlier.copy_(state.memory.clean)
    state.x.copy_(solve(state, *state.velocities, state.guidance, state.index))
    state.index.add_(1)


def solve(state: State, c: Tensor, u: Tensor | None, guidance: float, index: Tensor) -> Tensor:
    """The latents after step ``index`` from ``before`` along velocities c, u; twice is as good as once."""
    sigma, sigma_next = (state.sigma.index_select(0, i)[0] for i in (index, index + 1))
    if (memory := state.memory) is None:
        return sampler.step(state.before, c, u, sigma, sigma_next, guidance, state.offsets, state.noise)
    v, rows = sampler.guided(c, u, guidance, state.offsets), state.offsets.diff().long()
    weight = memory.weight.index_select(0, index)[0]
    now, following, share = (
        s.repeat_interleave(rows, output_size=len(v))[:, None] for s in (sigma, sigma_next, weight)
    )
    x, clean = sampler.multistep(state.before, v, now, following, share, memory.earlier)
    memory.clean.copy_(clean)
    return x


def _whole(model: LensTransformer2DModel, packing: Packing) -> DenoiseStep | None:
    return None if why_not(model, packing) else DenoiseStep(model, packing, BLOCK_EPS)


def capacity(job: Job) -> int:
    """Rows of the fixed table: the steps, rounded up to 32 times a power of two."""
    rows = TABLE_ROWS
    while rows < job.steps:
        rows *= 2
    return rows


def free_state(model: LensTransformer2DModel, job: Job) -> State:
    """Buffers of one run by itself: exact lengths, any mixture of sizes."""
    x, device = job.x.float().clone(), model.device
    packing = plan(job.all_grids, job.all_indices, model.config.axes_dims_rope, device)
    return State(
        x=x,
        before=torch.empty_like(x),
        velocity=x.new_empty(job.halves * len(x), x.shape[1], dtype=model.dtype),
        text=torch.cat(job.all_texts),
        packing=packing,
        table=job.table,
        first=job.first.repeat(job.halves).to(device),
        index=torch.full((1,), job.step, device=device),
        sigma=job.sigma.T.contiguous().to(device),
        offsets=offsets_of(job.lengths, device),
        noise=torch.empty_like(x) if job.stochastic else None,
        memory=_memory(job, x),
        guidance=job.guidance,
        halves=job.halves,
        adapter=job.adapter,
        whole=_whole(model, packing),
    )


def _memory(job: Job, x: Tensor) -> Memory | None:
    """Of a run by itself, as full as the job's."""
    if (weight := job.second_order) is None:
        return None
    clean = torch.zeros_like(x) if job.clean is None else job.clean.clone()
    return Memory(weight.to(x.device), clean, torch.zeros_like(x))


def fixed_state(model: LensTransformer2DModel, job: Job, binned: Binned) -> State:
    """Empty buffers for every job of the same shape."""
    config, device, rows = model.config, model.device, capacity(job)
    x = torch.empty(job.x.shape, device=device)
    joint = job.halves * len(x) + binned.rows

    def like(table: Tensor) -> Tensor:
        return table.new_zeros(rows, *table.shape[1:])

    def integers(count: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(count, dtype=dtype, device=device)

    def sigmas(more: int = 0) -> Tensor:
        return torch.zeros(rows + more, len(job.grids), device=device)

    samples = len(binned.text_lengths)
    packing = Packing(
        grids=(*job.all_grids, (0, 0)),
        image_lengths=binned.image_lengths,
        text_lengths=binned.text_lengths,
        image_offsets=integers(samples + 1, torch.int32),
        text_offsets=integers(samples + 1, torch.int32),
        cos=torch.empty(joint, config.attention_head_dim // 2, device=device),
        sin=torch.empty(joint, config.attention_head_dim // 2, device=device),
        layout=None if binned.exact else binned.device_layout(lambda host: host.to(device)),
    )
    return State(
        x=x,
        before=torch.empty_like(x),
        velocity=x.new_empty(job.halves * len(x), x.shape[1], dtype=model.dtype),
        text=torch.zeros(binned.rows, config.inner_dim, device=device, dtype=model.dtype),
        packing=packing,
        table=Modulation(like(job.table.blocks), like(job.table.final)),
        first=integers(samples),
        index=integers(1),
        sigma=sigmas(1),
        offsets=offsets_of(job.lengths, device),
        noise=torch.empty_like(x) if job.stochastic else None,
        memory=None if job.solver == "euler" else Memory(sigmas(), torch.zeros_like(x), torch.zeros_like(x)),
        guidance=job.guidance,
        halves=job.halves,
        adapter=job.adapter,
        whole=_whole(model, packing),
    )


def load(model: LensTransformer2DModel, state: State, job: Job, binned: Binned) -> None:
    """Fill fixed buffers with a job of their shape. Pictures of one size share one schedule: table rows 0 .. K - 1."""
    packing, steps, device = state.packing, job.steps, state.x.device
    start = int(job.first[0])  # on the host
    # non_blocking: the host does not wait for what the device is at, usually the text encoder
    state.x.copy_(job.x)
    state.table.blocks[:steps].copy_(job.table.blocks[start : start + steps])
    state.table.final[:steps].copy_(job.table.final[start : start + steps])
    state.sigma[: steps + 1].copy_(job.sigma.T.contiguous(), non_blocking=True)
    if (memory := state.memory) is not None and (weight := job.second_order) is not None:
        memory.weight[:steps].copy_(weight, non_blocking=True)
        memory.clean.zero_() if job.clean is None else memory.clean.copy_(job.clean)
    state.index.fill_(job.step)
    texts = torch.cat(job.all_texts)
    state.text[: len(texts)].copy_(texts)
    state.text[len(texts) :].zero_()
    packing.image_offsets.copy_(binned.image_offsets, non_blocking=True)
    packing.text_offsets.copy_(binned.text_offsets, non_blocking=True)
    if (layout := packing.layout) is not None:
        layout.joint_offsets.copy_(binned.joint_offsets, non_blocking=True)
        if layout.image_rows is not None and layout.text_rows is not None:
            layout.image_rows.copy_(binned.image_rows, non_blocking=True)
            layout.text_rows.copy_(binned.text_rows, non_blocking=True)
    furthest = max((int(index.max()) + 1 for index in job.all_indices if len(index)), default=0)
    cos, sin = grid_table(job.grids[0], max(1, -(-furthest // 512)) * 512, model.config.axes_dims_rope, device)
    source = binned.rope_rows.to(device, non_blocking=True)
    torch.index_select(cos, 0, source, out=packing.cos)
    torch.index_select(sin, 0, source, out=packing.sin)


def why_not(model: LensTransformer2DModel, packing: Packing) -> str:
    """Why steps of this plan run op by op; "" where they are one call."""
    invariant = model.invariant
    if linear_choice.idle(batch_invariant=invariant and model.device.type == "cuda"):
        return "the GEMMs are the library's"  # nearly always, and said without a look at anything else
    if model.training:
        return "the model is in training"
    if why := backend.without("denoise_step"):
        return why
    config, lengths = model.config, list(zip(packing.image_lengths, packing.text_lengths))
    if config.in_channels % 64:
        return f"needs image tokens in multiples of 64 channels, got {config.in_channels}"
    layers = [model.image_in, model.image_out]
    layers += [layer for b in model.layers() for s in b.streams() for layer in (s.qkv, s.out, s.w13, s.w2)]
    calls = linear_choice.gemm_calls(
        config.block_gemms,
        config.attention_head_dim,
        model.device,
        model.dtype,
        0 if invariant else sum(i + t for i, t in lengths),
        plain=all(map(plain, layers)),
        batch_invariant=invariant,
    )
    by_library = [call.gemm for call in calls if linear_choice.choose(call) != "fused"]
    if by_library:
        return f"the GEMMs of {', '.join(by_library)} are the library's"
    longest = max((i + t for i, t in lengths), default=0) if packing.layout is None else packing.layout.longest
    captured, head_dim = packing.layout is not None, config.attention_head_dim
    call = attention_choice.attention_call(
        model.device, model.dtype, head_dim, longest, captured, batch_invariant=invariant
    )
    chosen = attention_choice.choose(call).name
    return "" if chosen == OWN_ATTENTION else f"attention is {chosen}'s"
