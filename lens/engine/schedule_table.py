"""The modulation of every step of a schedule as one table, kept; eviction of the weights that make it.

A third of the released model (1.36 of 4.10 billion parameters) depends on the timestep alone. A schedule of K steps
needs K rows of [L blocks, 2 streams, 6, D], computed once; the weights may then leave the device.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lens.modulation import Modulation

if TYPE_CHECKING:
    from lens.model import LensTransformer2DModel


@torch.no_grad()
def table(model: LensTransformer2DModel, timestep: Tensor) -> Modulation:
    """The table of a schedule, timestep [K] on any device -> K rows on the model's device.

    On a CPU each row is computed by itself, so that a step's bits do not depend on how many steps the schedule has.
    """
    timestep = timestep.to(model.device)
    if model.device.type != "cpu":
        return model.modulate(timestep)
    return model.modulate(timestep, alone=True)


class TableCache:
    """Tables of the schedules drawn lately; those that were ``prepared`` stay. Safe to share between threads.

    Tables of another model, or of weights changed since, are forgotten. A change is seen by the version torch keeps of
    every weight on the model's device, and by ``watch``, since writes through ``.data`` have no version. Weights that
    were evicted are not watched: ``forget`` after a change of theirs. A model in training (any of these weights requires
    a gradient) is never cached.
    """

    def __init__(self, capacity: int = 8):
        self.capacity = capacity
        self._lock = threading.Lock()
        self._tables: dict[tuple[Any, ...], tuple[Modulation, bool]] = {}
        self._model: LensTransformer2DModel | None = None
        self._versions: dict[str, tuple[int, int]] = {}
        self._first: Modulation | None = None  # the row of time 1, where all weights are on the model's device
        self._owners: tuple[Any, list[tuple[str, dict[str, Any], str]]] = (None, [])

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy begins empty: tables are made again from the weights of its own model."""
        return TableCache, (self.capacity,)

    def get(self, model: LensTransformer2DModel, timestep: Tensor, prepared: bool = False) -> Modulation:
        """The table of a schedule's times, timestep [K] on the host; made where it is not known yet."""
        key = (tuple(timestep.tolist()), model.dtype, str(model.device))
        weights = self._weights_of(model)
        if any(w.requires_grad for w in weights.values()):
            return table(model, timestep)
        versions = {n: (w.data_ptr(), 0 if w.is_inference() else w._version) for n, w in weights.items()}
        with self._lock:
            if self._model is not model or any(self._versions.get(n, v) != v for n, v in versions.items()):
                self._tables.clear()
                self._first = None
            self._model = model
            self._versions |= versions
            if key in self._tables:
                made, kept = self._tables.pop(key)  # to the end: the latest used
                self._tables[key] = made, prepared or kept
                return made
        made = table(model, timestep)
        first = _first_row(model) if self._first is None and len(weights) == len(self._owners[1]) else None
        with self._lock:
            self._first = self._first or first
            if self._model is model and all(self._versions[n] == v for n, v in versions.items()):
                kept = self._tables.get(key, (made, False))[1]
                self._tables[key] = made, prepared or kept
                passing = [k for k, (_, stays) in self._tables.items() if not stays]
                for old in passing[: -self.capacity]:
                    del self._tables[old]
        return made

    def watch(self, model: LensTransformer2DModel) -> None:
        """Forget the tables where the weights make another row now than they did: a write through ``.data``.

        One row is made anew, of time 1, with which every schedule begins. It reads each weight once, as one step of a
        table does; on a GPU it waits for the result, so call it where nothing is under way.
        """
        if self._first is None or self._model is not model or model.device != self._first.blocks.device:
            return
        weights = [owner[name] for _, owner, name in self._owners[1]]
        if self._owners[0] is not model or any(w.device != model.device or w.requires_grad for w in weights):
            return
        now = _first_row(model)
        with self._lock:
            before = self._first
            if before is None or before.blocks.dtype != now.blocks.dtype:
                return
            if not (torch.equal(before.blocks, now.blocks) and torch.equal(before.final, now.final)):
                self._tables.clear()
                self._first = now

    def _weights_of(self, model: LensTransformer2DModel) -> dict[str, Tensor]:
        """The weights a table is made of, by name; without those that were evicted from the model's device."""
        if self._owners[0] is not model:  # walking the modules costs more than all that follows
            self._owners = (model, _owners(model))
        device = model.device
        return {name: p for name, owner, n in self._owners[1] if (p := owner[n]).device == device}

    def forget(self) -> None:
        """Drop every table, prepared ones too: the weights were changed behind torch's back."""
        with self._lock:
            self._tables.clear()
            self._first = None


@torch.no_grad()
def _first_row(model: LensTransformer2DModel) -> Modulation:
    return model.modulate(torch.ones(1, device=model.device))


def _owners(model: LensTransformer2DModel) -> list[tuple[str, dict[str, Any], str]]:
    """(name, the module's own parameters, key in them) of every weight a table is made of."""
    modules: dict[str, nn.Module] = {"final": model.final_modulation}
    modules |= {f"time.{name}": m for name, m in model.time_embedding.named_children()}
    for i, block in enumerate(model.layers()):
        modules |= {f"{i}.image": block.image.modulation, f"{i}.text": block.text.modulation}
    return [(f"{name}.{key}", m._parameters, key) for name, m in modules.items() for key in m._parameters]


def evict(model: LensTransformer2DModel, device: torch.device | str = "cpu") -> int:
    """Move the blocks' modulation weights to ``device``; returns their bytes. ``"meta"`` drops them for good.

    Tables already made stay valid. A new schedule computes each projection where its weights are ("cpu") or raises
    RuntimeError ("meta"), so ``LensPipeline.prepare`` the schedules to be drawn first.
    """
    moved = 0
    for block in model.layers():
        for stream in (block.image, block.text):
            if stream.modulation.weight.is_meta:  # they were left in the files
                continue
            moved += sum(p.numel() * p.element_size() for p in stream.modulation.parameters())
            stream.modulation.to(device)
    return moved
