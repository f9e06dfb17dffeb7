"""Attention among samples whose lengths only the device knows, as in a captured step replayed for other texts."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lens.ops import attention_backends
from lens.ops._attention_bound import HeadNorms
from lens.ops._samples import Samples


class DevicePlaces(NamedTuple):
    """Where the rows of samples lie whose lengths only the device knows: those of a captured step."""

    image_rows: Tensor | None  # int64 [RI], each image row's place in the joint layout; None: the first RI
    text_rows: Tensor | None  # int64 [RT]; None: the rows after the images
    longest_image: int  # at least the image rows of every sample
    longest: int  # at least the rows of every sample
    joint_offsets: Tensor  # int32 [B + 1], image_offsets + text_offsets: added once, not in every block


def in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    images: int,
    image_offsets: Tensor,
    text_offsets: Tensor,
    text_queries: bool,
    scale: float,
    places: DevicePlaces,
    norms: HeadNorms | None,
    invariant: bool,
) -> tuple[Tensor, Tensor]:
    """The same without one look at a length: what a captured step replays for other texts of the same total."""
    need = attention_backends.need_of_call(q, k, v, places.longest, True, invariant)
    if (streams := attention_backends.streams(need)) is not None:
        offsets = image_offsets, text_offsets
        return streams(q, k, v, *offsets, images, places.longest, text_queries, scale, norms)
    longest = places.longest if text_queries else places.longest_image
    query_offsets = places.joint_offsets if text_queries else image_offsets
    if not text_queries:
        q = q[:images] if places.image_rows is None else q.index_select(0, places.image_rows)
    samples = Samples(query_offsets, places.joint_offsets, longest, places.longest, scale, invariant=invariant)
    out = attention_backends.run(q, k, v, samples).flatten(1)
    if not text_queries:
        return out, out[:0]
    image = out[:images] if places.image_rows is None else out.index_select(0, places.image_rows)
    return image, out[images:] if places.text_rows is None else out.index_select(0, places.text_rows)
