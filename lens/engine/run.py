"""Runs: a denoise step executed as it is, or replayed from a CUDA graph that was captured once for all of its shape."""

from __future__ import annotations

import os
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ..model import LensTransformer2DModel
from ..ops import backend
from ..ops.attention import choice as attention_choice
from ..ops.attention import hopper
from ..ops.denoise_step import OWN_ATTENTION
from ..ops.linear import choice as linear_choice
from ..packing import TEXT_BIN, Binned, Grid, bin_texts
from . import batch_invariance
from .content import glance, write_counts
from .graphs import CudaDriver, Entry, Graph, GraphCache, marked
from .job import Job
from .step import State, advance, capacity, fixed_state, free_state, load, solve


class Run:
    """A job on its way. ``x`` and ``velocities`` are views of buffers: copy what is kept beyond the next step."""

    def __init__(self, model: LensTransformer2DModel, state: State, graph: Graph | None, cache: GraphCache[Any] | None):
        self._model = model
        self._state = state
        self._graph = graph
        self._cache = cache

    @property
    def captured(self) -> bool:
        return self._graph is not None

    @property
    def x(self) -> Tensor:
        return self._state.x

    @property
    def velocities(self) -> tuple[Tensor, Tensor | None]:
        """(conditional, unconditional or None) of the last step, [R, C] each, before guidance."""
        return self._state.velocities

    @property
    def clean(self) -> Tensor | None:
        """x0 [R, C] of the last step, where the solver remembers it; a view like ``x``."""
        return None if self._state.memory is None else self._state.memory.clean

    def step(self, noise: Tensor | None = None) -> None:
        """The next step; ``noise`` [R, C] where the job is stochastic."""
        if self._state.noise is not None and noise is not None:
            self._state.noise.copy_(noise)
        with marked("lens step"):
            if self._graph is None:
                advance(self._model, self._state)
            else:
                self._graph.replay()

    @torch.no_grad()
    def retake(self, velocity: Tensor) -> None:
        """Take the last step again along ``velocity`` [R, C], already guided."""
        self._state.x.copy_(solve(self._state, velocity, None, 1.0, self._state.index - 1))

    def close(self) -> None:
        """Give the graphs back to other runs. ``x`` may be overwritten from then on."""
        if self._cache is not None:
            self._cache.release()
            self._cache = None


def _engine(budget: int, text_bin: int, weights_move: bool) -> Engine:
    engine = Engine(None, budget, text_bin)
    engine.weights_move = weights_move
    return engine


