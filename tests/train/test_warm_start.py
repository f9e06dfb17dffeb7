"""A generator carried into another basis of the same latents draws the same velocities there."""

import copy

import pytest
import torch

from lens.config import LensConfig
from lens.model import LensTransformer2DModel
from lens.packing import plan
from train.networks.warm_start import latent_map, rebase


def test_the_map_is_found_and_its_share_told():
    generator = torch.Generator().manual_seed(0)
    m = torch.eye(32) + 0.1 * torch.randn(32, 32, generator=generator)
    new = torch.randn(600, 32, generator=generator)
    found, share = latent_map(new @ m, new)
    torch.testing.assert_close(found, m, atol=1e-4, rtol=1e-4)
    assert share == pytest.approx(1, abs=1e-6)
    _, share = latent_map(new @ m + torch.randn(600, 32, generator=generator) * m.norm() / 32**0.5, new)
    assert share == pytest.approx(0.5, abs=0.05)
    with pytest.raises(ValueError, match="equal shapes"):
        latent_map(new, new[:, :16])


def test_rebased_velocities_are_the_old_ones_in_the_new_basis():
    generator = torch.Generator().manual_seed(1)
    shape = LensConfig.mini()
    old = LensTransformer2DModel(shape).eval()
    old.init_weights(generator)
    with torch.no_grad():  # the output layer starts at zero
        old.image_out.weight.normal_(0, 0.1, generator=generator)
        old.image_out.bias.normal_(0, 0.1, generator=generator)
    new, m = copy.deepcopy(old), torch.eye(32) + 0.1 * torch.randn(32, 32, generator=generator)
    rebase(new, m)
    packing, t = plan([(2, 2)], [3], shape.axes_dims_rope), torch.tensor([0.4])
    x = torch.randn(4, 32, generator=generator)
    text = torch.randn(3, 4, shape.enc_hidden_dim, generator=generator)

    def velocity(model, x):
        rows = model.project_text(list(text.unbind(1)), packing.text_lengths)
        return model.denoise(x, rows, model.modulate(t), packing)

    with torch.no_grad():
        torch.testing.assert_close(velocity(new, x) @ m, velocity(old, x @ m), atol=2e-4, rtol=1e-3)
