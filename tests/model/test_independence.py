"""Rule 5 on the CPU: a sample's velocity has the same bits alone and in any batch, order and padding."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lens.ops.linear.fused import linear, linear_of
from lens.packing import plan
from tests.model.test_against_reference import SHAPES, models

GRIDS = st.tuples(st.integers(1, 7), st.integers(1, 7))
SAMPLES = st.lists(st.tuples(GRIDS, st.integers(0, 12), st.integers(0, 5)), min_size=2, max_size=4)


@cache
def typed(shape: int, dtype: torch.dtype):
    config, _, model = models(shape)
    if dtype == torch.float32:
        return config, model
    import copy

    return config, copy.deepcopy(model).to(dtype)


def sample(config: dict, grid: tuple[int, int], text: int, seed: int):
    generator = torch.Generator().manual_seed(1000 * seed + text)
    hidden = torch.randn((grid[0] * grid[1], config["in_channels"]), generator=generator)
    features = [
        torch.randn((text, config["enc_hidden_dim"]), generator=generator) for _ in config["selected_layer_index"]
    ]
    return hidden, features, torch.rand((), generator=generator)


def forward(model, config: dict, samples: list, padding: int = 0):
    """All samples in one padded call; returns each one's own rows."""
    made = [sample(config, *s) for s in samples]
    tokens = [len(h) for h, _, _ in made]
    texts = [s[1] for s in samples]
    hidden = torch.full((len(made), max(tokens) + padding, config["in_channels"]), 3.0)
    length = max(texts) + padding
    features = [torch.full((len(made), length, config["enc_hidden_dim"]), 5.0) for _ in config["selected_layer_index"]]
    mask = torch.zeros(len(made), length, dtype=torch.bool)
    for b, (h, f, _) in enumerate(made):
        hidden[b, : len(h)] = h
        mask[b, : texts[b]] = True
        for whole, own in zip(features, f, strict=True):
            whole[b, : texts[b]] = own
    timestep = torch.stack([t for _, _, t in made])
    velocity = model(hidden, features, mask, timestep, [(1, h, w) for (h, w), _, _ in samples])
    return [velocity[b, :n] for b, n in enumerate(tokens)]


@given(st.integers(0, len(SHAPES) - 1), SAMPLES, st.integers(0, 3), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None, derandomize=True)
@torch.no_grad()
def test_any_neighbours_any_order_any_padding(shape, samples, padding, random):
    config, model = typed(shape, torch.float32)
    samples = samples + [
        (grid, text, seed + 10) for grid, text, seed in samples[:2]
    ]  # equal shapes may be computed together
    alone = [forward(model, config, [s])[0] for s in samples]
    together = forward(model, config, samples, padding)
    assert all(map(torch.equal, together, alone))
    order = list(range(len(samples)))
    random.shuffle(order)
    shuffled = forward(model, config, [samples[k] for k in order])
    assert all(torch.equal(shuffled[i], alone[k]) for i, k in enumerate(order))


@given(st.integers(0, len(SHAPES) - 1), SAMPLES)
@settings(max_examples=10, deadline=None, derandomize=True)
@torch.no_grad()
def test_in_bf16(shape, samples):
    config, model = typed(shape, torch.bfloat16)
    alone = [forward(model, config, [s])[0] for s in samples]
    assert all(map(torch.equal, forward(model, config, samples), alone))


@torch.no_grad()
def test_a_modulation_takes_one_gemm_in_a_table_from_files_and_in_its_block(monkeypatch):
    """All times in one call or a time alone, layers or weights that stay in their files: `linear`, whose kernels may differ
    in last bits from a layer's own call."""
    _, model = typed(0, torch.bfloat16)
    served = []

    def counted(layer, x, lengths=None):
        served.append(lengths)
        return linear(layer, x, lengths)

    monkeypatch.setattr("lens.model.linear", counted)
    times = torch.rand(5, generator=torch.Generator().manual_seed(3)).bfloat16()
    table = model.modulate(times, alone=True)
    assert served == [[1] * 5] * (2 * len(model.layers()) + 1)
    temb = torch.nn.functional.silu(model.time_embedding(times[2:3]))
    layer = model.layers()[0].streams()[1].modulation
    in_block = linear(layer, temb, [1])
    assert torch.equal(table.blocks[2, 0, 1].flatten(), in_block[0])
    assert torch.equal(linear_of(layer.weight, layer.bias, temb, [1]), in_block)


@pytest.mark.parametrize("count", [2, 17, 64])
def test_rotary_rows_do_not_depend_on_the_batch(count):
    """A vectorised cosine has other bits at the end of an array than inside."""
    grids = [(1 + k % 7, 1 + (3 * k) % 5) for k in range(count)]
    texts = [k % 9 for k in range(count)]
    packing = plan(grids, texts, (8, 28, 28))
    start = 0
    for grid, text in zip(grids, texts, strict=True):
        one, rows = plan([grid], [text], (8, 28, 28)), grid[0] * grid[1] + text
        assert torch.equal(packing.cos[start : start + rows], one.cos)
        assert torch.equal(packing.sin[start : start + rows], one.sin)
        start += rows


@torch.no_grad()
def test_the_test_sees_a_dependence():
    """With the products over all rows at once, as on a GPU, the library's bits do change: the bound above can fail."""
    config, model = typed(0, torch.float32)
    samples = [((3, 5), 7, 1), ((7, 7), 11, 2), ((1, 1), 0, 3), ((2, 7), 3, 4), ((5, 5), 12, 5)]
    alone = [forward(model, config, [s])[0] for s in samples]
    model.batch_invariant = False
    try:
        together = forward(model, config, samples)
    finally:
        model.batch_invariant = True
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not all(map(torch.equal, together, alone))
