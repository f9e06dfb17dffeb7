"""Requests to batches: nothing waits longer than promised and nothing drawn depends on the packing; the two streams."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lens.engine.overlap import Inline, overlapped
from lens.packing import TokenQueue
from lens.request import Request
from lens.serving import stream
from tests.small_pipeline import same_bits, shared

GRIDS = [(2, 2), (2, 3), (4, 4)]
ASKED = st.lists(
    st.tuples(st.sampled_from(GRIDS), st.integers(1, 40), st.sampled_from(["a", "b"])), min_size=1, max_size=30
)
LIMITS = st.tuples(st.integers(1, 90), st.integers(1, 6), st.booleans())


def queue_of(asked, limits) -> TokenQueue[int]:
    queue = TokenQueue(*limits)
    for k, (grid, tokens, kind) in enumerate(asked):
        queue.add(k, grid, tokens, kind)
    return queue


@given(ASKED, LIMITS)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_every_request_once_within_bounds(asked, limits):
    max_tokens, max_images, same_size = limits
    batches = list(queue_of(asked, limits).batches())
    assert sorted(k for batch in batches for k in batch) == list(range(len(asked)))
    for batch in batches:
        assert batch == sorted(batch), "oldest first"
        assert len(batch) <= max_images
        assert len(batch) == 1 or sum(asked[k][1] for k in batch) <= max_tokens
        assert len({asked[k][2] for k in batch}) == 1
        if same_size:
            assert len({asked[k][0] for k in batch}) == 1
    assert batches == list(queue_of(asked, limits).batches()), "the same requests make the same batches"


@given(ASKED, LIMITS, st.lists(st.integers(0, 3), min_size=40, max_size=40))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_no_request_starves(asked, limits, arrivals):
    """Whatever keeps arriving, a request that finds n others waiting is in one of the next n + 1 batches."""
    queue, deadline, arrived, taken = TokenQueue(*limits), {}, 0, 0
    for count in arrivals:
        for _ in range(count):
            grid, tokens, kind = asked[arrived % len(asked)]
            deadline[arrived] = taken + len(queue) + 1
            queue.add(arrived, grid, tokens, kind)
            arrived += 1
        batch = queue.take()
        taken += 1
        assert bool(batch) == bool(deadline)
        for k in batch:
            assert taken <= deadline.pop(k)
    assert all(limit > taken for limit in deadline.values())


@given(ASKED, LIMITS)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_no_room_is_left_that_a_waiting_request_would_fit(asked, limits):
    max_tokens, max_images, same_size = limits
    queue = queue_of(asked, limits)
    batch = queue.take()
    used, (grid, _, kind) = sum(asked[k][1] for k in batch), asked[batch[0]]
    for k in set(range(len(asked))) - set(batch):
        fits = used + asked[k][1] <= max_tokens and len(batch) < max_images
        assert not (fits and asked[k][2] == kind and (asked[k][0] == grid or not same_size))


def test_same_sizes_come_first():
    queue = TokenQueue(10)
    for k, grid in enumerate([(2, 2), (4, 4), (2, 2), (4, 4), (2, 2)]):
        queue.add(k, grid, 3)
    assert list(queue.batches()) == [[0, 2, 4], [1, 3]]
    queue.add(7, (2, 2), 99)
    queue.add(8, (2, 2), 1)
    assert queue.take() == [7]
    assert queue.take() == [8]
    assert queue.take() == []


def test_a_batch_may_fill_the_budget_exactly():
    queue = TokenQueue(10)
    for k, tokens in enumerate([4, 6, 4, 7, 10]):
        queue.add(k, (2, 2), tokens)
    assert list(queue.batches()) == [[0, 1], [2], [3], [4]]


def test_wrong_arguments():
    for wrong in ((0,), (5, 0)):
        with pytest.raises(ValueError, match=r"max_(tokens|images) must be a positive integer"):
            TokenQueue(*wrong)
    with pytest.raises(ValueError, match="tokens must be positive, got 0"):
        TokenQueue(5).add("x", (1, 1), 0)


# ------------------------------------------------------------------------------------------------ two streams


class Late:
    """A device that has not begun a queued piece of work before somebody waits for it: the worst case."""

    def __init__(self):
        self.log, self.queued = [], []

    def submit(self, work, reads):
        self.log.append("submit")
        self.queued.append(work)
        lane, place = self, len(self.queued) - 1

        class Pending:
            def result(self):
                lane.log.append("wait")
                return lane.queued[place]()

        return Pending()


def run(lane, copies=True, count=4):
    buffer = torch.zeros(1)

    def denoise(k):
        lane.log.append(f"denoise {k}")
        buffer.fill_(k)
        return [buffer.clone() if copies else buffer]

    def decode(k, latents):
        lane.log.append(f"decode {k}")
        return latents[0].item()

    return list(overlapped(range(count), denoise, decode, list, lane))


def test_a_batch_is_decoded_while_the_next_is_denoised():
    lane = Late()
    assert run(lane) == [(k, float(k)) for k in range(4)]
    assert lane.log[:7] == ["denoise 0", "submit", "denoise 1", "submit", "wait", "decode 0", "denoise 2"]
    waits = [i for i, entry in enumerate(lane.log) if entry == "wait"]
    for k, i in enumerate(waits[:2]):
        assert lane.log.index(f"denoise {k + 1}") < i < lane.log.index(f"denoise {k + 2}")
    assert run(lane, count=0) == []
    assert run(lane, count=1) == [(0, 0.0)]


def test_a_shared_buffer_shows():
    """Latents that the next batch overwrites give wrong pictures on the late device: `denoise` must copy."""
    assert run(Late(), copies=False) != [(k, float(k)) for k in range(4)]


REQUESTS = [
    Request("a red apple", seed=1, size=(32, 48)),
    Request("two blue keys", "blurry", seed=2, size=(32, 32)),
    Request("a tree", seed=3, size=(32, 48), guidance_scale=1.0),
    Request("a red apple", seed=4, size=(32, 48)),
    Request("", seed=5, size=(48, 32), num_inference_steps=1),
    Request("a bell", seed=6, size=(32, 48)),
]


def test_a_blank_negative_costs_no_rows_of_the_budget(monkeypatch):
    """Two guided requests fit together exactly where only the written texts are counted."""
    pipe, batches = shared(), []
    draw = type(pipe).draw
    monkeypatch.setattr(type(pipe), "draw", lambda self, request: batches.append(request.count) or draw(self, request))
    requests = [
        Request("a", blank, size=(32, 32), seed=1, num_inference_steps=1, guidance_scale=4.0) for blank in ("", " ")
    ]
    text = len(pipe.encode_text("a")[0][0][0])
    for budget, expected in ((2 * (2 * 4 + text), [2]), (2 * (2 * 4 + text) - 1, [1, 1])):
        batches.clear()
        list(pipe.stream(requests, max_tokens=budget, output_type="latent"))
        assert batches == expected


@pytest.mark.parametrize("output_type", ["np", "latent"])
@pytest.mark.parametrize(("max_tokens", "lane"), [(1, Inline), (70, Late), (10_000, Late)])
def test_streamed_pictures_are_those_of_single_calls(max_tokens, lane, output_type):
    pipe = shared()
    requests = [r if r.num_inference_steps else Request(**{**vars(r), "num_inference_steps": 2}) for r in REQUESTS]
    done = list(stream(pipe, requests, max_tokens, 8, output_type, lane=lane()))
    assert sorted(k for k, _, _ in done) == list(range(6))
    for k, picture, seed in done:
        r = requests[k]
        alone = pipe(
            r.prompt, r.negative_prompt, sizes=[r.size], seed=r.seed, guidance_scale=r.guidance_scale,
            num_inference_steps=r.num_inference_steps, output_type=output_type,
        )  # fmt: skip
        assert seed == r.seed
        assert same_bits(picture, alone.images[0])


def test_stream_of_the_pipeline():
    small = dict(size=(16, 16), num_inference_steps=1)
    requests = [Request("a", **small), Request("b", seed=3, **small)]
    first, second = sorted(shared().stream(requests, max_sequence_length=200), key=lambda row: row[0])
    assert first[1].size == (16, 16)
    assert isinstance(first[2], int)
    assert second[2] == 3
    with pytest.raises(ValueError, match="output_type must be one of"):
        next(shared().stream([Request("a")], output_type="jpeg"))
    with pytest.raises(ValueError, match="multiple"):
        next(shared().stream([Request("a", size=(17, 16))]))
