"""The second-order solver in the pipeline: its formula, its memory, and where it is refused."""

from __future__ import annotations

import pytest
import torch

from lens.request import Request
from lens.sampler import Multistep, Scheduler
from tests.small_pipeline import fresh, shared


def followed(pipe, **kwargs):
    """(latents, what the second-order solver alone makes of the velocities that the call took) of one call."""
    taken: list = []

    def callback(_pipe, _i, t, tensors):
        taken.append((t, tensors["noise_pred"]))
        return {}

    seeded = [torch.Generator().manual_seed(k) for k in range(len(kwargs["sizes"]))]
    noise = [torch.randn(h * w // 256, 128, generator=g) for g, (h, w) in zip(seeded, kwargs["sizes"])]
    out = pipe(
        **kwargs, latents=noise, solver="dpm2m", output_type="latent", callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=("noise_pred",),
    ).images  # fmt: skip
    by_hand = []
    for k, x in enumerate(noise):
        solver = Multistep(pipe.scheduler.sigmas(len(x), len(taken)))
        for i, (_, v) in enumerate(taken):
            x = solver.step(i, x, v[k])
        by_hand.append(x)
    return out, by_hand


@pytest.mark.parametrize("sizes", [[(32, 48), (32, 48)], [(32, 48), (64, 32)]], ids=["one size", "mixed"])
def test_the_second_order_solver_follows_its_formula(sizes):
    """Each picture by its own schedule, guided, to the last bit."""
    out, by_hand = followed(shared(), prompt=["a", "b"], sizes=sizes, num_inference_steps=5, guidance_scale=3.0)
    assert all(torch.equal(a, b) for a, b in zip(out, by_hand, strict=True))
    first, second = (s.weights[1:-1] for s in (Multistep(shared().scheduler.sigmas(n, 5)) for n in (6, 8)))
    assert first[-1] > 0.1, "it is not Euler's"
    assert not torch.equal(first, second)


def test_the_second_order_solver_is_the_same_in_company_in_a_queue_and_after_new_text():
    pipe = shared()
    how = dict(num_inference_steps=4, guidance_scale=3.0, solver="dpm2m")
    alone = pipe("a pear", sizes=[(32, 48)], seed=3, output_type="latent", **how).images[0]
    both = pipe(["a pear", "b"], sizes=[(32, 48), (32, 32)], seed=[3, 4], output_type="latent", **how).images
    assert torch.equal(both[0], alone)
    lines = [Request("a pear", size=(32, 48), seed=3, **how), Request("a pear", size=(32, 48), seed=3)]
    drawn = {k: picture for k, picture, _ in pipe.stream(lines, output_type="latent")}
    assert torch.equal(drawn[0], alone)
    features = pipe.encode_text("a pear")[0]

    def again(_pipe, i, _t, _tensors):
        return {"prompt_embeds": [f + 0 for f in features]} if i == 1 else {}

    resumed = pipe(
        "a pear", sizes=[(32, 48)], seed=3, output_type="latent", callback_on_step_end=again,
        callback_on_step_end_tensor_inputs=(), **how,
    ).images[0]  # fmt: skip
    assert torch.equal(resumed, alone), "the x0 before goes with the run"

    def retaken(_pipe, _i, _t, tensors):
        return {"noise_pred": tensors["noise_pred"] * 1.0000001}

    near = pipe(
        "a pear", sizes=[(32, 48)], seed=3, output_type="latent", callback_on_step_end=retaken,
        callback_on_step_end_tensor_inputs=("noise_pred",), **how,
    ).images[0]  # fmt: skip
    torch.testing.assert_close(near, alone, rtol=1e-4, atol=1e-4)


def test_solvers_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"solver must be one of \('euler', 'dpm2m'\), got 'heun'"):
        shared()("a", solver="heun")
    pipe = fresh()
    pipe.scheduler = Scheduler(stochastic_sampling=True)
    with pytest.raises(ValueError, match="solver must be 'euler' where the scheduler adds noise to steps, got 'dpm2m'"):
        pipe("a", solver="dpm2m")
