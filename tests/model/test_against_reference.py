"""Fuzz at Mini's scale: the packed model against the independent plain one, whatever the shape of model or batch."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference_model import ReferenceLens, as_lens, relative

# heads, axes (they sum to the head dim), blocks, selected layers, encoder width, latent channels; MLP width is derived
SHAPES = [
    (2, (8, 28, 28), 3, (0, 1, 2, 3), 64, 32),  # 128 wide, MLP 341
    (1, (8, 28, 28), 1, (2,), 32, 8),  # one block: its text branch is dead altogether; MLP 170
    (3, (8, 12, 12), 2, (0, 3), 48, 8),  # 96 wide
    (5, (4, 2, 10), 4, (5, 1, 3), 40, 4),  # 80 wide, MLP 213, layers out of order
    (2, (0, 12, 12), 2, (1, 1, 4), 24, 16),  # no frame axis, one layer read twice; 48 wide
    (4, (8, 28, 28), 2, (0, 2, 4, 6, 8), 72, 8),  # 256 wide, MLP 682, five layers
]


@cache
def models(shape: int):
    heads, axes, blocks, layers, encoder, latent = SHAPES[shape]
    config = {
        "num_layers": blocks, "num_attention_heads": heads, "attention_head_dim": sum(axes), "in_channels": 4 * latent,
        "out_channels": latent, "enc_hidden_dim": encoder, "selected_layer_index": list(layers),
        "axes_dims_rope": list(axes),
    }  # fmt: skip
    reference = ReferenceLens(config).randomize(seed=shape)
    return config, reference, as_lens(reference, config)


def batch(config: dict, seed: int, tokens: list[int], length: int):
    generator = torch.Generator().manual_seed(seed)
    count = len(tokens)
    hidden = torch.randn((count, max(tokens), config["in_channels"]), generator=generator)
    features = [
        10 * torch.randn((count, length, config["enc_hidden_dim"]), generator=generator)
        for _ in config["selected_layer_index"]
    ]
    return hidden, features, torch.rand(count, generator=generator)


@st.composite
def masks(draw, samples: int):
    """Right padded, left padded, with holes, empty or full; True = valid."""
    length = draw(st.integers(0, 14))
    rows = []
    for _ in range(samples):
        kind, n = draw(st.sampled_from(["right", "left", "holes"])), draw(st.integers(0, length))
        holes = draw(st.lists(st.booleans(), min_size=length, max_size=length)) if kind == "holes" else []
        rows.append({"right": [j < n for j in range(length)], "left": [j >= n for j in range(length)]}.get(kind, holes))
    return torch.tensor(rows, dtype=torch.bool).reshape(samples, length)


@st.composite
def mixes(draw):
    grids = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3))
    return draw(st.integers(0, len(SHAPES) - 1)), grids, draw(masks(len(grids))), draw(st.integers(0, 2**31))


@given(mixes())
@settings(max_examples=40, deadline=None, derandomize=True)
@torch.no_grad()
def test_any_mix_meets_the_plain_model(mix):
    """Different grids, texts and masks in one packed forward; the plain model takes them one grid at a time."""
    shape, grids, mask, seed = mix
    config, reference, ours = models(shape)
    tokens = [h * w for h, w in grids]
    hidden, features, timestep = batch(config, seed, tokens, mask.shape[1])
    velocity = ours(hidden, features, mask, timestep, [(1, h, w) for h, w in grids])
    assert velocity.shape == hidden.shape
    for b, grid in enumerate(grids):
        one = slice(b, b + 1)
        truth = reference(hidden[one, : tokens[b]], [f[one] for f in features], mask[one], timestep[one], grid)
        assert relative(velocity[b, : tokens[b]], truth[0]) <= 1e-5
        assert not velocity[b, tokens[b] :].any()


@pytest.mark.parametrize("shape", range(len(SHAPES)))
@torch.no_grad()
def test_padded_batch_of_one_grid_meets_the_plain_model(shape):
    """The plain model with its mask and padding in the batch: a doubled batch, half of it without text."""
    config, reference, ours = models(shape)
    hidden, features, timestep = batch(config, 7, [35] * 4, 11)
    mask = torch.tensor([[True] * 11, [True] * 4 + [False] * 7, [False] * 11, [False] * 11])
    blocks_out: list = []
    blocks: list = []
    velocity = ours(hidden, features, mask, timestep, [(1, 5, 7)], blocks_out=blocks_out)
    assert relative(velocity, reference(hidden, features, mask, timestep, (5, 7), blocks)) <= 1e-5
    assert len(blocks_out) == len(blocks) == config["num_layers"]
    for (image, text), (their_image, their_text) in zip(blocks_out, blocks, strict=True):
        assert relative(image, their_image.flatten(0, 1)) <= 1e-5
        assert relative(text, their_text[mask]) <= 1e-5


@torch.no_grad()
def test_each_norm_has_its_own_epsilon():
    """At small activations every epsilon counts: 1e-6 in the blocks, for q and k and at the end, 1e-5 for the text."""
    config, _, _ = models(0)
    reference = ReferenceLens(config).randomize(seed=0)
    for name, p in reference.named_parameters():
        if "qkv" in name:
            p[: 2 * len(p) // 3].mul_(0.01)  # q and k
        elif name.startswith(("img_in", "txt_in")):
            p.mul_(0.003)
        elif "_mod" in name or name.startswith("norm_out"):
            p.mul_(0.1)
    ours = as_lens(reference, config)
    hidden, features, timestep = batch(config, 3, [12], 5)
    features = [f * 3e-4 for f in features]
    mask = torch.ones(1, 5, dtype=torch.bool)
    velocity = ours(hidden, features, mask, timestep, [(1, 3, 4)])
    assert relative(velocity, reference(hidden, features, mask, timestep, (3, 4))) <= 1e-5
    for part in (
        "img_norm1",
        "img_norm2",
        "txt_norm1",
        "txt_norm2",
        "norm_q",
        "norm_k",
        "norm_added_q",
        "norm_added_k",
    ):
        norm = next(m for n, m in reference.named_modules() if n.endswith(f".{part}"))
        norm.eps = 1e-5
        assert relative(velocity, reference(hidden, features, mask, timestep, (3, 4))) > 3e-5, part
        norm.eps = 1e-6
    reference.txt_norm[1].eps = 1e-6
    assert relative(velocity, reference(hidden, features, mask, timestep, (3, 4))) > 2e-5


@torch.no_grad()
def test_no_mask_means_every_text_token():
    config, _, ours = models(0)
    hidden, features, timestep = batch(config, 3, [6, 6], 5)
    every = torch.ones(2, 5, dtype=torch.bool)
    grids = [(1, 2, 3)]
    assert torch.equal(ours(hidden, features, None, timestep, grids), ours(hidden, features, every, timestep, grids))
    as_integers = ours(hidden, features, every.long(), timestep, grids)
    assert torch.equal(as_integers, ours(hidden, features, every, timestep, grids))


@torch.no_grad()
def test_padding_is_never_read():
    """Whatever stands in masked text, even NaN, and beyond a picture's own tokens changes no bit."""
    config, _, ours = models(0)
    hidden, features, timestep = batch(config, 3, [12, 6], 5)
    mask = torch.tensor([[True, False, True, False, False], [False] * 5])
    grids = [(1, 3, 4), (1, 2, 3)]
    clean = ours(hidden, features, mask, timestep, grids)
    hidden, features = hidden.clone(), [f.clone() for f in features]
    hidden[1, 6:] = float("nan")
    for f in features:
        f[~mask] = float("nan")
    assert torch.equal(ours(hidden, features, mask, timestep, grids), clean)


