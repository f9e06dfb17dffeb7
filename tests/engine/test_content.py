"""When a glance at weights tells that they were written to."""

import pytest
import torch
from torch import nn

from lens.engine.content import SAMPLES, WHOLE, content, glance


def weights(dtype=torch.float32):
    made = [torch.linspace(1, 2, n, dtype=torch.float64).to(dtype).view(-1, 2) for n in (2 * WHOLE, 40 * SAMPLES)]
    made = [*made, torch.arange(6, dtype=torch.uint8), made[0].T]
    return [nn.Parameter(w, requires_grad=False) for w in made]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_kind_of_write_is_seen_and_nothing_else(dtype):
    own = weights(dtype)
    before = glance(own)
    assert glance(own) == before
    for weight in own:
        weight.data = weight.data.clone()  # as where a part visits a device
    assert glance(own) == before
    own[0][17, 1] += 4
    assert glance(own) != before, "torch counts it, whichever element it is"
    for edit in (
        lambda: own[0].data.mul_(1.5),
        lambda: own[1].data[7].add_(1),  # small enough to be read whole
        lambda: own[2].data[3:4].add_(1),
        lambda: own[3].data.neg_(),
    ):
        before = glance(own)
        edit()
        assert glance(own) != before
    before = glance(own)
    own[0] = nn.Parameter(own[0].data, requires_grad=False)
    assert glance(own) != before, "the same numbers, but another parameter"


def test_what_has_no_counts_or_no_content():
    with torch.inference_mode():
        own = torch.ones(3)
    before = glance([own])
    with torch.inference_mode():
        own[1] = 2
    assert glance([own]) != before
    glance([torch.empty(3, device="meta"), torch.empty(0)])


def test_little_is_read_of_large_weights():
    (read,) = content([torch.ones(100 * WHOLE)])
    assert len(read) == 4 * SAMPLES
