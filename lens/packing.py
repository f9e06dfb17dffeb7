"""3. Samples of any size and text length -> packed rows: offsets, gather indices, rotary tables; requests -> batches.

Two packed streams run through the blocks, image rows and text rows, samples back to back and nothing padded.
Attention and the rotary tables use the joint layout, per sample [image | text], so ``joint_offsets = image_offsets +
text_offsets``. The plan is made on the host once per batch and reused for every block and step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .arguments import count
from .ops.attention.layout import DeviceLayout
from .rope import image_positions, rope_table, text_positions

Grid = tuple[int, int]  # (height, width) of a picture in tokens
Item = TypeVar("Item")
TEXT_BIN = 64  # text rows of a captured step are a multiple of this


@dataclass(frozen=True, eq=False)
class Packing:
    """Where every row of a packed batch lives. B samples, RI image rows, RT text rows."""

    grids: tuple[Grid, ...]
    image_lengths: list[int]  # B
    text_lengths: list[int]  # B
    image_offsets: Tensor  # int32 [B+1]
    text_offsets: Tensor  # int32 [B+1]
    cos: Tensor  # float32 [RI+RT, H/2], joint layout
    sin: Tensor  # float32 [RI+RT, H/2], joint layout
    layout: DeviceLayout | None = None  # of a captured step, whose text lengths are not those above but the offsets'

    @property
    def batch_size(self) -> int:
        return len(self.grids)


def offsets_of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """int32 [B+1]: row offset of each sample, the total last."""
    return torch.cumsum(torch.tensor([0, *lengths], dtype=torch.int64), 0).int().to(device, non_blocking=True)


def plan(
    grids: Sequence[Grid],
    text_index: Sequence[Tensor | int],
    axes_dims: tuple[int, ...],
    device: torch.device | str = "cpu",
) -> Packing:
    """Plan a packed batch.

    grids: one (height, width) in tokens per sample. text_index: per sample the positions of its valid text tokens in
    its own padded sequence (int64 [T]), or their number T where they are the first T.
    """
    if len(grids) != len(text_index):
        raise ValueError(
            f"lens.packing.plan: one text_index per grid expected, got {len(text_index)} for {len(grids)} grids"
        )
    tables, image_lengths, text_lengths = [], [], []
    for (height, width), index in zip(grids, text_index):
        index = torch.arange(index) if isinstance(index, int) else index.cpu()
        positions = torch.cat([image_positions(height, width), text_positions(index, height, width)])
        # sample by sample: a vectorised cosine gives the last elements of an array other bits than the same ones inside
        tables.append(rope_table(positions, axes_dims))
        image_lengths.append(height * width)
        text_lengths.append(len(index))
    return Packing(
        grids=tuple((int(h), int(w)) for h, w in grids),
        image_lengths=image_lengths,
        text_lengths=text_lengths,
        image_offsets=offsets_of(image_lengths, device),
        text_offsets=offsets_of(text_lengths, device),
        cos=torch.cat([cos for cos, _ in tables]).to(device),
        sin=torch.cat([sin for _, sin in tables]).to(device),
    )


@dataclass(frozen=True, eq=False)
class Binned:
    """A plan for S pictures of one size whose text rows are rounded up; all tensors on the host.

    The rows that fill the bin are the text of one more sample without a picture, which stands last.
    """

    image_lengths: list[int]  # S + 1
    text_lengths: list[int]  # S + 1
    image_offsets: Tensor  # int32 [S + 2]
    text_offsets: Tensor  # int32 [S + 2]
    image_rows: Tensor  # int64 [RI], places in the joint layout
    text_rows: Tensor  # int64 [RT]
    rope_rows: Tensor  # int64 [RI + RT], of the table [image rows of the grid | text positions]
    longest: int  # rounded up: at least the rows of every sample
    exact: bool = False  # nothing was rounded: the lengths above are those of every text that shares the plan's shape

    @property
    def rows(self) -> int:
        """RT, a multiple of the bin."""
        return sum(self.text_lengths)

    @property
    def in_one_piece(self) -> bool:
        """Whether the joint layout is [all images | all texts], because only the last picture has text."""
        return not any(self.text_lengths[:-2])

    @property
    def joint_offsets(self) -> Tensor:
        return self.image_offsets + self.text_offsets

    def device_layout(self, move: Callable[[Tensor], Tensor]) -> DeviceLayout:
        """The layout that attention reads on the device; ``move`` makes the tensors' copies on the device."""
        image_rows, text_rows = (None, None) if self.in_one_piece else map(move, (self.image_rows, self.text_rows))
        return DeviceLayout(image_rows, text_rows, self.image_lengths[0], self.longest, move(self.joint_offsets))