BAD = [
    ("hidden_states", dict(hidden=torch.zeros(2, 6, 127)), "hidden_states must be [B, I, C = 128], got [2, 6, 127]"),
    ("one tensor", dict(features=torch.zeros(2, 5, 64)), "encoder_hidden_states must be F = 4 tensors, got one tensor"),
    ("too few", dict(features=[torch.zeros(2, 5, 64)] * 3), "must be F = 4 tensors, got 3 tensors"),
    ("width", dict(features=[torch.zeros(2, 5, 63)] * 4), "encoder_hidden_states[0] must be [B, T, E] = [2, 5, 64]"),
    ("ragged", dict(features=[torch.zeros(2, 5, 64)] * 3 + [torch.zeros(2, 4, 64)]), "encoder_hidden_states[3]"),
    ("mask", dict(mask=torch.ones(2, 4)), "encoder_hidden_states_mask must be [B, T] = [2, 5], got [2, 4]"),
    ("timestep", dict(timestep=torch.zeros(3)), "timestep must be [B] = [2], got [3]"),
    ("grid too large", dict(grids=[(1, 3, 3)]), "img_shapes must be one or B = 2 tuples"),
    ("grids", dict(grids=[(1, 2, 3)] * 3), "img_shapes must be one or B = 2 tuples"),
    ("frames", dict(grids=[(2, 1, 3)]), "img_shapes must be one or B = 2 tuples"),
    ("no list of grids", dict(grids=(1, 2, 3)), "img_shapes must be one or B = 2 tuples"),
    ("hidden number", dict(hidden=0.5), "hidden_states must hold floating-point tensors, got float"),
    ("complex", dict(features=[torch.zeros(2, 5, 64).cfloat()] * 4), "encoder_hidden_states must hold floating-point"),
    ("mask list", dict(mask=[[True] * 5] * 2), "encoder_hidden_states_mask must be a tensor, got list"),
    ("time number", dict(timestep=0.5), "timestep must be a tensor, got float"),
    ("empty grid", dict(grids=[(1, 0, 3)]), "img_shapes must be one or B = 2 tuples"),
]


@pytest.mark.parametrize(("change", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
@torch.no_grad()
def test_wrong_arguments_are_named(change, message):
    config, _, ours = models(0)
    hidden, features, timestep = batch(config, 3, [6, 6], 5)
    call = dict(hidden=hidden, features=features, mask=None, timestep=timestep, grids=[(1, 2, 3)]) | change
    with pytest.raises(ValueError) as error:
        ours(call["hidden"], call["features"], call["mask"], call["timestep"], call["grids"])
    assert message in str(error.value)
