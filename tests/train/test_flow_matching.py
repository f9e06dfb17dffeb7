"""Flow matching: signs, the time distribution, one function for the training density and the scheduler's shift."""

import pytest
import torch

from train.objectives import flow_matching as fm


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


@pytest.mark.parametrize("mu", [0.0, 0.5, 1.06])
def test_logit_normal_is_the_shifted_standard_one(mu):
    def draw(m):
        return fm.sample_times(4096, m, torch.Generator().manual_seed(5))

    t = draw(mu)
    assert torch.allclose(t, fm.shift(draw(0.0), mu), atol=1e-6)
    z = torch.logit(t.double())
    assert z.mean().item() == pytest.approx(mu, abs=0.01)
    assert z.std().item() == pytest.approx(1, abs=0.01)


def test_stratified_draws_hit_every_quantile_once():
    t = fm.sample_times(64, 0.5, torch.Generator().manual_seed(1))
    quantiles = torch.special.ndtr(torch.logit(t.double()) - 0.5) * 64
    assert sorted(quantiles.floor().int().tolist()) == list(range(64))
    free = fm.sample_times(64, 0.5, torch.Generator().manual_seed(1), stratified=False)
    assert len(set((torch.special.ndtr(torch.logit(free.double()) - 0.5) * 64).floor().int().tolist())) < 64


def test_loss_is_per_sample():
    v, target = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    target[1] = 2
    assert fm.loss(v, target).tolist() == [0, 4]
