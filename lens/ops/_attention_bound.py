"""How large a score q . k can become, from the weights of the norms before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class HeadNorms(NamedTuple):
    """Weights [H] of the norms that made q and k."""

    image_q: Tensor
    image_k: Tensor
    text_q: Tensor
    text_k: Tensor


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by a block's first norm


def score_bound(q_weights: Sequence[Tensor], k_weights: Sequence[Tensor], scale: float | None = None) -> float:
    """H * scale * max over pairs i of (max |w_q| * max |w_k|), with both entries of pair i and every weight given.

    q_weights, k_weights: [H] each, the norms of all streams, H even; scale: H^-0.5 by default

    q is w * n with |n|^2 <= H, by RMSNorm, then turned within the pairs (2i, 2i + 1). With |n_i| the length of pair i,
    |q_i| <= max |w_i| |n_i|, so |q . k| <= sum_i |q_i| |k_i| <= max_i(max |w_q,i| max |w_k,i|) |n| |m|, and |n| |m| <=
    H. Two roundings to bfloat16, 2^-9 each, and the tables' own are in the result.
    """

    def by_pair(weights: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack([w.detach().to("cpu", torch.float64) for w in weights]).abs()
        return stacked.amax(0).view(-1, 2).amax(1)

    head_dim = q_weights[0].shape[0]
    scale = head_dim**-0.5 if scale is None else scale
    return 1.01 * head_dim * scale * float((by_pair(q_weights) * by_pair(k_weights)).max())


def known_bound(norms: HeadNorms, scale: float) -> float | None:
    """The same, remembered until a weight changes; None for weights that do not tell when they change.

    The first call for a block copies its weights to the host.
    """
    if torch.compiler.is_compiling() or any(w.is_inference() for w in norms):
        return None
    state = scale, *((w.data_ptr(), w._version) for w in norms)
    found = _known.get(norms.image_q)
    if found is None or found[0] != state:
        bound = score_bound([norms.image_q, norms.text_q], [norms.image_k, norms.text_k], scale)
        found = _known[norms.image_q] = state, bound
    return float(found[1])