def bin_texts(grid: Grid, text_index: Sequence[Tensor], size: int = TEXT_BIN) -> Binned:
    """S pictures of size ``grid`` with these text positions (int64 [T] each) -> their plan, text rounded up to ``size``."""
    image, lengths = grid[0] * grid[1], [len(index) for index in text_index]
    exact, total, longest = size == 1, sum(lengths), max(size, *lengths)
    rows = total if exact else max(size, -(-total // size) * size)
    texts = [*lengths, rows - total]
    image_rows, text_rows, rope_rows, start = [], [], [], 0
    picture = torch.arange(image)
    for index in text_index:
        image_rows.append(picture + start)
        text_rows.append(torch.arange(start + image, start + image + len(index)))
        rope_rows += [picture, index.cpu() + image]
        start += image + len(index)
    text_rows.append(torch.arange(start, start + texts[-1]))
    rope_rows.append(torch.zeros(texts[-1], dtype=torch.int64))  # any turn will do
    images = [image] * len(text_index) + [0]
    return Binned(
        image_lengths=images,
        text_lengths=texts,
        image_offsets=offsets_of(images),
        text_offsets=offsets_of(texts),
        image_rows=torch.cat(image_rows),
        text_rows=torch.cat(text_rows),
        rope_rows=torch.cat(rope_rows),
        longest=image + -(-longest // size) * size,
        exact=exact,
    )


def valid_rows(lengths_or_mask: Sequence[int] | Tensor, length: int) -> Tensor:
    """Flat gather indices b * length + j (int64 [R]) of the valid tokens of a padded [B, length, ...] tensor.

    ``lengths_or_mask``: the leading valid tokens of each sample, or a bool mask [B, length] (True = valid).
    """
    if isinstance(lengths_or_mask, Tensor):
        return lengths_or_mask.reshape(-1).nonzero().squeeze(1)
    starts = [torch.arange(n) + b * length for b, n in enumerate(lengths_or_mask)]
    return torch.cat(starts) if starts else torch.zeros(0, dtype=torch.int64)


def expect_tensors(name: str, value: Any) -> list[Tensor]:
    """A caller's tensors, one [B, ...] or a sequence of B -> list; what is no real floating-point tensor raises."""
    try:
        parts = list(value)
    except TypeError:
        parts = [value]
    for part in parts:
        if not isinstance(part, Tensor) or not part.is_floating_point():
            got = part.dtype if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(f"{name} must hold floating-point tensors, got {got}")
    return parts


def pad_features(samples: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], Tensor]:
    """B samples of F tensors [T_b, E] -> F tensors [B, T, E], zero padded on the right, and mask bool [B, T]."""
    lengths = torch.tensor([len(s[0]) for s in samples])
    features = [pad_sequence([s[f] for s in samples], batch_first=True) for f in range(len(samples[0]))]
    return features, torch.arange(int(lengths.max()))[None] < lengths[:, None]


def split_features(
    name: str, features: Sequence[Tensor], mask: Tensor | None, layers: int, width: int
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """A caller's features, checked -> per sample the F tensors [T_b, E] of its valid tokens, their positions [T_b].

    features: F = ``layers`` tensors [B, T, E = ``width``], finite; mask: bool [B, T], True = valid, None: all valid.
    """
    parts = expect_tensors(name, features)
    if isinstance(features, Tensor) or len(parts) != layers:
        got = "one tensor" if isinstance(features, Tensor) else f"{len(parts)} tensors"
        raise ValueError(f"{name} must be a list of F = {layers} tensors [B, T, E], got {got}")
    shape = list(features[0].shape)
    expected = [*shape[:2], width] if len(shape) == 3 else ["B", "T", width]
    for i, tensor in enumerate(features):
        if list(tensor.shape) != expected:
            raise ValueError(f"{name}[{i}] must have the shape [B, T, E] = {expected}, got {list(tensor.shape)}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name}[{i}] holds NaN or infinity")
    if mask is None:
        mask = torch.ones(shape[:2], dtype=torch.bool)
    if not isinstance(mask, Tensor) or list(mask.shape) != shape[:2]:
        own = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"the mask of {name} must be [B, T] = {shape[:2]}, got {own}")
    valid = [row.nonzero().squeeze(1) for row in mask.bool().cpu()]
    return [[f[b][index.to(f.device)] for f in features] for b, index in enumerate(valid)], valid


# ---------------------------------------------------------------------------------------------------- requests


@dataclass(frozen=True)
class Waiting(Generic[Item]):
    """A request in the queue. Only requests of one ``kind`` (steps, guidance) can share a batch."""

    item: Item
    grid: Grid
    tokens: int  # rows of the step it causes: image and text, both halves under guidance
    kind: Hashable


class TokenQueue(Generic[Item]):
    """Requests in, batches out, each of at most ``max_tokens`` packed rows and ``max_images``.

    The oldest request opens the next batch, so one that finds n others waiting is drawn in the (n + 1)-th batch at the
    latest, whatever arrives later. The batch is filled in order of age, first by requests of the same size, which one
    captured step can draw, then, unless ``same_size``, by any others of the kind. A request above the budget goes alone.
    """

    def __init__(self, max_tokens: int, max_images: int = 64, same_size: bool = False):
        self.max_tokens = count("max_tokens", max_tokens)
        self.max_images = count("max_images", max_images)
        self.same_size = same_size
        self._waiting: list[Waiting[Item]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, item: Item, grid: Grid, tokens: int, kind: Hashable = None) -> None:
        """Queue a request of ``tokens`` rows."""
        if tokens < 1:
            raise ValueError(f"lens.TokenQueue: tokens must be positive, got {tokens}")
        self._waiting.append(Waiting(item, grid, tokens, kind))

    def take(self) -> list[Item]:
        """The next batch, oldest first; [] where nothing waits."""
        if not self._waiting:
            return []
        first = self._waiting[0]
        fitting = [w for w in self._waiting[1:] if w.kind == first.kind]
        same = [w for w in fitting if w.grid == first.grid]
        others = [] if self.same_size else [w for w in fitting if w.grid != first.grid]
        taken, tokens = [first], first.tokens
        for w in (*same, *others):
            if len(taken) < self.max_images and tokens + w.tokens <= self.max_tokens:
                taken.append(w)
                tokens += w.tokens
        chosen = {id(w) for w in taken}
        batch = [w.item for w in self._waiting if id(w) in chosen]
        self._waiting = [w for w in self._waiting if id(w) not in chosen]
        return batch

    def batches(self) -> Iterator[list[Item]]:
        """Batches until nothing waits; requests may be added meanwhile."""
        while batch := self.take():
            yield batch
