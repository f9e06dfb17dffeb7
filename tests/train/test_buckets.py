"""Proofs 6 to 8 of the bucket sampler: the table and the nearest aspect, the bucket law, exactly once on any world size."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lens.resolution import MINI_BASES
from train.data.buckets import (
    ASPECTS,
    BASES,
    BATCH,
    BLOCK,
    WINDOW,
    Bucket,
    BucketLaw,
    BucketSampler,
    cover_box,
    eligible,
    nearest_aspect,
    outputs,
    permutation,
    philox,
    uniforms,
)

# W x H as the paper prints them; written down again on purpose
TABLE = {
    512: ["352x704", "384x672", "416x640", "448x608", "512x512", "608x448", "640x416", "672x384", "704x352"],
    768: ["544x1088", "576x1024", "640x960", "672x896", "768x768", "896x672", "960x640", "1024x576", "1088x544"],
    1024: ["736x1472", "768x1376", "832x1248", "864x1152", "1024x1024", "1152x864", "1248x832", "1376x768", "1472x736"],
}
ALL = [Bucket(base, aspect) for base in BASES for aspect in ASPECTS]
SIZES = {bucket: 900 + 137 * i for i, bucket in enumerate(ALL)}


def sampler(sizes=SIZES, seed=3, slots=8, **law):
    return BucketSampler(sizes, BucketLaw(**law), seed, slots)


def test_the_table_of_27():
    got = {base: [f"{b.size[1]}x{b.size[0]}" for b in ALL if b.base == base] for base in BASES}
    assert got == TABLE
    for bucket in [*ALL, *(Bucket(base, aspect) for base in MINI_BASES for aspect in ASPECTS)]:
        assert not any(side % 16 for side in bucket.size)
        assert bucket.tokens == bucket.size[0] * bucket.size[1] // 256
        w, h = map(int, bucket.aspect.split(":"))
        assert (bucket.size[1] > bucket.size[0]) == (w > h)  # "16:9" is wider than high
        assert Bucket.of(bucket.name) == bucket
    with pytest.raises(ValueError, match="base_resolution"):
        Bucket.of("12_1x1")


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 20_000), st.integers(1, 20_000), st.permutations(ASPECTS))
def test_the_nearest_aspect_is_the_nearest_in_log_ratio(height, width, order):
    chosen = nearest_aspect(height, width, order)

    def distance(aspect):
        w, h = map(int, aspect.split(":"))
        return abs(math.log(Fraction(width * h, height * w)))

    assert distance(chosen) <= min(map(distance, ASPECTS)) + 1e-9
    assert chosen == nearest_aspect(height, width)  # whatever the order they are offered in
    w, h = chosen.split(":")
    if distance(chosen) < 1e-9 or sorted(map(distance, ASPECTS))[1] - distance(chosen) > 1e-9:
        assert nearest_aspect(width, height) == f"{h}:{w}"  # turned, the turned one


def test_where_two_aspects_are_as_near_the_squarer_is_taken():
    assert nearest_aspect(1000, 1000, ("2:1", "1:2")) == "1:2"
    assert nearest_aspect(100, 141, ("2:1", "1:1")) == "1:1"
    assert nearest_aspect(100, 142, ("2:1", "1:1")) == "2:1"


@settings(max_examples=150, deadline=None)
@given(st.integers(100, 3_000), st.integers(100, 3_000), st.sampled_from(ALL))
def test_nothing_eligible_is_ever_enlarged(height, width, bucket):
    left, top, right, bottom = cover_box(height, width, bucket.size)
    assert left >= -1e-9
    assert top >= -1e-9
    assert right <= width + 1e-9
    assert bottom <= height + 1e-9
    assert (left + right, top + bottom) == (pytest.approx(width), pytest.approx(height))
    h, w = bucket.size
    assert (right - left) / (bottom - top) == pytest.approx(w / h)
    assert right - left == pytest.approx(width) or bottom - top == pytest.approx(height)
    if abs(right - left - w) > 1e-6:
        assert eligible(height, width, bucket) == (right - left > w)


@pytest.mark.parametrize(
    ("height", "width", "bucket", "want"),
    [
        (512, 512, Bucket(512, "1:1"), True),
        (511, 900, Bucket(512, "1:1"), False),
        (2_000, 511, Bucket(512, "1:1"), False),
        (1_472, 736, Bucket(1024, "1:2"), True),
        (1_450, 730, Bucket(1024, "1:2"), False),  # more than 1024^2 pixels, and yet it would have to grow
        (1_152, 864, Bucket(1024, "3:4"), True),  # has fewer, and yet it is the bucket's very size
    ],
)
def test_eligible_at_the_border(height, width, bucket, want):
    assert eligible(height, width, bucket) is want


def test_a_picture_of_a_buckets_very_size_serves_it():
    fewer = [bucket for bucket in ALL if bucket.size[0] * bucket.size[1] < bucket.base**2]
    assert len(fewer) == 8
    for bucket in ALL:
        height, width = bucket.size
        assert eligible(height, width, bucket)
        assert not eligible(height - 1, width, bucket)
        assert not eligible(height, width - 1, bucket)


def test_how_much_a_picture_may_grow():
    square = Bucket(512, "1:1")
    assert eligible(384, 384, square, 1.34)  # the paper's smallest picture
    assert not eligible(384, 384, square, 1.33)
    assert not eligible(600, 381, square, 1.34)


def test_outputs_cost_nothing_to_reach_and_are_numpys():
    whole = philox(5, "bucket").random_raw(64)
    for first in range(24):
        assert (outputs(philox(5, "bucket"), first, 30) == whole[first : first + 30]).all()
    far = outputs(philox(5, "bucket"), 10**15 + 3, 5)
    assert (far == outputs(philox(5, "bucket"), 10**15, 8)[3:]).all()
    assert len({philox(*key).random_raw() for key in [(1, "a"), (2, "a"), (1, "b"), (1, "a", 0), (1, "a", 1)]}) == 5


def test_the_stream_is_fixed_for_good():
    """Recorded: a NumPy or a change of ours that moves these moves every training."""
    assert sampler().draw(0, 16).tolist() == [26, 10, 1, 23, 17, 0, 14, 10, 9, 26, 26, 9, 25, 4, 4, 20]
    assert permutation(8, 3, "blocks", "512_1x1", 0).tolist() == [5, 0, 6, 1, 4, 3, 7, 2]
    assert sampler().members(4, 100, 6).tolist() == [419, 658, 847, 1116, 659, 583]


@pytest.mark.parametrize(
    "law", [{}, {"base": {512: 1, 768: 2, 1024: 5}}, {"aspect": "uniform"}, {"aspect": {"1:1": 3.0, "2:1": 1.0}}]
)
def test_chi_square_of_the_bucket_law(law):
    s = sampler(**law)
    drawn = np.bincount(s.draw(0, 200_000), minlength=len(s.buckets))
    weights = law.get("base", {512: 1, 768: 1, 1024: 1})
    aspect, want = law.get("aspect", "data"), {}
    for base, share in weights.items():
        own = {
            b: n if aspect == "data" else 1 if aspect == "uniform" else aspect.get(b.aspect, 0)
            for b, n in SIZES.items()
            if b.base == base
        }
        want |= {b: share / sum(weights.values()) * w / sum(own.values()) for b, w in own.items() if w}
    assert set(s.buckets) == set(want)
    expected = np.array([want[b] for b in s.buckets])
    assert stats.chisquare(drawn, 200_000 * expected).pvalue > 1e-3
    bent = expected * np.where(np.arange(len(expected)) < len(expected) // 2, 0.97, 1)
    assert stats.chisquare(drawn, 200_000 * bent / bent.sum()).pvalue < 1e-3  # the test sees 3 %
    assert sum(s.probability.values()) == 1  # exactly: they are fractions


def test_ranks_and_steps_are_independent():
    s = sampler(slots=8, aspect="uniform")
    base = np.array([BASES.index(b.base) for b in s.buckets])[s.draw(0, 8 * 20_000)].reshape(-1, 8)
    pairs = [
        (base[:, 0], base[:, 1]),
        (base[:, 0], base[:, 7]),
        (base[:-1, 2], base[1:, 2]),
        (base[:-1, 7], base[1:, 0]),
    ]
    for a, b in pairs:
        table = np.zeros((3, 3), int)
        np.add.at(table, (a, b), 1)
        assert stats.chi2_contingency(table).pvalue > 1e-3


def test_batches_are_those_of_their_base():
    s = sampler(slots=8)
    seen = set()
    for _, micro in zip(range(400), s.stream()):
        assert len(micro.members) == BATCH[micro.bucket.base] == {512: 24, 768: 10, 1024: 6}[micro.bucket.base]
        assert (micro.step, micro.slot) == divmod(micro.number, 8)
        seen.add(micro.bucket.base)
    assert seen == set(BASES)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4 * BLOCK * WINDOW + 70), st.integers(0, 3), st.integers(0, 5), st.integers(0, 2**31))
def test_every_epoch_holds_every_member_once(n, epoch, seed, cut):
    s = sampler({Bucket(512, "1:1"): n}, seed)
    order = s.members(0, epoch * n, n)
    assert np.array_equal(np.sort(order), np.arange(n))
    cut %= n
    pieces = [s.members(0, epoch * n, cut), s.members(0, epoch * n + cut, n - cut)]  # any way of asking for it
    assert np.array_equal(np.concatenate(pieces), order)
    across = s.members(0, epoch * n + n // 2, n)
    assert np.array_equal(across[n - n // 2 :], s.members(0, (epoch + 1) * n, n // 2))


def test_reads_stay_within_a_window_of_blocks():
    n = 40 * BLOCK * WINDOW + 17
    s = sampler({Bucket(512, "1:1"): n})
    order = s.members(0, 0, n)
    for start in range(0, n - BLOCK * WINDOW, BLOCK * WINDOW):
        assert len(np.unique(order[start : start + BLOCK * WINDOW] // BLOCK)) <= WINDOW + 2
    # and yet mixed: the ranks of positions and members do not correlate, nor do two epochs agree
    assert abs(stats.spearmanr(np.arange(n), order).statistic) < 0.08
    assert (order == s.members(0, n, n)).mean() < 0.001
    inside = order[: BLOCK * WINDOW]
    assert (np.diff(inside) == 1).mean() < 0.01


def test_the_place_of_a_member_is_uniform():
    n, epochs = 12, 1_500
    s = sampler({Bucket(512, "1:1"): n})
    order = s.members(0, 0, n * epochs).reshape(epochs, n)
    table = np.stack([np.bincount(order[:, place], minlength=n) for place in range(n)])
    assert stats.chisquare(table.ravel(), ddof=2 * n - 2).pvalue > 1e-3


def sequence(micros):
    return [(m.number, m.bucket.name, m.ordinal, *m.members.tolist()) for m in micros]


@pytest.mark.parametrize("world", range(1, 9))
def test_any_world_size_gives_one_global_stream(world):
    slots, steps = 840, 2
    s = sampler(slots=slots)
    whole = sequence(m for _, m in zip(range(steps * slots), s.stream(5)))
    ranks = [sequence(m for _, m in zip(range(steps * slots // world), s.stream(5, r, world))) for r in range(world)]
    assert sorted(row for own in ranks for row in own) == whole
    for rank, own in enumerate(ranks):
        assert all(row[0] % slots % world == rank for row in own)
        assert [row[0] for row in own] == sorted(row[0] for row in own)
    assert len({row[0] for row in whole}) == len(whole)


@pytest.mark.parametrize("world", [3, 5, 7])
def test_ranks_that_do_not_divide_the_slots_share_them_all_the_same(world):
    s = sampler(slots=8)
    whole = sequence(m for _, m in zip(range(16), s.stream(5)))
    counts = [2 * len(range(rank, 8, world)) for rank in range(world)]
    ranks = [sequence(m for _, m in zip(range(n), s.stream(5, r, world))) for r, n in enumerate(counts)]
    assert sorted(row for own in ranks for row in own) == whole
    with pytest.raises(ValueError, match="8 slots on rank 0 of 9, expected at most as many"):
        next(s.stream(0, 0, 9))


def test_data_that_grows_comes_with_the_next_epoch():
    """Every epoch of every bucket holds its members once: those of before until it ends, then all; a new bucket at once."""
    a, b, c = Bucket(512, "1:1"), Bucket(768, "2:1"), Bucket(1024, "9:16")
    first, second, third = {a: 131, b: 64}, {a: 170, b: 64}, {a: 170, b: 90, c: 29}
    grown = [(5, second), (9, third)]

    def grows(*later):
        return BucketSampler(first, BucketLaw(), 8, 12, later)

    s, steps = grows(*grown), 60
    rows = [m for _, m in zip(range(12 * steps), s.stream())]
    assert sequence(rows[:60]) == sequence(
        m for _, m in zip(range(60), grows().stream())
    )  # nothing before it is another
    assert sequence(rows[60:108]) == sequence(m for _, m in zip(range(48), grows(grown[0]).stream(5)))
    assert min(m.step for m in rows if m.bucket == c) >= 9
    for bucket, known in ((a, ((0, 131), (5, 170))), (b, ((0, 64), (9, 90))), (c, ((9, 29),))):
        own = [m for m in rows if m.bucket == bucket]
        given_out, begun = (
            np.concatenate([m.members for m in own]),
            np.repeat([m.step for m in own], len(own[0].members)),
        )
        at, sizes = 0, []
        while at < len(given_out):
            n = max(size for step, size in known if step <= begun[at])
            # an epoch that began before the step keeps its size
            epoch = given_out[at : at + n]
            assert len(np.unique(epoch)) == len(epoch)
            assert epoch.max() < n
            sizes.append(n)
            at += n
        assert sizes == sorted(sizes)
        assert sizes[-1] == known[-1][1]
    assert sequence(m for _, m in zip(range(24), s.stream(s.state(30)))) == sequence(rows[360:384])
    assert len({grows().fingerprint, grows(grown[0]).fingerprint, s.fingerprint, grows((6, second)).fingerprint}) == 4
    with pytest.raises(ValueError, match="512_1x1 has 130 samples from step 5 on and 131 before"):
        grows((5, {a: 130, b: 64}))


def test_exactly_once_over_a_training_whose_world_size_changes():
    """Two epochs of every bucket, collected from ranks that come and go, resumed from saved states."""
    sizes = {Bucket(512, "1:1"): 131, Bucket(768, "2:1"): 64, Bucket(1024, "9:16"): 29}
    s, rows, state = sampler(sizes, seed=8, slots=12), [], 0
    for world, steps in ((3, 2), (1, 1), (12, 3), (4, 5), (2, 4), (6, 5)):
        for rank in range(world):
            again = sampler(sizes, seed=8, slots=12)  # another process
            stream = again.stream(state, rank, world)
            rows += [m for _, m in zip(range(steps * 12 // world), stream)]
        state = s.state((state if isinstance(state, int) else state["step"]) + steps)
    assert state["step"] == 20
    assert sum(state["counts"]) == 240
    assert sequence(sorted(rows, key=lambda m: m.number)) == sequence(m for _, m in zip(range(240), s.stream()))
    for bucket, n in sizes.items():
        own = sorted((m for m in rows if m.bucket == bucket), key=lambda m: m.number)
        given_out = np.concatenate([m.members for m in own])
        for epoch in range(len(given_out) // n):
            assert np.array_equal(np.sort(given_out[epoch * n : (epoch + 1) * n]), np.arange(n))
        assert len(given_out) >= 2 * n


def test_resuming_anywhere_goes_on_with_the_same_stream():
    s = sampler(slots=6)
    whole = sequence(m for _, m in zip(range(6 * 300), s.stream(ahead=7)))
    for step in (0, 1, 63, 64, 65, 200, 299):
        fresh = sampler(slots=6)
        for start in (step, s.state(step)):
            got = sequence(m for _, m in zip(range(6), fresh.stream(start)))
            assert got == whole[6 * step : 6 * step + 6]


def test_counting_far_ahead_is_counting(monkeypatch):
    from train.data import buckets

    s = sampler(slots=128)
    direct = np.bincount(s.draw(0, 100_003), minlength=27)
    monkeypatch.setattr(buckets, "CHUNK", 1_000)
    assert np.array_equal(s.counts(100_003), direct)


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"slots": 4}, {"base": {512: 1, 768: 1, 1024: 2}}, {"batch": {**BATCH, 512: 23}}, "sizes"]
)
def test_the_state_of_another_stream_is_refused(change):
    sizes = {**SIZES, ALL[0]: 901} if change == "sizes" else SIZES
    other = sampler(sizes, **({} if change == "sizes" else change))
    with pytest.raises(ValueError, match="another seed"):
        next(other.stream(sampler().state(3)))


def test_what_cannot_be_sampled_says_so():
    with pytest.raises(ValueError, match="base 1440 has weight 1 and 0 buckets"):
        sampler(base={512: 1, 1440: 1})
    with pytest.raises(
        ValueError, match="BATCH: base 512 has no number of pictures in a micro-batch, expected at least 1"
    ):
        sampler(batch={768: 10, 1024: 6})
    with pytest.raises(ValueError, match="'often'"):
        sampler(aspect="often")
    with pytest.raises(ValueError, match="no bucket"):
        sampler({ALL[0]: 0})
    state = sampler().state(3)
    state["counts"][state["counts"].index(max(state["counts"]))] -= 1
    with pytest.raises(ValueError, match="23 micro-batches counted at step 3"):
        next(sampler().stream(state))
    with pytest.raises(ValueError, match="slots must be positive"):
        sampler(slots=0)


def test_uniforms_are_uniform_and_keyed():
    u = uniforms(7, "text dropout", 4_096, 20_000)
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert np.array_equal(uniforms(7, "text dropout", 5_000, 10), u[904:914])
    assert not np.array_equal(uniforms(8, "text dropout", 4_096, 10), u[:10])
