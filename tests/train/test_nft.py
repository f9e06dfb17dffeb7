"""DiffusionNFT's loss against closed forms: its gradient, the Gaussian optimum, the reward transform, a policy that improves."""

import numpy as np
import pytest
import torch

from lens import sampler
from train.loop.keys import keyed
from train.objectives import nft


def randn(*shape, key=0, dtype=torch.float64):
    return torch.randn(shape, generator=keyed(key, "nft test"), dtype=dtype)


# ------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.0])
def test_gradient_is_the_formulas(beta):
    """2 beta [beta d - (2r - 1)(v - v_old)], per number of a sample's mean; at theta = old beta is a mere scale."""
    lengths, r, t = [3, 5], torch.tensor([0.9, 0.2]), torch.tensor([0.5, 0.7])
    old, v = randn(8, 4, key=1, dtype=torch.float32), randn(8, 4, key=2, dtype=torch.float32)
    for d in (torch.zeros(8, 4), randn(8, 4, key=3, dtype=torch.float32)):
        theta = (old + d).requires_grad_()
        nft.losses(theta, old, v, r, t, lengths, beta).sum().backward()
        rows = torch.tensor(lengths).repeat_interleave(torch.tensor(lengths))[:, None]
        sign = (2 * r - 1).repeat_interleave(torch.tensor(lengths))[:, None]
        expected = 2 * beta * (beta * (theta.detach() - old) - sign * (v - old)) / (rows * 4)
        torch.testing.assert_close(theta.grad, expected, rtol=1e-5, atol=1e-7)


def test_value_at_old_does_not_depend_on_r_and_small_changes_survive_bfloat16():
    old, v, t = randn(6, 4).bfloat16(), randn(6, 4, key=1).bfloat16(), torch.full((2,), 0.5)
    values = [nft.losses(old, old, v, torch.full((2,), r), t, [2, 4]) for r in (0.0, 0.3, 1.0)]
    assert torch.equal(values[0], values[2])
    torch.testing.assert_close(values[0], values[1])
    positive, negative = nft.implicit(old.float() * (1 + 2**-12), old, 1.0)  # less than bfloat16 can tell
    assert not torch.equal(positive, negative)
    torch.testing.assert_close((positive + negative) / 2, old.float())


def test_adaptive_is_the_x0_loss_by_its_own_size():
    """Against x0_hat = x_t - t v in x0 space, written down anew."""
    lengths, r, t, beta = [3, 5], torch.tensor([0.9, 0.2]), torch.tensor([0.25, 0.7]), 0.6
    theta, old, x0, eps = (randn(8, 4, key=k, dtype=torch.float32) for k in range(4))
    time = t.repeat_interleave(torch.tensor(lengths))[:, None]
    xt, expected = (1 - time) * x0 + time * eps, []
    for sample, weight in zip(range(2), r):
        rows, value = slice(0, 3) if sample == 0 else slice(3, 8), 0
        for branch, share in zip(nft.implicit(theta, old, beta), (weight, 1 - weight)):
            error = (xt - time * branch - x0)[rows]
            value = value + share * error.square().mean() / error.abs().mean()
        expected.append(value)
    found = nft.losses(theta, old, eps - x0, r, t, lengths, beta, adaptive=True)
    torch.testing.assert_close(found, torch.stack(expected))


def test_a_sample_has_its_bits_in_any_batch():
    theta, old, v = (randn(8, 4, key=k, dtype=torch.float32) for k in range(3))
    r, t = torch.tensor([0.9, 0.2]), torch.tensor([0.25, 0.7])
    both = nft.losses(theta, old, v, r, t, [3, 5], adaptive=True)
    alone = nft.losses(theta[3:], old[3:], v[3:], r[1:], t[1:], [5], adaptive=True)
    assert torch.equal(both[1:], alone)


@pytest.mark.parametrize(("r", "lengths", "word"), [(1.2, [4, 4], "r from"), (0.5, [4, 3], "lengths")])
def test_refusals(r, lengths, word):
    with pytest.raises(ValueError, match=word):
        nft.losses(*(torch.zeros(8, 2),) * 3, torch.tensor([0.5, r]), torch.zeros(2), lengths)


# ------------------------------------------------------------------------------------------------ the Gaussian optimum


def gaussian_velocity(x, t, mean, deviation):
    """E[eps - x0 | x_t] of x0 ~ N(mean, deviation^2)."""
    variance = ((1 - t) * deviation) ** 2 + t**2
    return -mean + (t - (1 - t) * deviation**2) / variance * (x - (1 - t) * mean)


