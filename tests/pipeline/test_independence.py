"""Rule 5 through the whole pipeline: a picture's bits are its own, whatever is drawn beside it."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.small_pipeline import same_bits, shared

PROMPTS = ["a red apple", "three cats under a green tree, soft light", "", "红色的苹果 🍎", "x" * 40]
NEGATIVES = ["", "  ", "blurry, low contrast", "text"]

REQUESTS = st.tuples(
    st.sampled_from(PROMPTS),
    st.sampled_from(NEGATIVES),
    st.tuples(st.sampled_from([16, 32, 48, 80]), st.sampled_from([16, 32, 64, 80])),
    st.integers(0, 3),
)


@cache
def alone(request, guidance: float, steps: int, output_type: str):
    prompt, negative, size, seed = request
    out = shared()(
        prompt,
        negative,
        sizes=[size],
        seed=seed,
        guidance_scale=guidance,
        num_inference_steps=steps,
        output_type=output_type,
    )
    return out.images[0]


@pytest.mark.filterwarnings("ignore:.*aspect ratios")
@given(
    st.lists(REQUESTS, min_size=2, max_size=4),
    st.sampled_from([1.0, 0.5, 5.0]),
    st.sampled_from([1, 2]),
    st.sampled_from(["latent", "np"]),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_neighbours(requests, guidance, steps, output_type):
    prompts, negatives, sizes, seeds = (list(column) for column in zip(*requests, strict=True))
    arguments = dict(guidance_scale=guidance, num_inference_steps=steps, output_type=output_type)
    images = shared()(prompts, negatives, sizes=sizes, seed=seeds, **arguments).images
    for image, request in zip(images, requests, strict=True):
        assert same_bits(image, alone(request, guidance, steps, output_type)), request
    backwards = shared()(prompts[::-1], negatives[::-1], sizes=sizes[::-1], seed=seeds[::-1], **arguments).images
    assert same_bits(list(backwards)[::-1], list(images))
