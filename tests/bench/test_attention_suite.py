"""The gradients of attention as the suite measures them: each library gets the same result and lse."""

import torch

from bench.suites import attention
from bench.work.scale import TINY
from lens.ops.attention import choice as attention_choice
from lens.ops.attention.choice import Candidate


def exact(module, dout, q, k, v, out, lse, samples):
    """Gradients from the lse alone, in float64."""
    made = [torch.zeros_like(x, dtype=torch.float64) for x in (q, k, v)]
    start = 0
    for rows in samples.joint_lengths:
        own = slice(start, start + rows)
        start += rows
        g, a, b, c, o = (x[own].double() for x in (dout, q, k, v, out))
        p = (torch.einsum("qnh,knh->nqk", a, b) * samples.scale - lse[:, own, None].double()).exp()
        ds = p * (torch.einsum("qnh,knh->nqk", g, c) - (g * o).sum(-1).T[..., None]) * samples.scale
        made[0][own] = torch.einsum("nqk,knh->qnh", ds, b)
        made[1][own] = torch.einsum("nqk,qnh->knh", ds, a)
        made[2][own] = torch.einsum("nqk,qnh->knh", p, g)
    assert start == samples.joint_offsets[-1] == len(q)
    return [x.to(q.dtype) for x in made]


def test_a_library_that_is_right_passes_and_one_that_cannot_run_is_left_out(monkeypatch):
    here = Candidate("here", exact, device="cpu", arch=((0, 0), (0, 0)), dtypes=(TINY.dtype,), head_dim=(1, 512))
    away = Candidate("away", exact)
    monkeypatch.setattr(attention_choice, "BACKWARDS", [here, away])
    work = attention.prepare(TINY, [(9, 4), (9, 0), (6, 2)], "gradients", torch.device("cpu"))
    assert work.left_out == {"away": "runs on cuda, not on cpu"}
    assert list(work.subjects) == ["ours", "here"]
    got, expected = (call(*work.inputs[1]) for call in (work.subjects["here"].call, work.oracle))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=work.bound, rtol=work.bound)
    monkeypatch.setattr(attention_choice, "choose", lambda call: attention_choice.Choice(here))
    for a, b in zip(work.subjects["ours"].call(*work.inputs[1]), got, strict=True):
        assert torch.equal(a, b)
    heads = TINY.config.num_attention_heads * TINY.config.attention_head_dim
    assert work.flops == 2.5 * 4 * heads * (13**2 + 9**2 + 8**2)


def test_every_way_has_cases_and_gradients_name_their_libraries():
    cases = {case.id: case.subjects for case in attention.cases(TINY, gpu=True)}
    ways = [name.rsplit("/", 1)[1] for name in cases]
    assert {way: ways.count(way) for way in set(ways)} == {"forward": 9, "training": 2, "backward": 2, "gradients": 2}
    for name, subjects in cases.items():
        usual = attention.GRADIENTS if name.endswith("gradients") else attention.SUBJECTS
        assert subjects[: len(usual)] == usual