@pytest.mark.parametrize(
    ("mean", "deviation", "k", "beta"), [(0.0, 1.0, 0.1, 1.0), (1.5, 0.6, -0.2, 0.5), (-0.4, 2.0, 0.05, 2.0)]
)
def test_gaussian_optimum_moves_the_mean_by_2_k_s2_over_beta(mean, deviation, k, beta):
    """The minimum of the plain loss over d = p + q x at every t, E by Gauss-Hermite nodes, against the closed form; then sampled."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(
        8
    )  # exact up to degree 15; the loss has 3, and r stays in [0, 1]
    noise, eps = (torch.from_numpy(a.ravel())[:, None] for a in np.meshgrid(nodes, nodes))
    weights = torch.from_numpy(np.outer(weights, weights).ravel() / weights.sum() ** 2)
    times = torch.linspace(1, 0, 61, dtype=torch.float64)[:-1]
    x0, steps = mean + deviation * noise, len(times)
    x = (1 - times) * x0 + times * eps  # [nodes, times]
    old, v = gaussian_velocity(x, times, mean, deviation), (eps - x0).expand(-1, steps)
    r = (0.5 + k * (x0 - mean))[:, 0]

    def gradient(p, q):
        p, q = (torch.full((steps,), value, dtype=torch.float64, requires_grad=True) for value in (p, q))
        rows = [a.reshape(-1, 1) for a in (old + p + q * x, old, v)]
        (weights * nft.losses(*rows, r, torch.zeros(64), [steps] * 64, beta)).sum().backward()
        return torch.stack([p.grad, q.grad], -1)

    at_zero = gradient(0.0, 0.0)  # the loss is quadratic: differences of its gradient are its curvature
    curvature = torch.stack([gradient(1.0, 0.0) - at_zero, gradient(0.0, 1.0) - at_zero], -1)
    optimum = -torch.linalg.solve(curvature, at_zero)
    closed = -(2 * k / beta) * deviation**2 * times / (((1 - times) * deviation) ** 2 + times**2)
    torch.testing.assert_close(optimum[:, 0], closed, rtol=1e-3, atol=1e-4)
    assert optimum[:, 1].abs().max() < 1e-3
    # the ODE's sample mean moves by exactly 2 k s^2 / beta
    ends, sigmas = [], torch.cat([times, torch.zeros(1, dtype=torch.float64)])
    for shift in (torch.zeros(steps), optimum[:, 0]):
        solver, y = sampler.Multistep(sigmas), torch.full((1,), 0.3, dtype=torch.float64)
        for i, t in enumerate(times):
            y = solver.step(i, y, gaussian_velocity(y, t, mean, deviation) + shift[i])
        ends.append(y.item())
    assert ends[1] - ends[0] == pytest.approx(2 * k * deviation**2 / beta, rel=0.02)


# ------------------------------------------------------------------------------------------------ the reward transform


def test_transform_is_centred_by_prompt_and_scaled_by_all():
    rewards = torch.tensor([0.2, 0.4, 0.9, 0.5, 0.5, 0.8])
    groups, valid = torch.tensor([7, 7, 7, 3, 3, 3]), torch.ones(6, dtype=torch.bool)
    found = nft.optimality(rewards, groups, valid)
    deviation = rewards.double().std(correction=0)
    advantage = rewards - torch.tensor([0.5] * 3 + [0.6] * 3)
    torch.testing.assert_close(found.r, (0.5 + advantage / (deviation + 1e-4) / 10).float(), rtol=1e-5, atol=1e-6)
    assert found.numbers["advantage_bias"] == pytest.approx(0, abs=1e-7)
    assert found.numbers["clipped_share"] == 0
    narrow = nft.optimality(rewards, groups, valid, z_scale=1.0)
    assert narrow.r.min() == 0
    assert narrow.r.max() == 1
    assert narrow.numbers["clipped_share"] == pytest.approx(2 / 6)


def test_invalid_rewards_enter_no_mean_and_equal_ones_give_a_half():
    rewards = torch.tensor([0.2, float("nan"), 0.6, 0.5, 0.5, 0.5])
    groups, valid = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([True, False, True, True, True, True])
    found = nft.optimality(rewards, groups, valid)
    without = nft.optimality(rewards[valid], groups[valid], valid[valid])
    assert torch.equal(found.r[valid], without.r)
    assert found.r[1] == 0.5
    assert not found.valid[1]
    assert found.r[3:].tolist() == [0.5] * 3
    assert found.valid[3:].all()
    assert found.numbers["zero_variance_groups"] == 0.5
    assert found.numbers["invalid_share"] == pytest.approx(1 / 6)
    masked = nft.optimality(rewards, groups, valid, mask_degenerate=True)
    assert masked.valid.tolist() == [True, False, True, False, False, False]
    with pytest.raises(ValueError, match="none of 6"):
        nft.optimality(rewards, groups, torch.zeros(6, dtype=torch.bool))


def test_recentred_r_has_no_bias_and_stays_in_range():
    rewards = torch.rand(40, generator=keyed(3, "skewed")) ** 8  # few large ones: the clip cuts them alone
    groups, valid = torch.arange(40) // 8, torch.ones(40, dtype=torch.bool)
    plain = nft.optimality(rewards, groups, valid, z_scale=1.0)
    assert abs(plain.numbers["advantage_bias"]) > 0.01
    found = nft.optimality(rewards, groups, valid, z_scale=1.0, recentre=True)
    assert (2 * found.r - 1).view(5, 8).mean(1).abs().max() < 1e-6
    assert found.r.min() >= 0
    assert found.r.max() <= 1


def test_a_half_pulls_towards_old():
    old, v, theta = torch.zeros(4, 2), randn(4, 2, dtype=torch.float32), torch.full((4, 2), 0.3, requires_grad=True)
    nft.losses(theta, old, v, torch.tensor([0.5]), torch.tensor([0.5]), [4]).sum().backward()
    torch.testing.assert_close(theta.grad, 2 * theta.detach() / 8)


def test_schedule_of_the_old_policy():
    assert [nft.old_decay("nft", i) for i in (1, 180, 500, 900)] == [0.001, 0.18, 0.5, 0.5]
    assert nft.old_decay(0.0, 40) == 0


# ------------------------------------------------------------------------------------------------ a policy that improves


def improve(seed, steps=30, kl_weight=0.0, shuffle=False, adaptive=True, lr=0.03):
    """A policy on the line, v_old + d_t at eight times, rewarded for what lies right: (mean reward at first, at last, drift)."""
    times = torch.linspace(1, 1 / 8, 8)
    sigmas = torch.cat([times, torch.zeros(1)])
    theta = torch.zeros(8, requires_grad=True)
    old, optimizer, means = theta.detach().clone(), torch.optim.Adam([theta], lr), []

    def sample(shifts, noise):
        x = noise
        for i in range(8):
            v = gaussian_velocity(x, times[i], 0.0, 1.0) + shifts[i]
            x = x + (sigmas[i + 1] - sigmas[i]) * v
        return x

    for step in range(steps):
        generator = keyed(seed, "improve", step)
        x0 = sample(old, torch.randn(64, generator=generator))
        reward = torch.sigmoid(2 * x0)
        means.append(reward.mean().item())
        told = reward[torch.randperm(64, generator=generator)] if shuffle else reward
        r = nft.optimality(told, torch.arange(64) // 16, torch.ones(64, dtype=torch.bool)).r
        at = torch.randint(8, (64,), generator=generator)
        t, eps = times[at], torch.randn(64, generator=generator)
        x = (1 - t) * x0 + t * eps
        reference = gaussian_velocity(x, t, 0.0, 1.0)
        v_theta, v_old = (reference + shifts[at] for shifts in (theta, old))
        rows, ones = [v[:, None] for v in (v_theta, v_old, eps - x0)], [1] * 64
        value = 5 * nft.losses(*rows, r, t, ones, 1.0, adaptive)
        value = value + kl_weight * nft.squared_distance(rows[0], reference[:, None], ones)
        optimizer.zero_grad()
        value.mean().backward()
        optimizer.step()
        old = theta.detach().clone()
    return np.mean(means[:3]), np.mean(means[-3:]), theta.detach().square().mean().item()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rewards_rise_and_shuffled_ones_do_not(seed):
    error = 0.31 / (3 * 64) ** 0.5  # of a mean over three steps: the deviation of sigmoid(2 x0)
    first, last, _ = improve(seed)
    assert last - first > 3 * 2**0.5 * error
    first, last, _ = improve(seed, shuffle=True)
    assert last - first < 3 * 2**0.5 * error


def test_drift_falls_with_the_kl_weight():
    drifts = [improve(0, kl_weight=weight)[2] for weight in (0.0, 0.1, 1.0)]
    assert drifts[0] > drifts[1] > drifts[2] > 0
