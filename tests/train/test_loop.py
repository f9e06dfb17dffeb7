"""What every training loop shares, against its formulas."""

import torch

from train.loop.ema import Ema


def test_the_running_average_follows_its_formula():
    """d = min(decay, (1 + n) / (10 + n)), n updates before; another module's values are taken when it comes."""
    generator = torch.Generator().manual_seed(0)
    one, two = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    ema = Ema(one, 0.3)
    want = one.weight.detach().clone().double()
    for n, module in enumerate((one, one, one, two, one)):
        with torch.no_grad():
            module.weight.copy_(torch.randn(2, 3, generator=generator))
        ema.update(module)
        d = min(0.3, (1 + n) / (10 + n))
        want = d * want + (1 - d) * module.weight.detach().double()
        torch.testing.assert_close(ema.average["weight"].double(), want, atol=1e-6, rtol=0)