class Engine:
    """Starts runs; keeps the captured steps. One per pipeline.

    cache: where captured steps are kept; None makes one on the CUDA device of the model, with ``budget`` bytes
    for graphs, their buffers and their workspace. LENS_GRAPHS=off turns capturing off.
    text_bin: text rows of a captured step are rounded up to a multiple of it. 1 captures every combination of text
    lengths anew: then the host knows the lengths, and attention may be a library that takes one call per sample.
    """

    def __init__(self, cache: GraphCache[State] | None = None, budget: int = 8 << 30, text_bin: int = TEXT_BIN):
        if text_bin < 1:
            raise ValueError(f"lens.Engine: text_bin must be positive, got {text_bin}")
        self.cache = cache
        self.budget = budget
        self.text_bin = text_bin
        self.weights_move = (
            False  # they visit the device for each call: a graph captured earlier would read freed addresses
        )
        self._norms: Hashable = None  # what `watch` saw of them, and how often it saw them change
        self._changes = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy captures its own steps: graphs hold the addresses of one model's weights."""
        return _engine, (self.budget, self.text_bin, self.weights_move)

    def watch(self, model: LensTransformer2DModel) -> None:
        """Forget the bounds of attention's scores, and the graphs that hold them, where a norm was written through ``.data``.

        On a GPU it waits for the weights, so call it where nothing is under way.
        """
        seen = glance(w for block in model.layers() for w in block.norms())
        if self._norms is not None and seen != self._norms:
            hopper.forget()
            self._changes += 1
        self._norms = seen

    def why_not_captured(self, model: LensTransformer2DModel, grids: list[Grid]) -> str:
        """Why steps of this batch run without a graph, or ""."""
        if os.environ.get("LENS_GRAPHS") == "off":
            return "LENS_GRAPHS=off"
        if self.cache is None and model.device.type != "cuda":
            return f"there are no graphs on {model.device.type}"
        if self.weights_move:
            return "the transformer's weights are on demand, elsewhere in memory each time"
        if len(set(grids)) != 1:
            return "sizes are mixed"
        if model.training:
            return "the model is in training"
        if backend.override() == "reference":
            return "the reference ops read lengths on the host"
        try:
            invariant = model.invariant and self.text_bin != 1
            if invariant and (why := batch_invariance.why_library_gemm_of_model(model)):
                return (
                    f"batch_invariant runs the library's GEMMs on text sample by sample ({why}), by lengths the host must "
                    "know: text_bin = 1 captures each combination of them"
                )
            attention_choice.choose(self._attention_call(model, grids[0][0] * grids[0][1], self.text_bin != 1))
        except RuntimeError as error:
            return str(error)
        return ""

    def _attention_call(
        self, model: LensTransformer2DModel, longest: int, device_lengths: bool
    ) -> attention_choice.AttentionCall:
        head_dim = model.config.attention_head_dim
        return attention_choice.attention_call(
            model.device, model.dtype, head_dim, longest, device_lengths, batch_invariant=model.invariant
        )

    @torch.no_grad()
    def start(self, model: LensTransformer2DModel, job: Job) -> Run:
        """A run at step ``job.step``; close it."""
        if self.why_not_captured(model, job.grids):
            return Run(model, free_state(model, job), None, None)
        if self.cache is None or self.cache.device not in (None, model.device):  # the model may have moved
            self.cache = GraphCache(CudaDriver(model.device), self.budget, model.device)
        binned = bin_texts(job.grids[0], job.all_indices, self.text_bin)
        if not self.cache.claim():  # the same buffers' worth of its own, the same kernels, the same bits
            state = fixed_state(model, job, binned)
            load(model, state, job, binned)
            return Run(model, state, None, None)
        try:
            entry = self._entry(self.cache, model, job, binned)
            load(model, entry.state, job, binned)
        except BaseException:
            self.cache.release()
            raise
        return Run(model, entry.state, entry.graph, self.cache)

    def _entry(self, cache: GraphCache[State], model: LensTransformer2DModel, job: Job, binned: Binned) -> Entry[State]:
        placed = self._placement(model)
        cache.keep(
            lambda key: isinstance(key, tuple) and key[0] == placed
        )  # weights that moved left their graphs behind
        attention = attention_choice.choose(self._attention_call(model, binned.longest, not binned.exact)).name
        # the bounds of our own attention's scores are numbers of the graph
        norms: Hashable = ()
        if attention == OWN_ATTENTION:
            norms = self._changes, write_counts(w for block in model.layers() for w in block.norms())
        choices = backend.override(), linear_choice.override.name, attention, norms, model.invariant
        texts: Hashable = binned.rows, binned.longest, binned.in_one_piece
        if binned.exact:
            texts = tuple(binned.text_lengths)
        shape: Hashable = (job.grids[0], len(job.grids), job.halves, texts)
        key = (placed, choices, shape, capacity(job), job.guidance, job.stochastic, job.solver, job.adapter)
        entry = cache.find(key)
        if entry is None:
            state = fixed_state(model, job, binned)
            load(model, state, job, binned)
            size = sum(t.numel() * t.element_size() for t in state.tensors())
            entry = cache.add(key, state, size, lambda: advance(model, state))
        return entry

    def _placement(self, model: LensTransformer2DModel) -> int:
        """Where the weights lie, and in which modules, as one number: a graph holds addresses and what was called."""
        modules: list[Any] = [model]
        for module in modules:  # grows as it is read
            modules += [child for child in module._modules.values() if child is not None]
        pointers = [
            p.data_ptr() for m in modules for p in (*m._parameters.values(), *m._buffers.values()) if p is not None
        ]
        return hash((model.dtype, *map(id, modules), *pointers))
