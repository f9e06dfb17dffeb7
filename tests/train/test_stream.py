"""The stream of training batches: the same bytes whoever renders them, padded ids, packed rows."""

import itertools

import numpy as np
import pytest
import torch

from lens.packing import plan
from train import configs, generator
from train.data.stream import Batch, Source, Stream, Workers, draw, padded


class Small:
    SEED, SIDE, WINDOW, BATCHES, MU, TEXT_DROPOUT = 5, 64, 24, ((0, 8),), 0.5, 0.3


def means(pixels):
    """Stands in for the latent space: mean colour of every token."""
    n, h, w, _ = pixels.shape
    return pixels.reshape(n, h // 16, 16, w // 16, 16, 3).double().mean((2, 4)).reshape(n, -1, 3).float()


def test_workers_change_no_byte_of_the_stream():
    streams = [Stream(Small, Source("mini", 64), means, workers) for workers in (0, 2)]
    try:
        pairs = zip(*(stream.batches(3, 1) for stream in streams))
        for _, (one, two) in zip(range(7), pairs):  # to the end of a window, through one, into the next
            assert one[:2] == two[:2]
            assert one[2].lengths == two[2].lengths
            assert torch.equal(one[2].ids, two[2].ids)
            assert torch.equal(one[2].latents, two[2].latents)
    finally:
        for stream in streams:
            stream.close()


def test_a_window_holds_its_scenes_once_in_batches_of_like_length():
    stream = Stream(Small, Source("mini", 64), means)
    whole = stream.encode(stream.render(range(48, 72)))
    batches = stream.window(2)
    assert sorted(n for batch in batches for n in batch.lengths) == sorted(whole.lengths)
    spans = sorted((min(batch.lengths), max(batch.lengths)) for batch in batches)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    rows = {tuple(ids[:n].tolist()): x for ids, n, x in zip(whole.ids, whole.lengths, whole.latents)}
    for batch in batches:
        for ids, n, x in zip(batch.ids, batch.lengths, batch.latents):
            assert not ids[n:].any()
            assert torch.equal(rows[tuple(ids[:n].tolist())], x)


def test_dropped_captions_come_last_and_nothing_else_moves():
    latents = torch.arange(8.0)[:, None, None].expand(8, 4, 2)
    lengths = [3, 1, 4, 1, 5, 2, 6, 5]
    ids = torch.from_numpy(padded(np.repeat(np.arange(1, 9), lengths), np.array(lengths)))
    step = draw(Small, Batch(latents, ids, lengths), 2)
    kept = len(step.ids)
    assert 0 < kept < 8
    assert [n > 0 for n in step.lengths] == [True] * kept + [False] * (8 - kept)
    clean = (step.x - step.t[:, None, None] * step.target)[:, 0, 0].round().int().tolist()  # x_t - t (eps - x0) = x0
    assert sorted(clean) == list(range(8))
    for row, sample, n in zip(step.ids, clean, step.lengths):
        assert row.tolist() == [sample + 1] * n + [0] * (step.ids.shape[1] - n)
        assert n == lengths[sample]
    again = draw(Small, Batch(latents, ids, lengths), 2)
    assert torch.equal(again.x, step.x)
    assert not torch.equal(draw(Small, Batch(latents, ids, lengths), 3).t, step.t)


def test_no_worker_count_below_zero():
    with pytest.raises(ValueError, match="got -1"):
        Workers(Source("mini", 64), -1)


def test_the_joined_plan_is_the_plan():
    axes, lengths = (8, 28, 28), (7, 3, 0, 7)
    ours, theirs = generator.packing_of((4, 4), lengths, axes), plan([(4, 4)] * 4, list(lengths), axes)
    assert ours.grids == theirs.grids
    assert (ours.image_lengths, ours.text_lengths) == (theirs.image_lengths, theirs.text_lengths)
    for name in ("image_offsets", "text_offsets", "cos", "sin"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_a_recipe_names_its_world():
    world = configs.world("mini", "held_out")
    assert world.split == "held_out"
