"""What weights hold, at a glance: what was made from them and is kept must go when they are written to.

torch counts the writes to a tensor, but not those through ``.data``, by which scripts merge and scale weights. So content
is looked at as well, which costs far less than reading all of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor

WHOLE = 4096  # elements up to which a tensor is read whole: norms, biases, sinks
SAMPLES = 64  # elements that are read of every other, evenly spread


def glance(weights: Iterable[Tensor]) -> Hashable:
    """Equal to a later one as long as nothing wrote to the weights and none was replaced; moving them changes nothing.

    A write through ``.data`` is seen where it changes an element that is read: any that scales, adds to or replaces a
    weight, but hardly one to a few elements of a large weight.
    """
    weights = list(weights)
    return tuple(map(id, weights)), write_counts(weights), content(weights)


def write_counts(weights: Iterable[Tensor]) -> tuple[int, ...]:
    """torch's own counts, 0 of tensors of inference mode, which have none."""
    return tuple(0 if w.is_inference() else w._version for w in weights)


@torch.no_grad()
def content(tensors: Iterable[Tensor]) -> tuple[bytes, ...]:
    """All elements of small tensors, some of large ones. On a GPU it waits for them."""
    parts: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if not tensor.is_meta:
            flat = tensor.detach().flatten()
            step = 1 if len(flat) <= WHOLE else -(-len(flat) // SAMPLES)
            parts.setdefault((tensor.dtype, tensor.device), []).append(flat[::step])
    return tuple(torch.cat(own).cpu().view(torch.uint8).numpy().tobytes() for own in parts.values())
