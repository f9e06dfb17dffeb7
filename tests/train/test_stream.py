"""The stream of training batches: the same bytes whoever renders them, padded ids, packed rows."""

import itertools
from typing import ClassVar

import numpy as np
import pytest
import torch
from scipy import stats

from lens.packing import plan
from train import configs
from train.data.small_world.batches import Workers, WorldBatch, WorldBatches, WorldSource, bucket_at, draw, law, padded
from train.data.small_world.world import is_held_out
from train.networks import generator
from train.objectives import flow_matching


class Small:
    SEED, SIDE, WINDOW, BATCHES, MU, TEXT_DROPOUT = 5, 64, 24, ((0, 8),), 0.5, 0.3


class Mixed(Small):
    WINDOW, MU = 8, ((16, 0.5), (64, 0.74))
    BUCKETS: ClassVar = {64: (0.5, 5), 96: (0.3, 3), 128: (0.2, 2)}
    RATIOS: ClassVar = {"1:2": 0.2, "1:1": 0.5, "3:2": 0.3}


def means(pixels):
    """Stands in for the latent space: mean colour of every token."""
    n, h, w, _ = pixels.shape
    return pixels.reshape(n, h // 16, 16, w // 16, 16, 3).double().mean((2, 4)).reshape(n, -1, 3).float()


@pytest.mark.parametrize("config", [pytest.param(Small, marks=pytest.mark.nightly), Mixed], ids=["one size", "buckets"])
def test_workers_change_no_byte_of_the_stream(config):
    streams = [WorldBatches(config, WorldSource("mini"), means, workers) for workers in (0, 2)]
    try:
        pairs = zip(*(stream.batches(3, 1) for stream in streams))
        for _, (one, two) in zip(range(7), pairs):  # to the end of a window, through one, into the next
            assert one[:2] == two[:2]
            assert one[2].lengths == two[2].lengths
            assert one[2].grid == two[2].grid
            assert torch.equal(one[2].ids, two[2].ids)
            assert torch.equal(one[2].latents, two[2].latents)
    finally:
        for stream in streams:
            stream.close()


def test_a_window_holds_its_scenes_once_in_batches_of_like_length():
    stream = WorldBatches(Small, WorldSource("mini"), means)
    whole = stream.encode(stream.render(range(48, 72), (64, 64)))
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
    batch = WorldBatch(latents, ids, lengths, (2, 2))
    step = draw(Small, batch, 2)
    kept = len(step.ids)
    assert 0 < kept < 8
    assert [n > 0 for n in step.lengths] == [True] * kept + [False] * (8 - kept)
    clean = (step.x - step.t[:, None, None] * step.target)[:, 0, 0].round().int().tolist()  # x_t - t (eps - x0) = x0
    assert sorted(clean) == list(range(8))
    for row, sample, n in zip(step.ids, clean, step.lengths):
        assert row.tolist() == [sample + 1] * n + [0] * (step.ids.shape[1] - n)
        assert n == lengths[sample]
    again = draw(Small, batch, 2)
    assert torch.equal(again.x, step.x)
    assert not torch.equal(draw(Small, batch, 3).t, step.t)


def test_no_worker_count_below_zero():
    with pytest.raises(ValueError, match="got -1"):
        Workers(WorldSource("mini"), -1)


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


MINI = configs.load("mini", "mixed_resolution")


def test_the_recipe_has_27_buckets_of_equal_cost_and_the_first_stages_mu_at_its_size():
    buckets, sums = law(MINI)
    assert len({(b.base, b.ratio) for b in buckets}) == len(buckets) == 27
    assert all(side % 16 == 0 for b in buckets for side in b.size)
    assert next(b.size for b in buckets if (b.base, b.ratio) == (128, "2:1")) == (
        96,
        176,
    )  # (height, width): W:H is 2:1
    assert sums[-1].item() == pytest.approx(1)
    assert min(MINI.BUCKETS) == MINI.SIDE
    assert flow_matching.mu_of(MINI.MU, 16) == configs.load("mini", "pretrain").MU


def test_buckets_are_drawn_by_their_shares_and_one_tells_nothing_of_the_next():
    """Chi-square over 8,100 batches; and of each base after each base."""
    count, (buckets, sums) = 8_100, law(MINI)
    drawn = [bucket_at(MINI, i) for i in range(count)]
    seen = [drawn.count(bucket) for bucket in buckets]
    expected = sums.diff(prepend=torch.zeros(1)).mul(count).tolist()
    assert stats.chisquare(seen, expected).pvalue > 0.001
    bases = list(MINI.BUCKETS)
    table = np.zeros((3, 3))
    for a, b in itertools.pairwise(drawn):
        table[bases.index(a.base), bases.index(b.base)] += 1
    assert stats.chi2_contingency(table).pvalue > 0.001
    flat = [1 / 27 * count] * 27
    assert stats.chisquare(seen, flat).pvalue < 1e-9  # the test can tell another law


def test_a_window_of_buckets_holds_each_of_its_scenes_once_in_its_own_size():
    stream = WorldBatches(Mixed, WorldSource("mini"), means, first_seed=900)
    batches, places = stream.window(3), {}
    for bucket, at, seeds in stream.plan(3):
        assert len(seeds) == len(at) * bucket.batch
        parts = stream.encode(stream.render(seeds, bucket.size))
        rows = sorted(tuple(x.flatten().tolist()) for x in parts.latents)
        ours = [x for place in at for x in batches[place].latents]
        assert sorted(tuple(x.flatten().tolist()) for x in ours) == rows
        places |= dict.fromkeys(at, (bucket, seeds))
    assert sorted(places) == list(range(Mixed.WINDOW))
    everything = [seed for _, _, seeds in stream.plan(3) for seed in seeds]
    following = [seed for _, _, seeds in stream.plan(4) for seed in seeds]
    assert len(set(everything + following)) == len(everything) + len(following)
    assert min(everything) >= 900
    for place, batch in enumerate(batches):
        bucket = bucket_at(Mixed, 3 * Mixed.WINDOW + place)
        assert places[place][0] == bucket
        assert batch.grid == (bucket.size[0] // 16, bucket.size[1] // 16)
        assert batch.latents.shape[:2] == (bucket.batch, batch.grid[0] * batch.grid[1])


def test_the_stream_of_buckets_is_the_same_from_any_place_on():
    whole = list(itertools.islice(WorldBatches(Mixed, WorldSource("mini"), means).batches(0, 0), 12))
    for start in (3, 8, 11):
        window, position = divmod(start, Mixed.WINDOW)
        again = next(WorldBatches(Mixed, WorldSource("mini"), means).batches(window, position))
        assert again[:2] == whole[start][:2]
        assert torch.equal(again[2].latents, whole[start][2].latents)
        assert torch.equal(again[2].ids, whole[start][2].ids)


@pytest.mark.parametrize("ratio", ["1:2", "1:1", "16:9"])
def test_no_scene_of_any_size_holds_a_fact_kept_for_evaluation(ratio):
    world = configs.world("mini")
    for bucket in law(MINI)[0]:
        if bucket.ratio == ratio:
            for seed in range(MINI.FIRST_SEED, MINI.FIRST_SEED + 60):
                scene = world.scene(seed, *bucket.size)
                assert (scene.height, scene.width) == bucket.size
                chosen = [(thing.kind, thing.colour) for thing in scene.things]
                assert not is_held_out(chosen, scene.sign.text if scene.sign else None)


def test_times_follow_the_mu_of_the_pictures_tokens():
    """Median of t is sigmoid(mu): a batch of 64 tokens is drawn around .74, one of 16 around .5."""
    for tokens, mu in ((16, 0.5), (64, 0.74), (96, 0.90)):
        batch = WorldBatch(
            torch.zeros(2_000, tokens, 1), torch.ones(2_000, 1, dtype=torch.int64), [1] * 2_000, (1, tokens)
        )
        assert torch.logit(draw(Mixed, batch, 0).t).median().item() == pytest.approx(mu, abs=0.01)


def test_shares_that_are_no_whole_are_refused():
    class Wrong(Mixed):
        RATIOS: ClassVar = {"1:2": 0.2, "1:1": 0.5}

    with pytest.raises(ValueError, match=r"BUCKETS, RATIOS: the shares sum to 0\.7, expected 1"):
        law(Wrong)
