"""Flow matching: signs, the time distribution, one function for the training density and the scheduler's shift, weights."""

import itertools
import math

import pytest
import torch
from scipy import stats

from lens import sampler as lens_sampler
from lens.sampler import Multistep
from train.objectives import flow_matching as fm


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_ends_and_velocity():
    x0, eps = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for t, want in ((0.0, x0), (1.0, eps)):
        x, v = fm.noised(x0, eps, torch.full((2,), t))
        assert torch.allclose(x, want)
        assert torch.equal(v, eps - x0)
    a, v = fm.noised(x0, eps, torch.tensor([0.3, 0.6]))
    b, _ = fm.noised(x0, eps, torch.tensor([0.31, 0.61]))
    assert torch.allclose((b - a) / 0.01, v, atol=1e-4)
    assert torch.allclose(a - torch.tensor([0.3, 0.6])[:, None, None] * v, x0, atol=1e-6)


def test_x_t_is_float32_of_the_exact_time_whatever_it_is_made_of():
    x0, eps = torch.randn(4, 3, 4).bfloat16(), torch.randn(4, 3, 4).bfloat16()
    t = torch.tensor([0.1234567, 0.5, 0.9876543, 0.999])
    x, v = fm.noised(x0, eps, t)
    time = t.double()[:, None, None]
    assert x.dtype == v.dtype == torch.float32
    torch.testing.assert_close(x.double(), (1 - time) * x0.double() + time * eps.double(), rtol=0, atol=3e-7)


@pytest.mark.parametrize("mu", [0.0, 0.5, 1.06])
def test_logit_normal_is_the_shifted_standard_one(mu):
    def draw(m):
        return fm.sample_times(4096, m, seeded(5))

    t = draw(mu)
    assert torch.allclose(t, fm.shift(draw(0.0), mu), atol=1e-6)
    z = torch.logit(t.double())
    assert z.mean().item() == pytest.approx(mu, abs=0.01)
    assert z.std().item() == pytest.approx(1, abs=0.01)


def test_shift_identity_in_double():
    z = torch.linspace(-12, 12, 401, dtype=torch.float64)
    for mu in (-0.7, 1.0, 1.06, 1.3106, 2.29):
        torch.testing.assert_close(fm.shift(torch.sigmoid(z), mu), torch.sigmoid(z + mu), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("mu", "sigma"), [(1.0, 1.0), (1.3106, 1.0), (1.06, 0.5)])
@pytest.mark.parametrize("stratified", [False, True])
def test_kolmogorov_smirnov_against_the_logit_normal_law(mu, sigma, stratified):
    def law(t):
        return stats.norm.cdf((stats.logistic.ppf(t) - mu) / sigma)

    t = torch.cat([fm.sample_times(64, mu, seeded(i), stratified, sigma) for i in range(300)]).double().numpy()
    assert stats.kstest(t, law).pvalue > 1e-3
    off = fm.sample_times(19_200, mu + 0.05, seeded(1), stratified, sigma).double().numpy()
    assert stats.kstest(off, law).pvalue < 1e-3  # the test sees a mu that is 0.05 off


@pytest.mark.parametrize(("u", "z"), [(0.0, -8.3), (1 - 2.0**-53, 8.2)])
def test_extreme_draws_stay_inside_the_open_interval(monkeypatch, u, z):
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, u, dtype=torch.float64))
    t = fm.sample_times(1, 1.3, seeded(0), stratified=False)
    assert ((t > 0) & (t < 1)).all()
    assert torch.logit(t.double()).item() - 1.3 == pytest.approx(z, abs=0.15)


def test_stratified_draws_hit_every_quantile_once():
    t = fm.sample_times(64, 0.5, seeded(1))
    quantiles = torch.special.ndtr(torch.logit(t.double()) - 0.5) * 64
    assert sorted(quantiles.floor().int().tolist()) == list(range(64))
    free = fm.sample_times(64, 0.5, seeded(1), stratified=False)
    assert len(set((torch.special.ndtr(torch.logit(free.double()) - 0.5) * 64).floor().int().tolist())) < 64


def test_mu_follows_the_line_of_the_paper():
    line = ((256, 1.0), (4096, 1.3))
    for tokens, want in ((256, 1.0), (1024, 1.06), (2304, 1.16), (4096, 1.3), (4232, 1.310625)):
        assert fm.mu_of(line, tokens) == pytest.approx(want, abs=1e-12)
        assert fm.mu_of(line, tokens) == pytest.approx(1.0 + 0.3 * (tokens - 256) / 3840, abs=1e-12)
    assert fm.mu_of(1.06, 1024) == 1.06
    assert fm.mu_of(line, 968) < 1.06 < fm.mu_of(line, 1064)  # the bucket's own tokens, not its base's


