"""The attention kernel for sm_90a, run thread by thread on the CPU, against attention in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lens.ops import backend
from lens.ops.attention import hopper as own
from tests.emulation import emulator
from tests.ops.harness import error, offsets_of, same_bits

INFINITE = math.inf
MODES = {  # bound of the scores, polynomials of four exponentials
    "running": (INFINITE, 0),
    "running, polynomial": (INFINITE, 1),
    "fixed": (40.0, 0),
    "fixed, polynomial": (40.0, 1),
}
# image rows, text rows of every sample, heads
LENGTHS = {
    "1": ([1], [0], 1),
    "63": ([63], [0], 1),
    "64": ([64], [0], 1),
    "65": ([65], [0], 1),
    "a full tile": ([128], [0], 1),
    "a tile and a row": ([128], [1], 1),
    "no text beside text": ([150, 90], [40, 0], 2),
    "text alone": ([0, 70], [130, 2], 1),
    "five samples": ([3, 129, 0, 64, 1], [5, 2, 0, 0, 200], 1),
    "three blocks": ([300], [60], 1),
}


@pytest.fixture(scope="module")
def library():
    return emulator.Emulator(emulator.build(emulator.SOURCE, "joint_attention"))


@pytest.fixture
def hopper(library, monkeypatch):
    library.seed, library.multiprocessors = 0, 3
    monkeypatch.setattr(backend, "launch", library.launch)
    return library


def draw(images: list[int], texts: list[int], heads: int, size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    shape = sum(images) + sum(texts), heads, 64
    return [(torch.randn(shape, generator=generator) * s).to(torch.bfloat16) for s in (size, size, 1.0)]


def attend(qkv, images, texts, bound=INFINITE, polynomial=0, text_queries=True, scale=0.125):
    """(image_out, text_out, lse) of the kernel."""
    places = offsets_of(images), offsets_of(texts), sum(images)
    with torch.no_grad():
        return own.forward(*qkv, *places, text_queries, scale, bound, polynomial, True)


def expected(qkv, images, texts, scale=0.125, rounded=False):
    """The same in float64; `rounded` rounds probabilities and result to bfloat16, as any fast kernel does."""
    q, k, v = (x.double() for x in qkv)
    image, text, lse, start = [], [], [], 0
    for i, t in zip(images, texts, strict=True):
        rows = slice(start, start + i + t)
        logits = torch.einsum("qnh,knh->nqk", q[rows], k[rows]) * scale
        lse.append(logits.logsumexp(-1))
        p = logits.softmax(-1)
        if rounded and i + t:
            most = p.amax(-1, keepdim=True)
            p = (p / most).bfloat16().double() * most
        out = torch.einsum("nqk,knh->qnh", p, v[rows]).flatten(1)
        image.append(out[:i])
        text.append(out[i:])
        start += i + t
    cast = torch.bfloat16 if rounded else torch.float64
    return torch.cat(image).to(cast), torch.cat(text).to(cast), torch.cat(lse, -1)


def against_spec(hopper, images, texts, heads, mode, seed=0, text_queries=True, qkv=None):
    qkv = draw(images, texts, heads) if qkv is None else qkv
    hopper.seed = seed
    got = attend(qkv, images, texts, *MODES[mode], text_queries)
    exact, plain = expected(qkv, images, texts), expected(qkv, images, texts, rounded=True)
    assert got[1].shape[0] == (sum(texts) if text_queries else 0)
    for part in (0, 1) if text_queries else (0,):
        if exact[part].numel():
            floor = torch.finfo(torch.bfloat16).eps * exact[part].abs().max().item()
            assert error(got[part], exact[part]) <= 2 * error(plain[part], exact[part]) + floor
    asked = torch.cat([torch.arange(i + t) < (i + t if text_queries else i) for i, t in zip(images, texts)])
    torch.testing.assert_close(got[2][:, asked].double(), exact[2][:, asked], atol=5e-5, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", LENGTHS)
def test_lengths(hopper, case, mode):
    against_spec(hopper, *LENGTHS[case], mode, seed=20 + len(case) % 2)


@pytest.mark.parametrize("seed", range(1, 7))
def test_orders_of_threads_and_copies(hopper, seed):
    against_spec(hopper, [200, 130], [60, 0], 1, "running" if seed % 2 else "fixed, polynomial", seed)


@pytest.mark.parametrize("mode", ["running", "fixed, polynomial"])
def test_text_that_asks_nothing(hopper, mode):
    images, texts, _ = LENGTHS["no text beside text"]
    against_spec(hopper, images, texts, 1, mode, text_queries=False)
    against_spec(hopper, [0, 70], [130, 2], 1, mode, text_queries=False)


@pytest.mark.nightly
@pytest.mark.parametrize("mode", MODES)
def test_released_length(hopper, mode):
    against_spec(hopper, [4096], [415], 1, mode)


# ------------------------------------------------------------------------------------------------ extreme values


def test_scores_beyond_every_fixed_range(hopper):
    """Scores of thousands, one key hot in every row, values as large as float16 no longer holds."""
    q, k, v = draw([200], [60], 1, size=20.0)
    k[33] *= 8
    v *= 1e5
    against_spec(hopper, [200], [60], 1, "running", qkv=[q, k, v])
    against_spec(hopper, [200], [60], 1, "running, polynomial", qkv=[q, k, v])


@pytest.mark.parametrize("mode", MODES)
def test_identical_keys(hopper, mode):
    """Every probability is the same: the mean of the values, over full and partial blocks, but for two roundings."""
    q, k, v = draw([200], [60], 1)
    k[:] = k[0]
    image, text, _ = attend([q, k, v], [200], [60], *MODES[mode])
    mean = v.double().mean(0).flatten()
    assert error(torch.cat([image, text]), mean.expand(260, 64)) < 2**-7 * mean.abs().max()
    against_spec(hopper, [200], [60], 1, mode, qkv=[q, k, v])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("polynomial", [0, 1])
def test_fixed_range_from_end_to_end(hopper, sign, polynomial):
    """All scores at one end of the range, then half of them at either: nothing overflows, nothing is lost."""
    q = torch.full((260, 1, 64), 2.25).bfloat16()
    k = torch.full((260, 1, 64), 2.25 * sign).bfloat16()  # scores of 40.5
    v = draw([200], [60], 1)[2] * 1e5
    for keys in (k, torch.cat([k[:130], -k[130:]])):
        got = attend([q, keys, v], [200], [60], 41.0, polynomial)
        exact = expected([q, keys, v], [200], [60])
        for part in (0, 1):
            assert error(got[part], exact[part]) <= 2**-8 * exact[part].abs().max()
        torch.testing.assert_close(got[2].double(), exact[2], atol=8e-5, rtol=1e-6)


def test_the_polynomial_alone(hopper):
    """Only keys whose exponential is a polynomial count in rows 0 to 7: its error stands in the logarithm of the sum."""
    q, k, v = draw([256], [0], 1)
    k.zero_()
    q.zero_()
    # channel 0: a score of its own for every row; channel 1: -30 for all keys but some of the first block's
    q[:, 0, 0] = torch.linspace(-8, 8, 256).bfloat16()
    q[:, 0, 1] = 1.0
    keys = torch.arange(256)
    by_polynomial = (keys < 128) & (((keys // 8 % 4 == 0) & (keys % 2 == 0)) | ((keys // 8 % 4 == 1) & (keys % 2 == 1)))
    k[:, 0, 0] = 1.0
    k[~by_polynomial, 0, 1] = -240.0
    _, _, lse = attend([q, k, v], [256], [0], 40.0, 1)
    exact = expected([q, k, v], [256], [0])[2]
    rows = torch.arange(256) % 16 < 8
    found = error(lse[:, rows], exact[:, rows])
    assert 1e-5 < found < 8.5e-5  # 7.5e-5 for a cubic, and float32
    found = error(attend([q, k, v], [256], [0], 40.0, 0)[2], exact)
    assert found < 2e-6


# ------------------------------------------------------------------------------------------------ one sample's own


@pytest.mark.parametrize("mode", MODES)
def test_poison_stays_in_its_sample(hopper, mode):
    """NaN and infinity before and behind a sample whose last block is nearly empty, on every side of it."""
    images, texts = [5, 129, 60], [3, 1, 70]
    qkv = draw(images, texts, 1)
    clean = attend(qkv, images, texts, *MODES[mode])
    mine = slice(8, 138)
    for value in (math.nan, math.inf):
        poisoned = [torch.full_like(x, value) for x in qkv]
        for x, y in zip(poisoned, qkv, strict=True):
            x[mine] = y[mine]
        got = attend(poisoned, images, texts, *MODES[mode])
        assert same_bits(got[0][5:134], clean[0][5:134])
        assert same_bits(got[1][3:4], clean[1][3:4])
        assert same_bits(got[2][:, mine], clean[2][:, mine])
        assert not got[0][134:].isfinite().any(), "poison must not vanish in its own sample"


@pytest.mark.parametrize("mode", ["running", "running, polynomial", "fixed, polynomial"])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_one_bad_row_is_seen(hopper, mode, part):
    """A single NaN row of q, k or v, in a full and in the partial block, leaves no finite number it takes part in."""
    for row in (17, 201):
        qkv = draw([200], [60], 1)
        qkv[part][row] = math.nan
        image, text, _ = attend(qkv, [200], [60], *MODES[mode])
        out = torch.cat([image, text])
        touched = out[row] if part == 0 else out
        assert not touched.isfinite().any()
        assert part or out[torch.arange(260) != row].isfinite().all()


def test_a_sample_has_the_same_bits_in_any_batch_on_any_device(hopper):
    images, texts = [130, 3, 200], [9, 140, 0]
    qkv = draw(images, texts, 2)
    whole = attend(qkv, images, texts)
    hopper.seed, hopper.multiprocessors = 5, 1
    again = attend(qkv, images, texts)
    for a, b in zip(whole, again, strict=True):
        assert same_bits(a, b)
    start = 0
    for b, (i, t) in enumerate(zip(images, texts, strict=True)):
        alone = attend([x[start : start + i + t] for x in qkv], [i], [t])
        before = sum(images[:b]), sum(texts[:b])
        assert same_bits(alone[0], whole[0][before[0] :][:i])
        assert same_bits(alone[1], whole[1][before[1] :][:t])
        assert same_bits(alone[2], whole[2][:, start : start + i + t])
        start += i + t


def test_more_samples_than_one_launch_plans_for(hopper):
    images = [0] * 254 + [2, 0, 3, 1]
    qkv = draw(images, [0] * 258, 1)
    against_spec(hopper, images, [0] * 258, 1, "running", qkv=qkv)


def test_nothing_to_do(hopper):
    for images, texts in (([], []), ([0, 0], [0, 0])):
        image, text, lse = attend(draw(images, texts, 2), images, texts)
        assert image.shape == text.shape == (0, 128)
        assert lse.shape == (2, 0)
    image, text, _ = attend(draw([0], [5], 2), [0], [5], text_queries=False)
    assert image.shape == text.shape == (0, 128)


def test_refusals(hopper):
    q, k, v = draw([5], [2], 1)
    with pytest.raises(ValueError, match=r"lens.joint_attention: scale must be positive for lens-hopper, got 0.0"):
        attend([q, k, v], [5], [2], scale=0.0)
    for other in ([x.float() for x in (q, k, v)], [x[..., :32].contiguous() for x in (q, k, v)]):
        with pytest.raises(emulator.EmulationError, match="not supported"):
            attend(other, [5], [2])
