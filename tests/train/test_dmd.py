"""Distillation's formulas: signs, clocks and factors against closed forms (proofs 21 to 26 of tests/train/README.md)."""

import math

import pytest
import torch
from torch import nn

from lens.sampler import Scheduler
from train.loop.keys import keyed
from train.objectives import adversarial, dmd, flow_matching


def drawn(name, *shape):
    return torch.randn(shape, generator=keyed(0, name))


def test_dm_and_ca_with_one_time_are_dmd2s_gradient_with_a_guided_teacher():
    """DMD2 written anew, in x0: (x0_fake - x0_guided) / mean |x - x0_c|; w = 5."""
    x, eps, v_c, v_u, v_f = (drawn(name, 3, 5, 4) for name in ("x", "eps", "c", "u", "f"))
    tau = torch.tensor([0.1, 0.5, 0.93])
    x_tau, _ = flow_matching.noised(x, eps, tau)
    t = tau[:, None, None]
    real, unasked, fake = x_tau - t * v_c, x_tau - t * v_u, x_tau - t * v_f
    want = (fake - (unasked + 5.0 * (real - unasked))) / (x - real).abs().mean((1, 2), keepdim=True)
    n = dmd.normaliser(x, dmd.clean(x_tau, v_c, tau), 1e-6)
    got = dmd.dm_gradient(v_c, v_f, tau, n) + dmd.ca_gradient(v_c, v_u, tau, n, 5.0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_the_guided_velocity_keeps_every_tokens_norm_where_asked():
    c, u = drawn("c", 2, 3, 4), drawn("u", 2, 3, 4)
    kept = dmd.guided(c, u, 5.0, "token_norm")
    torch.testing.assert_close(kept.norm(dim=-1), c.norm(dim=-1))
    torch.testing.assert_close(torch.cosine_similarity(kept, dmd.guided(c, u, 5.0, "plain"), -1), torch.ones(2, 3))
    with pytest.raises(ValueError, match="CFG_MODE: 'norm', expected"):
        dmd.guided(c, u, 5.0, "norm")


def test_the_proxy_loss_pulls_by_the_gradient_over_its_count():
    x, g = drawn("x", 2, 3, 4).requires_grad_(), drawn("g", 2, 3, 4)
    dmd.proxy_loss(x, g).mean().backward()
    torch.testing.assert_close(x.grad, g / g.numel())


def test_the_normaliser_has_a_floor():
    x = torch.zeros(2, 3, 4)
    near = torch.stack([torch.full((3, 4), 0.02), torch.full((3, 4), -0.3)])
    torch.testing.assert_close(dmd.normaliser(x, near, 0.1).flatten(), torch.tensor([0.1, 0.3]))


# ---------------------------------------------------------------- Gaussians: N(mean, .5^2) all around, one parameter

SPREAD, CONDITIONAL, UNCONDITIONAL, GUIDANCE = 0.5, 1.0, 0.2, 5.0


def velocity(x, t, mean):
    """E[eps - x0 | x_t] of x0 ~ N(mean, SPREAD^2), exactly."""
    t = t[:, None, None]
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    return -mean + (t - (1 - t) * SPREAD**2) / variance * (x - (1 - t) * mean)


def force(mean, dm_weight=1.0, below=None):
    """What DM + CA, not normalised, say of a student N(mean, SPREAD^2); a fine row of times, exact scores; CA's end below 1."""
    u = (torch.arange(4000) + 0.5) / 4000
    x, eps, n = SPREAD * drawn("z", 4000, 1, 1) + mean, drawn("e", 4000, 1, 1), torch.ones(())
    found = []
    for tau, kind in ((dmd.dm_times(u, 0.0), "dm"), (dmd.ca_times(u, 0.0, below or 1.0), "ca")):
        x_tau, _ = flow_matching.noised(x, eps, tau)
        c = velocity(x_tau, tau, CONDITIONAL)
        if kind == "dm":
            found.append(dm_weight * dmd.dm_gradient(c, velocity(x_tau, tau, mean), tau, n).mean())
        else:
            found.append(dmd.ca_gradient(c, velocity(x_tau, tau, UNCONDITIONAL), tau, n, GUIDANCE).mean())
    return float(sum(found))


def fixed_point(below):
    """The mean at which the force vanishes: it is a line in the mean."""
    at_zero, at_one = force(0.0, below=below), force(1.0, below=below)
    return at_zero / (at_zero - at_one)


@pytest.mark.parametrize(("below", "want"), [(None, 4.2), (0.5, 2.7411)])
def test_gaussians_settle_where_the_closed_form_says(below, want):
    """mean_c + (w - 1)(mean_c - mean_u) E f(tau_CA) / E f(tau_DM), f = tau^2 / ((1 - tau)^2 s^2 + tau^2)."""

    def f(tau):
        return (tau**2 / ((1 - tau) ** 2 * SPREAD**2 + tau**2)).mean()

    u = (torch.arange(4000) + 0.5) / 4000
    ratio = f(dmd.ca_times(u, 0.0, below or 1.0)) / f(dmd.dm_times(u, 0.0))
    assert float(CONDITIONAL + (GUIDANCE - 1) * (CONDITIONAL - UNCONDITIONAL) * ratio) == pytest.approx(want, abs=1e-3)
    assert fixed_point(below) == pytest.approx(want, abs=2e-3)
    mean = 0.0
    for _ in range(60):  # and it is where a student goes
        mean -= 0.3 * force(mean, below=below)
    assert mean == pytest.approx(want, abs=5e-3)


def test_ca_alone_runs_away():
    mean, path = 0.0, []
    for _ in range(60):
        mean -= 0.3 * force(mean, dm_weight=0.0)
        path.append(mean)
    assert path[-1] > 30
    assert path[59] - path[39] > 0.99 * (path[39] - path[19])  # nothing holds it


# ---------------------------------------------------------------- times


@pytest.mark.parametrize("mu", [0.0, 0.5, 1.3106])
@pytest.mark.parametrize("t", [1.0, 0.832, 0.355, 0.05, 0.004])
def test_ca_looks_below_the_students_time_alone(mu, t):
    tau = dmd.ca_times(torch.rand(2000, generator=keyed(0, "u")), mu, t)
    assert tau.min() > 0
    assert tau.max() < t
    assert tau.max() <= flow_matching.shift(torch.tensor(dmd.HIGH), mu) + 1e-6
    assert tau.max() > 0.98 * min(t, float(flow_matching.shift(torch.tensor(0.98), mu)))  # all of it is used


def test_dm_looks_everywhere():
    tau = dmd.dm_times(torch.tensor([0.0, 0.5, 1.0]), 0.5)
    torch.testing.assert_close(tau, flow_matching.shift(torch.tensor([0.02, 0.5, 0.98]), 0.5))


# ---------------------------------------------------------------- IDA


def test_the_fake_comes_nearer_by_the_power_law():
    student, fake = [drawn("a", 3, 2), drawn("b", 4)], [drawn("c", 3, 2), drawn("d", 4)]
    want = [s + 0.97**20 * (f - s) for s, f in zip(student, fake)]
    for _ in range(20):
        dmd.align_(fake, student, 0.03)
    torch.testing.assert_close(fake, want)


# ---------------------------------------------------------------- adversarial


def test_approximate_r1_is_the_squared_gradient_as_alpha_goes_to_zero():
    """d(x) = sum sin(w x): E |d(x) - d(x + alpha e)|^2 / alpha^2 -> |grad d|^2, from below at first."""
    w, x = drawn("w", 6), drawn("x", 6)
    e = drawn("e", 100_000, 6)
    e = torch.cat([e, -e])
    e = e @ torch.linalg.inv(torch.linalg.cholesky((e.T @ e / len(e)).double())).float().T  # unit covariance, exactly
    slope = float((w * torch.cos(w * x)).square().sum())

    def measured(alpha):
        real = torch.sin(w * x).sum().expand(len(e), 1)
        beside = torch.sin(w * adversarial.perturbed(x.expand_as(e), e, alpha)).sum(1, keepdim=True)
        return float(adversarial.approximate_r1(real.double(), beside.double(), 2.0).double().mean()) / alpha**2

    assert measured(0.01) == pytest.approx(slope, rel=5e-3)
    assert abs(measured(0.1) / slope - 1) < 0.1
    assert abs(measured(0.01) - slope) < abs(measured(0.3) - slope)


def test_losses_of_heads_that_know_nothing_and_of_heads_that_know_all():
    nothing, sure = torch.zeros(2, 3), torch.full((2, 3), 20.0)
    torch.testing.assert_close(adversarial.discriminator_loss(nothing, nothing), torch.full((2,), 2 * math.log(2)))
    assert adversarial.discriminator_loss(sure, -sure).max() < 1e-6
    assert adversarial.generator_loss(-sure).min() > 19  # not saturated: the gradient is whole
    assert float(adversarial.accuracy(sure, -sure)) == 1
    assert float(adversarial.accuracy(-sure, sure)) == 0


# ---------------------------------------------------------------- eight Gaussians on a circle

CENTRES = torch.stack([torch.tensor([math.cos(a), math.sin(a)]) for a in torch.arange(8) * math.pi / 4]) * 2
WIDTH = 0.1
STEPS = Scheduler().sigmas(4096, 4)


def exact(x, t):
    """The velocity of the mixture, [B, 1, 2] at t [B]."""
    a, s = (1 - t)[:, None, None], t[:, None, None]
    variance = a**2 * WIDTH**2 + s**2
    near = (-(x - a * CENTRES).square().sum(-1, keepdim=True) / (2 * variance)).softmax(1)
    each = -CENTRES + (s - a * WIDTH**2) / variance * (x - a * CENTRES)
    return (near * each).sum(1, keepdim=True)


class Plane(nn.Module):
    """v(x, t) of points: exact at the start but for a small network, which learns."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
        nn.init.zeros_(self.body[-1].weight)
        nn.init.zeros_(self.body[-1].bias)

    def forward(self, x, t):
        time = t[:, None, None]
        seen = torch.cat([x, x.square(), time, time.square(), (3 * time).sin(), (7 * time).cos()], -1)
        return exact(x, t) + self.body(seen)


def picture(student, count, k, generator):
    x = torch.randn(count, 1, 2, generator=generator)
    with torch.no_grad():
        for j in range(k):
            x = x + (STEPS[j + 1] - STEPS[j]) * student(x, STEPS[j].expand(count))
    return x - STEPS[k] * student(x, STEPS[k].expand(count))


def energy(student, count=1000):
    """(energy distance to the mixture, mean distance to the nearest mode, the shares of the rarest and commonest one)."""
    with torch.no_grad():
        x = picture(student, count, 3, keyed(5, "drawn"))[:, 0]
    y = CENTRES[torch.arange(count) % 8] + WIDTH * torch.randn(count, 2, generator=keyed(6, "true"))
    within = torch.cdist(x, x).mean() + torch.cdist(y, y).mean()
    nearest, which = torch.cdist(x, CENTRES).min(1)
    shares = torch.bincount(which, minlength=8) / count
    return float(2 * torch.cdist(x, y).mean() - within), float(nearest.mean()), float(shares.min()), float(shares.max())


class OfSamples:
    """The exact velocity of the student's own distribution, as so many of its pictures stand for it: a perfect fake score."""

    def __init__(self, x):
        self.x = x[:, 0]

    def __call__(self, x, t):
        rows, a, s = x[:, 0], (1 - t)[:, None, None], t[:, None]
        near = (-(rows[:, None] - a * self.x).square().sum(-1) / (2 * s.square())).softmax(1)
        return ((rows - near @ self.x) / s)[:, None]


def distilled(student_steps, learned=False, seed=0):
    """DM alone (there is nothing to guide). learned: by a fake score that learns four times a student step, with IDA; else
    by a perfect one."""
    student, fake, g, count = Plane(seed), Plane(seed), keyed(seed, "distil"), 256 if learned else 128
    rates = (1e-3, 2e-3) if learned else (3e-3, 0.0)
    optimizers = [
        torch.optim.AdamW(n.parameters(), lr, (0.0, 0.9), weight_decay=0.0) for n, lr in zip((student, fake), rates)
    ]
    for step in range(student_steps):
        k = step % 4
        for _ in range(4 if learned else 0):
            with torch.no_grad():
                x = picture(student, count, int(torch.randint(4, (), generator=g)), g)
            t, noise = flow_matching.sample_times(count, 0.0, g), torch.randn(x.shape, generator=g)
            x_t, _ = flow_matching.noised(x, noise, t)
            optimizers[1].zero_grad()
            dmd.fake_loss(fake(x_t, t), x, noise).mean().backward()
            optimizers[1].step()
        with torch.no_grad():
            answers = fake if learned else OfSamples(picture(student, 512, k, g))
        x = picture(student, count, k, g)
        with torch.no_grad():
            tau = dmd.dm_times(torch.rand(count, generator=g), 0.0)
            x_tau, _ = flow_matching.noised(x, torch.randn(x.shape, generator=g), tau)
            v = exact(x_tau, tau)
            gradient = dmd.dm_gradient(v, answers(x_tau, tau), tau, dmd.normaliser(x, dmd.clean(x_tau, v, tau), 0.1))
        optimizers[0].zero_grad()
        dmd.proxy_loss(x, gradient).mean().backward()
        optimizers[0].step()
        if learned:
            dmd.align_(list(fake.parameters()), list(student.parameters()), 0.03)
    return student


def test_a_four_step_student_comes_to_eight_gaussians():
    """On the released scheduler's times for 4,096 tokens, whose last jump begins at .77; .642 and 1.32 before."""
    before, after = energy(Plane(0)), energy(distilled(40))
    assert after[0] < 0.2 * before[0]
    assert after[1] < 0.75 * before[1]
    assert after[2] > 0.05
    assert after[3] < 0.25