def test_loss_is_per_sample():
    v, target = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    target[1] = 2
    assert fm.loss(v, target).tolist() == [0, 4]
    assert fm.loss(v.bfloat16(), target.bfloat16()).dtype == torch.float32


def test_reductions_of_unequal_micro_batches_are_their_closed_forms():
    shapes = [(24, 1024), (10, 2304), (6, 4096), (24, 968)]
    losses = [torch.rand(n, generator=seeded(i), dtype=torch.float64) for i, (n, _) in enumerate(shapes)]
    every = torch.cat(losses)
    tokens = torch.cat([torch.full((n,), float(own), dtype=torch.float64) for n, own in shapes])
    want = {
        "rank_mean": torch.stack([own.mean() for own in losses]).mean(),
        "sample_mean": every.mean(),
        "token_mean": (every * tokens).sum() / tokens.sum(),
    }
    for reduction in fm.REDUCTIONS:
        weights = [fm.micro_batch_weight(reduction, *shape) for shape in shapes]
        got = sum(own.mean() * weight / sum(weights) for own, weight in zip(losses, weights))
        torch.testing.assert_close(got, want[reduction], rtol=1e-12, atol=0)
    share = {r: [fm.micro_batch_weight(r, *shape) for shape in shapes] for r in fm.REDUCTIONS}
    assert max(share["token_mean"][:3]) / min(share["token_mean"][:3]) == pytest.approx(24_576 / 23_040)
    with pytest.raises(ValueError, match="'mean'"):
        fm.micro_batch_weight("mean", 1, 1)


def euler_of_a_gaussian(mean, deviation, sign, steps=400):
    """Euler from N(0, 1) at t = 1 with the exact velocity E[eps - x0 | x_t] of x0 ~ N(mean, deviation^2)."""
    x = torch.special.ndtri((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for now, following in itertools.pairwise(times):
        variance = (1 - now) ** 2 * deviation**2 + now**2
        residual = (x - (1 - now) * mean) / variance
        x0, eps = mean + (1 - now) * deviation**2 * residual, now * residual
        x = x + (following - now) * sign * (eps - x0)
    return x.mean().item(), x.std().item()


def test_euler_with_the_exact_velocity_recovers_the_gaussian():
    coarse, fine = (euler_of_a_gaussian(0.7, 0.4, 1, steps) for steps in (2_000, 4_000))
    mean, deviation = (2 * b - a for a, b in zip(coarse, fine))  # first order: extrapolated
    assert mean == pytest.approx(0.7, abs=1e-3)
    assert deviation == pytest.approx(0.4, abs=1e-3)
    wrong, spread = euler_of_a_gaussian(0.7, 0.4, -1)
    assert abs(wrong - 0.7) > 0.1
    assert abs(spread - 0.4) > 0.1


def gaussian_velocity(x, t, mean=0.7, deviation=0.4):
    """E[eps - x0 | x_t] of x0 ~ N(mean, deviation^2)."""
    residual = (x - (1 - t) * mean) / ((1 - t) ** 2 * deviation**2 + t**2)
    return t * residual - (mean + (1 - t) * deviation**2 * residual)


def walked(x, times, second):
    """From x at the first of these times to the last."""
    solver = Multistep(times)
    for i, (now, following) in enumerate(itertools.pairwise(times)):
        v = gaussian_velocity(x, now)
        x = solver.step(i, x, v) if second else x + (following - now) * v
    return x


def errors_at_halved_steps(second):
    """Uniform in lambda from t = 0.98 to t = 0.05, against the flow of the Gaussian itself, which keeps quantiles."""

    def deviation(t):
        return ((1 - t) ** 2 * 0.4**2 + t**2).sqrt()

    start = torch.linspace(-2, 2, 9, dtype=torch.float64)
    ends = torch.tensor([0.98, 0.05], dtype=torch.float64)
    quantile = (start - (1 - ends[0]) * 0.7) / deviation(ends[0])
    exact, found = (1 - ends[1]) * 0.7 + deviation(ends[1]) * quantile, []
    for steps in (40, 80, 160, 320):
        times = torch.sigmoid(torch.linspace(*torch.logit(ends).tolist(), steps + 1, dtype=torch.float64))
        found.append((walked(start, times, second) - exact).abs().max().item())
    return found


@pytest.mark.parametrize(("second", "ratio"), [(False, 2.0), (True, 4.0)], ids=["Euler", "DPM-Solver++(2M)"])
def test_order_of_the_samplers(second, ratio):
    errors = errors_at_halved_steps(second)
    assert [a / b for a, b in itertools.pairwise(errors)] == pytest.approx([ratio] * 3, rel=0.12)
    assert errors[0] < 0.05


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 20])
def test_the_released_schedule_from_one_to_zero_is_finite_and_begins_and_ends_with_euler(steps):
    times = lens_sampler.sigmas(4096, steps)
    weights = Multistep(times).weights
    assert times[0] == 1
    assert times[-1] == 0
    assert weights.isfinite().all()
    corrected = [i for i in range(steps) if weights[i] != 0]
    assert corrected == list(range(2, steps - 1))  # the second has an infinite step before it
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)
    found = walked(start, times.double(), True)
    assert found.isfinite().all()
    assert torch.equal(found, walked(start, times.double(), False)) is (corrected == [])


def test_the_solver_is_diffusers():
    """Its multistep scheduler on the same times; a table of several schedules is as many schedules."""
    diffusers = pytest.importorskip("diffusers")
    both = torch.stack([lens_sampler.sigmas(tokens, 20) for tokens in (1024, 4096)], 1).double()
    start, found = torch.linspace(-2, 2, 9, dtype=torch.float64), []
    for times in both.unbind(1):
        scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        scheduler.set_timesteps(20)
        scheduler.sigmas, x = times, start
        for i, name in enumerate(scheduler.timesteps):
            x = scheduler.step(gaussian_velocity(x, times[i]), name, x).prev_sample
        found.append(x)
        torch.testing.assert_close(walked(start, times, True), x, rtol=0, atol=1e-6)
    table, x = Multistep(both[:, :, None]), start.expand(2, 9)
    for i in range(20):
        x = table.step(i, x, gaussian_velocity(x, both[i][:, None]))
    torch.testing.assert_close(x, torch.stack(found), rtol=0, atol=1e-6)


@pytest.mark.parametrize("times", [[1.0], [0.5, 0.5], [0.2, 0.7], [1.2, 0.0], [0.5, -0.1], [1.0, float("nan")]])
def test_times_that_do_not_fall_are_refused(times):
    with pytest.raises(ValueError, match="Multistep: sigmas must fall from at most 1 to at least 0, got"):
        Multistep(torch.tensor(times))


def learned_mixture(steps):
    """A small MLP trained on three Gaussians in the plane, with the stage's own times, x_t and loss -> Euler's samples."""
    centres = torch.tensor([[2.0, 0.0], [-1.0, 1.8], [-1.0, -1.8]])
    shares, deviation, g = torch.tensor([0.5, 0.3, 0.2]), 0.3, seeded(4)

    def data(n):
        pick = torch.multinomial(shares, n, replacement=True, generator=g)
        return centres[pick] + deviation * torch.randn(n, 2, generator=g)

    layers = [torch.nn.Linear(2 + 16, 96), torch.nn.Linear(96, 96), torch.nn.Linear(96, 2)]
    for layer in layers:
        torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=g)
        torch.nn.init.zeros_(layer.bias)

    def velocity(x, t):
        angles = t[:, None] * math.pi * 2.0 ** torch.arange(-1, 7)
        h = torch.cat([x, angles.sin(), angles.cos()], 1)
        for layer in layers[:-1]:
            h = torch.nn.functional.silu(layer(h))
        return layers[-1](h)

    parameters = [p for layer in layers for p in layer.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=4e-3, weight_decay=0.0)
    for step in range(steps):
        clean = data(512)[:, None]
        t = fm.sample_times(512, 0.0, g)
        x, target = fm.noised(clean, torch.randn(clean.shape, generator=g), t)
        optimizer.zero_grad()
        fm.loss(velocity(x[:, 0], t)[:, None], target).mean().backward()
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / steps)
        optimizer.step()
    n = 2_000
    with torch.no_grad():
        x, times = torch.randn(n, 2, generator=g), torch.linspace(1, 0, 81)
        for now, following in itertools.pairwise(times):
            x = x + (following - now) * velocity(x, now.expand(n))
    return x, data(n), centres, shares


def transport(a, b):
    """W2 of two samples of one size."""
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(a, b).pow(2).double().numpy()
    return math.sqrt(cost[linear_sum_assignment(cost)].mean())


@pytest.mark.parametrize(
    ("steps", "farthest", "sigmas"),
    [(700, 0.4, 3.0), pytest.param(12_000, 0.2, 3.0, marks=pytest.mark.nightly)],
)
def test_a_trained_mixture_is_the_mixture(steps, farthest, sigmas):
    made, real, centres, shares = learned_mixture(steps)
    found = torch.bincount(torch.cdist(made, centres).argmin(1), minlength=3) / len(made)
    error = (shares * (1 - shares) / len(made)).sqrt()
    assert transport(made, real) < farthest
    assert ((found - shares).abs() < sigmas * error).all()
