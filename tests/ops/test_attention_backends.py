"""The choice among attention libraries, and every adapter's call against a stand-in that computes the true result."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
import types
import warnings

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lens import ops
from lens.ops import (
    _attention_cuda,
    _attention_gradients,
    _attention_hopper,
    attention_backends,
    attention_candidates,
    backend,
)
from lens.ops._attention_bound import HeadNorms, known_bound, score_bound
from lens.ops._attention_places import DevicePlaces
from lens.ops._attention_repeatable import repeatable
from lens.ops._samples import Samples
from lens.ops.attention_backends import BACKWARDS, CANDIDATES, Candidate, Choice, Need, choose, need_of, report, use
from train.denoiser import _keep

BY_NAME = {c.name: c for c in CANDIDATES}
ALL_MODULES = {
    "flash_attn_interface",
    "fa3_fwd_interface",
    "flash_attn",
    "flash_attn.flash_attn_interface",
    "flash_attn.cute",
    "flash_attn.cute.interface",
    "torch.nn.attention.varlen",
}


def need(**changes: object) -> Need:
    released = dict(
        device="cuda",
        arch=(9, 0),
        dtype=torch.bfloat16,
        head_dim=64,
        backward=False,
        device_lengths=False,
        longest=4511,
    )
    return Need(**{**released, **changes})


@pytest.fixture
def machine(monkeypatch):
    """Says which modules are installed; what is there may then be chosen."""

    def have(*modules: str) -> None:
        monkeypatch.setattr(attention_candidates, "installed", lambda name: name in modules)
        choose.cache_clear()

    monkeypatch.setattr(attention_candidates, "failed", {})
    monkeypatch.setattr(backend, "unavailable", lambda device: "")
    monkeypatch.setattr(backend, "without", lambda kernel: "")
    have(*ALL_MODULES, "cutlass")
    yield have
    choose.cache_clear()


# ------------------------------------------------------------------------------------------------ the choice


def test_the_highest_rate_among_what_is_installed_wins(machine):
    assert choose(need()).name == "flash-attn-3"
    machine("torch.nn.attention.varlen", "flash_attn")
    assert choose(need()).name == "torch-cudnn"  # 408 beats 321 for long samples
    assert choose(need(longest=600)).name == "flash-attn-2"  # and loses for short ones, a launch for each
    assert choose(need(device_lengths=True)).name == "flash-attn-2"  # a captured step has no lengths to loop over
    machine("torch.nn.attention.varlen")
    assert choose(need(device_lengths=True)).name == "torch-varlen"
    machine()
    assert choose(need(arch=(7, 5))).name == "torch-sdpa"


@pytest.mark.parametrize(
    ("changes", "name", "why"),
    [
        ({"arch": (8, 0)}, "flash-attn-3", "needs compute capability 9.0 to 9.0, this is 8.0"),
        ({"arch": (12, 0)}, "flash-attn-4", "needs compute capability 9.0 to 11.9, this is 12.0"),
        ({"arch": (7, 5)}, "torch-varlen", "needs compute capability 8.0"),
        ({"dtype": torch.float32}, "flash-attn-2", "does not compute in float32"),
        ({"head_dim": 320}, "flash-attn-2", "needs heads of a multiple of 8 up to 256 channels, these have 320"),
        ({"head_dim": 60}, "flash-attn-3", "these have 60"),
        ({"device_lengths": True}, "torch-cudnn", "reads the lengths on the host"),
        ({"device_lengths": True}, "torch-sdpa", "reads the lengths on the host"),
        ({"backward": True}, "torch-cudnn-varlen", "has no backward pass"),
        ({"device": "cpu"}, "torch-sdpa", "runs on cuda, not on cpu"),
    ],
)
def test_what_a_candidate_lacks_is_said(machine, changes, name, why):
    rows = {row[0]: row for row in report(need(**changes))}
    assert not rows[name][1]
    assert why in rows[name][2]
    with use(name), pytest.raises(RuntimeError, match=f"{name} was asked for but cannot run: "):
        choose(need(**changes))


def test_batch_invariance_refuses_what_looks_at_other_samples(machine, monkeypatch):
    """And chooses the same for captured and plain steps, whatever the longest sample of the call is."""
    table = attention_backends.table()
    fastest = {(a, s, n): {**e, "tflops": 999} for (a, s, _), e in table.items() for n in ("torch-cudnn-varlen",)}
    monkeypatch.setattr(attention_backends, "table", lambda: {**table, **fastest})
    for name, why in (
        ("torch-cudnn-varlen", "is not batch-invariant: cuDNN plans all samples of a call as one problem"),
        ("flash-attn-4", "is not batch-invariant: on Blackwell its tiles follow the longest sample of the call"),
    ):
        assert not next(c for c in attention_backends.CANDIDATES if c.name == name).missing(need())
        rows = {row[0]: row for row in report(need(invariant=True))}
        assert rows[name] == (name, False, why)
        with use(name), pytest.raises(RuntimeError, match=f"{name} was asked for but cannot run: {why}"):
            choose(need(invariant=True))
    libraries = {"flash_attn": "flash-attn-2", "": "torch-varlen", "flash_attn_interface": "flash-attn-3"}
    for installed, expected in libraries.items():
        machine("torch.nn.attention.varlen", installed)
        for device_lengths in (True, False):
            for longest in (1, 600, 4511):
                asked = need_of(torch.device("meta"), torch.bfloat16, 64, longest, device_lengths, invariant=True)
                asked = dataclasses.replace(asked, device="cuda", arch=(9, 0))
                assert choose(asked).name == expected, (installed, device_lengths, longest)
    assert "plain steps run what captured ones do" in {r[0]: r for r in report(need(invariant=True))}["torch-cudnn"][2]
    assert choose(need(invariant=True, dtype=torch.float32)).name == "torch-sdpa", "one call per sample"
    with pytest.raises(RuntimeError, match="no attention backend can serve"):
        choose(need(invariant=True, dtype=torch.float32, device_lengths=True))


@pytest.mark.parametrize("places", [False, True])
def test_batch_invariance_is_asked_of_the_choice(monkeypatch, places):
    asked = []
    monkeypatch.setattr(backend, "choose", lambda op, x: "cuda")
    candidate = Candidate("zero", lambda q, k, v, samples, module: torch.zeros_like(q))
    monkeypatch.setattr(attention_backends, "choose", lambda need: asked.append(need) or Choice(candidate))
    q, offsets = torch.randn(5, 1, 8), torch.tensor([0, 5], dtype=torch.int32)
    none = torch.zeros(2, dtype=torch.int32)
    where = DevicePlaces(None, None, 5, 5, offsets) if places else None
    with torch.no_grad():
        for invariant in (False, True):
            ops.joint_attention(q, q, q, [5], [0], offsets, none, places=where, invariant=invariant)
    assert [need.invariant for need in asked] == [False, False, True, True]


def test_our_kernel_is_not_chosen_on_a_prediction(machine, monkeypatch):
    for changes in ({}, {"longest": 600}, {"device_lengths": True}, {"backward": True}):
        rows = {row[0]: row for row in report(need(**changes))}
        assert not rows["lens-hopper"][1]
        assert "not chosen before it was measured; LENS_ATTENTION=lens-hopper forces it" in rows["lens-hopper"][2]
        with use("lens-hopper"):
            assert choose(need(**changes)).name == "lens-hopper"
            assert report(need(**changes))[0][2].startswith("forced; predicted")
            assert "forces it" not in report(need(**changes))[0][2]
    measured = {**attention_backends.entry("lens-hopper", need()), "status": "measured"}
    table = {**attention_backends.table(), ("9.0", "long", "lens-hopper"): measured}
    monkeypatch.setattr(attention_backends, "table", lambda: table)
    choose.cache_clear()
    assert choose(need()).name == "lens-hopper"
    assert choose(need(longest=600)).name == "flash-attn-3"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"arch": (8, 0)}, "needs compute capability 9.0 to 9.0, this is 8.0"),
        ({"arch": (10, 0)}, "needs compute capability 9.0 to 9.0, this is 10.0"),
        ({"dtype": torch.float16}, "does not compute in float16"),
        ({"head_dim": 128}, "needs heads of a multiple of 64 up to 64 channels, these have 128"),
        ({}, "lens._C was built without joint_attention"),
    ],
)
def test_what_our_kernel_lacks_is_said(machine, monkeypatch, changes, why):
    if not changes:
        monkeypatch.setattr(backend, "without", lambda kernel: f"lens._C was built without {kernel}")
    with use("lens-hopper"), pytest.raises(RuntimeError, match=f"lens-hopper was asked for but cannot run: {why}"):
        choose(need(**changes))


def test_the_forward_only_package_serves_no_training(machine):
    machine("fa3_fwd_interface")
    assert choose(need()).name == "flash-attn-3"
    assert BY_NAME["flash-attn-3"].missing(need(backward=True)) == "flash_attn_interface is not installed (backward)"
    assert choose(need(backward=True)).name == "torch-sdpa", "mixed with nothing before that was measured"
    with use("flash-attn-3"):
        assert choose(need(backward=True)).gradients == "torch-flash", "its logarithms serve another's gradients"


def test_a_library_without_its_compiler_is_not_there(machine):
    machine("flash_attn", "flash_attn.cute")
    assert BY_NAME["flash-attn-4"].missing(need()) == "cutlass is not installed, which it is built on"
    assert choose(need(device_lengths=True)).name == "flash-attn-2"


def test_every_candidate_is_reported_once_with_a_reason_and_one_is_chosen(machine):
    for changes in ({}, {"backward": True}, {"device_lengths": True}, {"dtype": torch.float32}, {"arch": (8, 6)}):
        rows = report(need(**changes))
        assert sorted(name for name, _, _ in rows) == sorted(BY_NAME)
        assert [chosen for _, chosen, _ in rows].count(True) == 1
        assert rows[0][1], "the chosen one comes first"
        assert all(why for _, _, why in rows)
    rows = report(need(device="cpu"))
    assert not any(chosen for _, chosen, _ in rows)


def test_the_choice_in_a_few_words(machine, monkeypatch):
    monkeypatch.setattr(attention_backends, "capability", lambda index: (9, 0))
    machine("flash_attn", "torch.nn.attention.varlen")
    said = attention_backends.summary()
    assert said == "torch-cudnn (plain), flash-attn-2 (captured), flash-attn-2 (training), flash-attn-2 (gradients)"
    with use("torch-cudnn"):
        said = attention_backends.summary()
        assert said == "torch-cudnn (plain), none (captured), torch-cudnn (training), torch-cudnn (gradients)"
    with use("torch-cudnn-varlen"):
        said = attention_backends.summary()
        assert said == "torch-cudnn-varlen (plain), torch-cudnn-varlen (captured), none (training)"
    with use("flash-attn-3"), pytest.raises(RuntimeError, match="is not installed"):
        attention_backends.summary()


def test_forcing(machine):
    with use("torch-sdpa"):
        assert choose(need()).name == "torch-sdpa"
        name, chosen, why = report(need())[0]
        assert (name, chosen) == ("torch-sdpa", True)
        assert why.startswith("forced; predicted 310 TFLOP/s for long calls on 9.0")
    assert choose(need()).name == "flash-attn-3"
    with pytest.raises(ValueError, match=r"name must be one of lens-hopper, .*, got 'flash'"), use("flash"):
        pass


def test_environment():
    code = (
        "from lens.ops import attention_backends as a; print(a.forced()); a.choose(a.Need('cuda',(9,0),None,64,0,0,9))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env={"LENS_ATTENTION": "quick", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, cwd=backend.__file__.split("lens")[0], timeout=300,
    )  # fmt: skip
    assert run.stdout.split() == ["quick"]
    assert "must be one of lens-hopper, flash-attn-3" in run.stderr


def test_nothing_is_imported_before_it_is_chosen(tmp_path, monkeypatch):
    """A broken package of each name lies on the path: found, and not run."""
    for name in ("flash_attn_interface", "fa3_fwd_interface"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    for name in ("__init__", "interface"):
        (tmp_path / "flash_attn" / "cute" / f"{name}.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    attention_candidates.installed.cache_clear()
    try:
        found = {name for name in ALL_MODULES if attention_candidates.installed(name)}
        # flash-attn-4 alone makes a folder flash_attn without code of its own: that is not flash-attn 2
        assert found == ALL_MODULES - {"flash_attn", "flash_attn.flash_attn_interface"}
        (tmp_path / "flash_attn" / "__init__.py").write_text("raise SystemExit('imported')")
        attention_candidates.installed.cache_clear()
        sys.path_importer_cache.clear()
        assert attention_candidates.installed("flash_attn")
        assert attention_candidates.installed("flash_attn.cute")
    finally:
        attention_candidates.installed.cache_clear()
    assert not {"flash_attn", "flash_attn_interface", "fa3_fwd_interface"} & set(sys.modules)


def test_the_table_names_candidates_and_sources():
    entries = json.loads(attention_backends.TABLE.read_text())["entries"]
    assert len({(e["arch"], e["shape"], e["backend"]) for e in entries}) == len(entries)
    gradients = {b.name: b for b in BACKWARDS}
    for e in entries:
        length, _, which = e["shape"].partition(" ")
        assert length in ("long", "short")
        assert which in ("", "training", "backward")
        assert e["status"] in ("measured", "predicted")
        assert len(e["source"]) > 10
        low, high = (gradients if which == "backward" else BY_NAME)[e["backend"]].arch
        assert low <= tuple(map(int, e["arch"].split("."))) <= high
    assert "torch-cudnn-varlen" not in {e["backend"] for e in entries}  # never chosen before it was measured


# ------------------------------------------------------------------------------------------------ who computes gradients


def rates(monkeypatch, *lines, arch="9.0") -> None:
    """The table: (shape, candidate, TFLOP/s, status)."""
    table = {(arch, s, n): dict(arch=arch, shape=s, tflops=t, status=status, source="x") for s, n, t, status in lines}
    monkeypatch.setattr(attention_backends, "table", lambda: table)
    choose.cache_clear()


def names(choice: Choice) -> tuple[str, str, bool]:
    return choice.name, choice.gradients, choice.backward is not None


def test_a_library_computes_its_own_gradients_unless_two_were_measured_to_be_faster(machine, monkeypatch):
    machine("flash_attn", "flash_attn.flash_attn_interface", "torch.nn.attention.varlen")
    lines = [("long", "torch-varlen", 900), ("long", "flash-attn-2", 300)]
    lines += [("long backward", "torch-flash", 200), ("long backward", "flash-attn-2", 250)]
    rates(monkeypatch, *((*line, "predicted") for line in lines))
    assert names(choose(need(backward=True))) == ("flash-attn-2", "flash-attn-2", False), "1/300 + 2.5/250"
    rates(monkeypatch, *((*line, "measured") for line in lines))
    assert names(choose(need(backward=True))) == ("torch-varlen", "flash-attn-2", True), "the best of both"
    with use("torch-varlen"):
        assert names(choose(need(backward=True))) == ("torch-varlen", "torch-flash", False), "forced for both passes"
    lines[3] = ("long backward", "flash-attn-2", 199)
    rates(monkeypatch, *((*line, "measured") for line in lines))
    assert names(choose(need(backward=True))) == ("torch-varlen", "torch-flash", False)
    for row in report(need(backward=True)), report(need(backward=True), backward=True):
        assert row[0][1:] == (True, row[0][2])
        assert [chosen for _, chosen, _ in row].count(True) == 1


def test_a_forward_pass_in_training_is_chosen_by_its_rate_there(machine, monkeypatch):
    """Ours takes the running maximum where a gradient is recorded: what it reaches with a bound must not choose it."""
    machine("torch.nn.attention.varlen")
    lines = [("long", "lens-hopper", 540), ("long training", "lens-hopper", 300), ("long", "torch-varlen", 320)]
    lines += [("long backward", "torch-flash", 200)]
    rates(monkeypatch, *((*line, "measured") for line in lines))
    assert names(choose(need())) == ("lens-hopper", "lens-hopper", False)
    assert names(choose(need(backward=True))) == ("torch-varlen", "torch-flash", False)
    lines[1] = ("long training", "lens-hopper", 330)
    rates(monkeypatch, *((*line, "measured") for line in lines))
    assert names(choose(need(backward=True))) == ("lens-hopper", "torch-flash", True)


def test_short_samples_have_rates_of_their_own_in_training(machine, monkeypatch):
    machine("flash_attn", "flash_attn.flash_attn_interface", "torch.nn.attention.varlen")
    lines = [(f"{length}{which}", name, rate) for which in ("", " backward") for length, name, rate in (
        ("long", "flash-attn-2", 200), ("long", "torch-varlen", 300), ("long", "torch-flash", 300),
        ("short", "flash-attn-2", 200), ("short", "torch-varlen", 100), ("short", "torch-flash", 100),
    )]  # fmt: skip
    rates(monkeypatch, *((*line, "measured") for line in lines))
    assert choose(need(backward=True)).gradients == "torch-flash"
    assert choose(need(backward=True, longest=600)).gradients == "flash-attn-2"


def test_a_rate_of_another_architecture_decides_nothing_beside_one_of_this(machine, monkeypatch):
    machine("flash_attn", "torch.nn.attention.varlen")
    rates(monkeypatch, ("long", "flash-attn-2", 900, "predicted"), arch="8.0")
    assert choose(need(arch=(8, 6))).name == "flash-attn-2"
    table = dict(attention_backends.table())
    rates(monkeypatch, ("long", "torch-varlen", 100, "measured"), arch="8.6")
    own = attention_backends.table()
    monkeypatch.setattr(attention_backends, "table", lambda: {**table, **own})
    choose.cache_clear()
    assert choose(need(arch=(8, 6))).name == "torch-varlen"


def test_gradients_that_change_from_run_to_run_are_taken_only_where_they_are_forced(machine, monkeypatch):
    machine("torch.nn.attention.varlen")
    lines = [("long", "torch-cudnn", 400), ("long backward", "torch-cudnn", 400)]
    lines += [("long", "torch-varlen", 300), ("long backward", "torch-flash", 200)]
    rates(monkeypatch, *((*line, "measured") for line in lines))
    asked = need(backward=True)
    assert names(choose(asked)) == ("torch-cudnn", "torch-flash", True)
    why = {row[0]: row[2] for row in report(asked, backward=True)}["torch-cudnn"]
    assert "other bits every time, which torch cannot switch off; LENS_ATTENTION_BACKWARD=torch-cudnn forces it" in why
    with attention_backends.use_backward("torch-cudnn"):
        assert names(choose(asked)) == ("torch-cudnn", "torch-cudnn", False)
        assert report(asked, backward=True)[0][2].startswith("forced; measured 400")
        with use("torch-varlen"):
            assert names(choose(asked)) == ("torch-varlen", "torch-cudnn", True)
    with use("torch-cudnn"):
        assert names(choose(asked)) == ("torch-cudnn", "torch-cudnn", False), "forced for both passes"
    with use("lens-hopper"):
        assert names(choose(asked)) == ("lens-hopper", "torch-flash", True), "forced for the forward pass alone"


def test_forced_gradients_that_cannot_run_raise(machine):
    machine("torch.nn.attention.varlen")
    asked = need(backward=True)
    for name, why in (("flash-attn-3", "flash_attn_interface is not installed"), ("flash-attn-2", "flash_attn")):
        with (
            attention_backends.use_backward(name),
            pytest.raises(RuntimeError, match=f"{name} was asked for but cannot run: .*{why}"),
        ):
            choose(asked)
    with (
        attention_backends.use_backward("torch-cudnn"),
        use("torch-sdpa"),
        pytest.raises(RuntimeError, match=r"torch-sdpa with the gradients of torch-cudnn .* it gives no logarithms"),
    ):
        choose(asked)
    with attention_backends.use_backward("torch-cudnn"):
        assert choose(need()).backward is None, "inference does not ask for gradients"
    with pytest.raises(ValueError, match="must be one of flash-attn-3"), attention_backends.use_backward("torch-sdpa"):
        pass


def test_heads_too_wide_for_a_fixed_order_are_left_to_another_library(machine):
    """flash-attn 3 refuses a repeatable backward pass beyond 192 channels, by its own words."""
    machine("flash_attn_interface", "torch.nn.attention.varlen")
    assert names(choose(need(backward=True, head_dim=192))) == ("flash-attn-3", "flash-attn-3", False)
    assert choose(need(head_dim=256)).name == "flash-attn-3"
    assert names(choose(need(backward=True, head_dim=256))) == ("torch-varlen", "torch-flash", False)
    with use("flash-attn-3"):
        assert names(choose(need(backward=True, head_dim=256))) == ("flash-attn-3", "torch-flash", True)


# ------------------------------------------------------------------------------------------------ the adapters


def true_attention(q, k, v, query_offsets: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale) v per sample in float32, told by offsets."""
    parts = []
    for (a, b), (c, d) in zip(
        zip(query_offsets.tolist(), query_offsets.tolist()[1:]), zip(offsets.tolist(), offsets.tolist()[1:])
    ):
        logits = torch.einsum("qnh,knh->nqk", q[a:b].float(), k[c:d].float()) * scale
        parts.append(torch.einsum("nqk,knh->qnh", logits.softmax(-1), v[c:d].float()))
    return torch.cat(parts).to(q.dtype)


def true_logarithms(q, k, query_offsets: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """[N, RQ]"""
    ends = query_offsets.tolist(), offsets.tolist()
    parts = [
        (torch.einsum("qnh,knh->nqk", q[a:b].double(), k[c:d].double()) * scale).logsumexp(-1)
        for a, b, c, d in zip(ends[0], ends[0][1:], ends[1], ends[1][1:])
    ]
    return torch.cat(parts, 1)


def true_gradients(dout, q, k, v, out, lse, query_offsets: Tensor, offsets: Tensor, scale: float) -> list[Tensor]:
    """From the logarithms that are given, as every library does, in float64."""
    assert lse.shape == (q.shape[1], q.shape[0])
    assert lse.is_contiguous()
    assert dout.shape == out.shape == q.shape
    made = [torch.zeros(x.shape, dtype=torch.float64) for x in (q, k, v)]
    ends = query_offsets.tolist(), offsets.tolist()
    for a, b, c, d in zip(ends[0], ends[0][1:], ends[1], ends[1][1:]):
        go, qs, ks, vs, o = (x.double() for x in (dout[a:b], q[a:b], k[c:d], v[c:d], out[a:b]))
        p = torch.exp(torch.einsum("qnh,knh->nqk", qs, ks) * scale - lse[:, a:b, None].double())
        ds = p * (torch.einsum("qnh,knh->nqk", go, vs) - (go * o).sum(-1).T[..., None]) * scale
        made[0][a:b] = torch.einsum("nqk,knh->qnh", ds, ks)
        made[1][c:d] = torch.einsum("nqk,qnh->knh", ds, qs)
        made[2][c:d] = torch.einsum("nqk,qnh->knh", p, go)
    return [x.to(q.dtype) for x in made]


def filled(given: list[Tensor], made: list[Tensor]) -> None:
    for x, y in zip(given, made, strict=True):
        assert x.is_contiguous()
        x.copy_(y)


def checked(query_offsets, offsets, longest_query, longest) -> None:
    """What kernels do with wrong bounds is to leave rows out, silently."""
    assert query_offsets.dtype == offsets.dtype == torch.int32
    assert longest_query >= query_offsets.diff().max()
    assert longest >= offsets.diff().max()


class Fake2(types.SimpleNamespace):
    """flash-attn 2: its order of arguments and its defaults."""

    @staticmethod
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert (dropout_p, causal, window_size, softcap, alibi_slopes) == (0.0, False, (-1, -1), 0.0, None)
        assert deterministic
        checked(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        out = true_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale)
        return (out, true_logarithms(q, k, cu_seqlens_q, cu_seqlens_k, scale), None) if return_attn_probs else out

    @staticmethod
    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
        assert (alibi_slopes, deterministic, rng_state, zero_tensors) == (None, True, None, False)
        checked(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        places = cu_seqlens_q, cu_seqlens_k, softmax_scale
        filled([dq, dk, dv], true_gradients(dout, q, k, v, out, softmax_lse, *places))


class Fake3(types.SimpleNamespace):
    """flash-attn 3: seqused before the scale, no dropout; early releases return the denominators, too."""

    @staticmethod
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        assert (seqused_q, seqused_k, causal, qv, num_splits, deterministic) == (None, None, False, None, 1, True)
        checked(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        lse = true_logarithms(q, k, cu_seqlens_q, cu_seqlens_k, scale)
        return true_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale), lse

    @staticmethod
    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert (sequed_q, sequed_k, is_causal, window_size_left, window_size_right) == (None, None, False, -1, -1)
        assert (softcap, deterministic, sm_margin) == (0.0, True, 0)
        checked(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        places = cu_seqlens_q, cu_seqlens_k, softmax_scale
        filled([dq, dk, dv], true_gradients(dout, q, k, v, out, softmax_lse, *places))


class Fake4(types.SimpleNamespace):
    """flash-attn 4: lengths after the offsets by name, seqused and a page table between, always a pair."""

    @staticmethod
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, seqused_q=None,
        seqused_k=None, page_table=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, return_lse=False,
    ):  # fmt: skip
        assert (seqused_q, seqused_k, page_table, causal, learnable_sink) == (None, None, None, False, None)
        assert (num_splits, deterministic) == (1, True)
        checked(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        lse = true_logarithms(q, k, cu_seqlens_q, cu_seqlens_k, softmax_scale) if return_lse else None
        return true_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale), lse

    @staticmethod
    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2,
        num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2,
        AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None,
    ):  # fmt: skip
        assert (causal, softcap, window_size_left, window_size_right) == (False, 0.0, None, None)
        assert (m_block_size, pack_gqa, seqused_q, seqused_k, deterministic, dq) == (64, False, None, None, True, None)
        checked(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return *true_gradients(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, softmax_scale), None


class FakeVarlen(types.SimpleNamespace):
    """torch's own variable-length call, as the oldest supported torch has it: no `scale`."""

    @staticmethod
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None, scale=None):
        assert not is_causal
        checked(cu_seq_q, cu_seq_k, max_q, max_k)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return true_attention(query, key, value, cu_seq_q, cu_seq_k, scale)


FAKES = {"flash-attn-2": Fake2, "flash-attn-3": Fake3, "flash-attn-4": Fake4, "torch-varlen": FakeVarlen}
IMAGES, TEXTS = [5, 0, 9, 4], [3, 2, 0, 6]


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def inputs(dtype=torch.float32, grad=False):
    g = torch.Generator().manual_seed(3)
    rows = sum(IMAGES) + sum(TEXTS)
    return [torch.randn(rows, 2, 8, generator=g).to(dtype).requires_grad_(grad) for _ in range(3)]


@pytest.fixture
def cudnn_op(monkeypatch):
    """torch's private cuDNN op: its order of arguments, the true result."""

    def forward(
        query, key, value, bias, cu_q, cu_k, max_q, max_k, lse, dropout=0.0, causal=False, debug=False, *, scale=None
    ):
        assert (bias, lse, dropout, causal, debug) == (None, True, 0.0, False, False)
        checked(cu_q, cu_k, max_q, max_k)
        return true_attention(query, key, value, cu_q, cu_k, scale), None

    monkeypatch.setattr(torch.ops.aten, "_cudnn_attention_forward", forward)


def launch(kernel, like, dtype=None, *, q, k, v, image_out, text_out, lse, scale, score_bound, **sizes) -> None:
    """The attention kernel: what csrc/params.h says of it."""
    assert kernel == "joint_attention"
    places = [sizes[name] for name in ("image_offsets", "text_offsets")]
    assert (sizes["RI"], sizes["RT"]) == tuple(p[-1].item() for p in places)
    assert (sizes["B"], sizes["N"], sizes["H"]) == (len(places[0]) - 1, *q.shape[1:])
    lengths = [p.diff().tolist() for p in places]
    image, text = ops.reference.joint_attention(q, k, v, *lengths, *places, text_out is not None, scale)
    image_out.copy_(image)
    if text_out is not None:
        text_out.copy_(text)
    if lse is not None:
        start = 0
        for rows in map(sum, zip(*lengths)):
            own = slice(start, start + rows)
            lse[:, own] = (torch.einsum("qnh,knh->nqk", q[own], k[own]) * scale).logsumexp(-1)
            start += rows


def torch_flash_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None
):
    assert (dropout_p, is_causal, return_debug_mask) == (0.0, False, False)
    checked(cum_seq_q, cum_seq_k, max_q, max_k)
    lse = true_logarithms(query, key, cum_seq_q, cum_seq_k, scale)
    return true_attention(query, key, value, cum_seq_q, cum_seq_k, scale), lse, None, None, None


def torch_flash_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
    unused, *, scale=None,
):  # fmt: skip
    assert (dropout_p, is_causal, rng_state.dtype) == (0.0, False, torch.uint64)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled(), "a warning leaves the atomics in"
    assert not torch.utils.deterministic.fill_uninitialized_memory
    checked(cum_seq_q, cum_seq_k, max_q, max_k)
    return true_gradients(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, scale)


def packed(batch: Tensor) -> Tensor:
    """[B, N, S, H] -> [B * S, N, H]"""
    return batch.transpose(1, 2).flatten(0, 1)


def unpacked(rows: Tensor, like: Tensor) -> Tensor:
    return rows.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)


def of_equal_lengths(query: Tensor, key: Tensor) -> list[Tensor]:
    return [offsets_of([x.shape[2]] * x.shape[0]) for x in (query, key)]


def torch_cudnn_forward(
    query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False, *,
    scale=None,
):  # fmt: skip
    assert (attn_bias, compute_log_sumexp, dropout_p, is_causal) == (None, True, 0.0, False)
    places, rows = of_equal_lengths(query, key), [packed(x) for x in (query, key, value)]
    lse = unpacked(true_logarithms(*rows[:2], *places, scale).T[..., None], query)
    return unpacked(true_attention(*rows, *places, scale), query), lse, *[None] * 7


def torch_cudnn_backward(
    grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q, cum_seq_k, max_q,
    max_k, dropout_p, is_causal, *, scale=None,
):  # fmt: skip
    assert (attn_bias, cum_seq_q, cum_seq_k, dropout_p, is_causal) == (None, None, None, 0.0, False)
    assert philox_seed.dtype == philox_offset.dtype == torch.int64
    assert logsumexp.shape == (*query.shape[:3], 1)
    assert logsumexp.is_contiguous()
    assert (max_q, max_k) == (query.shape[2], key.shape[2])
    places, rows = of_equal_lengths(query, key), [packed(x) for x in (grad_out, query, key, value, out)]
    made = true_gradients(*rows, packed(logsumexp).squeeze(-1).T.contiguous(), *places, scale)
    return [unpacked(x, like) for x, like in zip(made, (query, key, value), strict=True)]


TORCH = {
    (_attention_cuda, "torch_flash_forward"): torch_flash_forward,
    (_attention_cuda, "torch_cudnn_forward"): torch_cudnn_forward,
    (_attention_gradients, "torch_flash_backward"): torch_flash_backward,
    (_attention_gradients, "torch_cudnn_backward"): torch_cudnn_backward,
}


def runs_here(real: Candidate) -> Candidate:
    changes = {f: getattr(real, f) for f in inspect.signature(Candidate).parameters}
    changes |= dict(device="cpu", arch=((0, 0), (0, 0)), forward_modules=(), backward_modules=None, rests_on=())
    changes |= dict(dtypes=(torch.float32, torch.float64), function="")
    if real.kernel:
        changes |= dict(kernel="", head_dim=(1, 64))
    return Candidate(**changes)


def on_cpu(monkeypatch, name: str) -> None:
    """Candidate `name`, with its stand-in for a module, serves calls on the CPU and nothing else does."""
    monkeypatch.setattr(Candidate, "load", lambda self, backward: FAKES.get(self.name))
    monkeypatch.setattr(backend, "launch", launch)
    for (module, op), stand_in in TORCH.items():
        monkeypatch.setattr(module, op, stand_in)
    gradients = {op: stand_in for (module, op), stand_in in TORCH.items() if module is _attention_gradients}
    assert set(gradients) <= set(vars(_attention_gradients)), "the adapters call what is replaced"
    monkeypatch.setattr(attention_backends, "CANDIDATES", [runs_here(BY_NAME[name])])
    monkeypatch.setattr(attention_backends, "BACKWARDS", [runs_here(b) for b in BACKWARDS])
    choose.cache_clear()


@pytest.mark.parametrize("text_queries", [True, False])
@pytest.mark.parametrize("scale", [None, 0.2])
@pytest.mark.parametrize("name", BY_NAME)
def test_adapters_against_the_spec(monkeypatch, cudnn_op, name, scale, text_queries):
    on_cpu(monkeypatch, name)
    if name == "torch-cudnn":  # here torch has no cuDNN to be restricted to; the GPU tests run it unpatched
        asked = []
        monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", lambda kind: asked.append(kind) or torch.no_grad())
    monkeypatch.setattr(backend, "choose", lambda op, x: "cuda")
    q, k, v = inputs()
    arguments = (q, k, v, IMAGES, TEXTS, offsets_of(IMAGES), offsets_of(TEXTS), text_queries, scale)
    with torch.no_grad():
        got = ops.joint_attention(*arguments)
        expected = ops.reference.joint_attention(*arguments)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    if name == "torch-cudnn":
        assert asked == [torch.nn.attention.SDPBackend.CUDNN_ATTENTION]
    choose.cache_clear()


@pytest.mark.parametrize("name", [n for n, c in BY_NAME.items() if c.device_lengths])
def test_device_lengths(monkeypatch, cudnn_op, name):
    """With places the host's lengths are read for their totals alone: lengths of another batch do no harm."""
    on_cpu(monkeypatch, name)
    q, k, v = inputs()
    rows = ops.reference.joint_rows(offsets_of(IMAGES), offsets_of(TEXTS), sum(IMAGES), sum(TEXTS))
    joint = offsets_of([i + t for i, t in zip(IMAGES, TEXTS)])
    places = DevicePlaces(rows[: sum(IMAGES)], rows[sum(IMAGES) :], 18, 18, joint)
    other = [0, 0, sum(IMAGES), 0], [sum(TEXTS), 0, 0, 0]
    offsets = offsets_of(IMAGES), offsets_of(TEXTS)
    for text_queries in (True, False):
        with torch.no_grad():
            got = ops.joint_attention(q, k, v, *other, *offsets, text_queries, places=places)
            expected = ops.reference.joint_attention(q, k, v, IMAGES, TEXTS, *offsets, text_queries)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    choose.cache_clear()


PAIRS = [(c.name, "") for c in CANDIDATES if c.backward and c.call is not None and c.name != "torch-cudnn"]
PAIRS += [(c.name, b.name) for c in CANDIDATES for b in BACKWARDS if c.logarithms and b.name != Choice(c).gradients]


@pytest.mark.parametrize("text_queries", [True, False])
@pytest.mark.parametrize(("name", "gradients_of"), PAIRS)
def test_gradients_of_every_library_for_every_forward_pass(monkeypatch, name, gradients_of, text_queries):
    on_cpu(monkeypatch, name)
    monkeypatch.setattr(backend, "choose", lambda op, x: "cuda")
    tensors = inputs(torch.float64, grad=True)
    arguments = (*tensors, IMAGES, TEXTS, offsets_of(IMAGES), offsets_of(TEXTS), text_queries, 0.2)
    weight = torch.linspace(-1, 1, 14 * 16, dtype=torch.float64).view(14, 16)

    def gradients(op):
        image, text = op(*arguments)
        return torch.autograd.grad((image[:14] * weight).sum() + text.square().sum(), tensors)

    with use(name), attention_backends.use_backward(gradients_of or None):
        chosen = choose(attention_backends.need_of_call(*tensors, 10, False))
        assert names(chosen) == (name, gradients_of or chosen.gradients, bool(gradients_of))
        found = gradients(ops.joint_attention)
    for got, expected in zip(found, gradients(ops.reference.joint_attention), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    choose.cache_clear()


def test_no_gradient_of_a_gradient(monkeypatch):
    """Libraries have none; without a word they would be left out."""
    monkeypatch.setattr(backend, "choose", lambda op, x: "cuda")
    for name in ("flash-attn-4", "lens-hopper"):
        on_cpu(monkeypatch, name)
        q, k, v = inputs(torch.float64, grad=True)
        with use(name), attention_backends.use_backward("flash-attn-2"):
            out = torch.cat(ops.joint_attention(q, k, v, IMAGES, TEXTS, offsets_of(IMAGES), offsets_of(TEXTS)))
            (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
            with pytest.raises(RuntimeError, match="once_differentiable"):
                dq.sum().backward()
    choose.cache_clear()


def test_libraries_get_channels_side_by_side(monkeypatch):
    seen = []

    def attend(q, k, v, samples, module):
        seen.extend(x.stride(-1) for x in (q, k, v))
        return q * k + v

    real = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs(torch.float64)]
    assert {x.stride(-1) for x in real} == {2}
    monkeypatch.setattr(attention_backends, "choose", lambda need: Choice(Candidate("any", attend)))
    joint = offsets_of([i + t for i, t in zip(IMAGES, TEXTS)])
    out = attention_backends.run(*real, Samples(joint, joint, 10, 10, 0.3))
    assert seen == [1, 1, 1]
    torch.testing.assert_close(torch.autograd.grad(out.sum(), real), (real[1], real[0], torch.ones_like(out)))


@pytest.mark.parametrize("invariant", [True, False])
@pytest.mark.parametrize("replaced", [None, "FA3"])
def test_what_stands_in_for_torchs_flash_splits_no_keys_under_batch_invariance(monkeypatch, replaced, invariant):
    """torch's own never does; one that a process put in its place may, by the longest sample of the call."""
    given = []
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: replaced)
    module = types.SimpleNamespace(varlen_attn=lambda *_, **options: given.append(options) or torch.zeros(1))
    joint = offsets_of([i + t for i, t in zip(IMAGES, TEXTS)])
    _attention_cuda.torch_varlen(*inputs(), Samples(joint, joint, 10, 10, 8**-0.5, invariant=invariant), module)
    assert given == [{"num_splits": 1} if replaced and invariant else {}]


@pytest.mark.parametrize("gives", [True, False])
def test_releases_of_flash_attn_3_that_know_no_argument_for_logarithms(gives):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, num_splits,
        deterministic,
    ):  # fmt: skip
        made = true_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)
        return (made, true_logarithms(q, k, cu_seqlens_q, cu_seqlens_k, softmax_scale)) if gives else made

    module = types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func, __name__="flash_attn_interface")
    q, k, v = inputs()
    joint = offsets_of([i + t for i, t in zip(IMAGES, TEXTS)])
    samples = Samples(joint, joint, 10, 10, 0.3)
    plain = _attention_cuda.flash_attn_3(q, k, v, samples, module)
    torch.testing.assert_close(plain, true_attention(q, k, v, joint, joint, 0.3))
    if gives:
        out, lse = _attention_cuda.flash_attn_3(q, k, v, samples, module, logarithms=True)
        assert torch.equal(out, plain)
        torch.testing.assert_close(lse, true_logarithms(q, k, joint, joint, 0.3))
    else:
        with pytest.raises(RuntimeError, match="this release of flash_attn_interface gives no logarithms"):
            _attention_cuda.flash_attn_3(q, k, v, samples, module, logarithms=True)


@pytest.mark.parametrize("grad", [True, False])
def test_one_call_per_sample_records_no_gradient_of_cudnn(monkeypatch, grad):
    """Which torch prefers on Hopper and Blackwell, and whose gradients are other bits every time."""
    seen, real = [], torch.nn.functional.scaled_dot_product_attention

    def attend(*given, **more):
        cuda = torch.backends.cuda
        seen.append((cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.math_sdp_enabled()))
        return real(*given, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    lengths = [i + t for i, t in zip(IMAGES, TEXTS)]
    samples = Samples(offsets_of(lengths), offsets_of(lengths), 10, 10, 0.3, lengths, lengths)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    _attention_cuda.torch_sdpa(*inputs(grad=grad), samples, None)
    assert seen == [(before and not grad, True, True)] * len(lengths)
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_selective_recomputation_keeps_what_our_forward_pass_made(monkeypatch):
    """It knows attention by the name of its op, also within a function of two libraries."""
    on_cpu(monkeypatch, "lens-hopper")
    monkeypatch.setattr(backend, "choose", lambda op, x: "cuda")
    calls = []
    monkeypatch.setattr(backend, "launch", lambda *a, **k: calls.append(a[0]) or launch(*a, **k))
    tensors = inputs(grad=True)
    places = IMAGES, TEXTS, offsets_of(IMAGES), offsets_of(TEXTS)

    def block(q, k, v):
        return torch.cat(ops.joint_attention(q * 2, k, v, *places)).square().sum()

    with use("lens-hopper"):
        out = checkpoint(block, *tensors, use_reentrant=False, context_fn=_keep(64))
        got = torch.autograd.grad(out, tensors)
        assert calls == ["joint_attention"]
        for a, b in zip(got, torch.autograd.grad(block(*tensors), tensors), strict=True):
            torch.testing.assert_close(a, b)
    choose.cache_clear()


@pytest.mark.parametrize("stand_in", TORCH.values(), ids=[op for _, op in TORCH])
def test_the_stand_ins_take_what_torch_takes(stand_in):
    (module,) = (module for module, op in TORCH if op == stand_in.__name__)
    real = [a.name for a in getattr(module, stand_in.__name__).default._schema.arguments]
    taken = list(inspect.signature(stand_in).parameters)
    assert taken[:-1] == real[: len(taken) - 1]
    assert taken[-1] == "scale"
    assert "scale" in real


def test_equal_samples_share_a_call_of_cudnn_and_lengths_come_from_the_device_where_need_be(monkeypatch):
    lengths, calls = [4, 2, 4, 4], []
    monkeypatch.setattr(
        _attention_gradients,
        "torch_cudnn_backward",
        lambda *given, **more: calls.append(given[0].shape[0]) or torch_cudnn_backward(*given, **more),
    )
    q, k, v, dout = (torch.randn(14, 2, 8, dtype=torch.float64) for _ in range(4))
    offsets = offsets_of(lengths)
    lse, out = true_logarithms(q, k, offsets, offsets, 0.3), true_attention(q, k, v, offsets, offsets, 0.3)
    expected = true_gradients(dout, q, k, v, out, lse, offsets, offsets, 0.3)
    for known in (lengths, None):
        got = _attention_gradients.torch_cudnn(
            None, dout, q, k, v, out, lse, Samples(offsets, offsets, 4, 4, 0.3, known, known)
        )
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert calls == [3, 1, 3, 1]


# ------------------------------------------------------------------------------------------------ our kernel's bound


def test_no_score_exceeds_the_bound_and_one_comes_close():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.rand(64, generator=generator, dtype=torch.float64) * 2 - 0.5 for _ in range(4)]
    bound = score_bound(weights[:2], weights[2:])
    most = 0.0
    pair = torch.stack(weights).abs().view(2, 2, 32, 2).amax(1).amax(-1).prod(0).argmax()
    for q_weight in weights[:2]:
        for k_weight in weights[2:]:
            raw = torch.randn(2, 500, 64, generator=generator, dtype=torch.float64)
            # and rows that lie in the worst pair alone, in either direction, turned by any angle
            raw[:, 250:] = 0
            raw[:, 250:, 2 * pair : 2 * pair + 2] = torch.eye(2, dtype=torch.float64)[torch.arange(250) % 2]
            rows = torch.nn.functional.rms_norm(raw, (64,), eps=1e-6) * torch.stack([q_weight, k_weight])[:, None]
            angles = torch.rand(2, 500, 32, generator=generator, dtype=torch.float64) * 6.3
            turned = torch.view_as_complex(rows.view(2, 500, 32, 2)) * torch.polar(torch.ones_like(angles), angles)
            q, k = torch.view_as_real(turned).flatten(2).bfloat16().double()
            most = max(most, float((q @ k.T).abs().max()) / 8)
    assert 0.97 * bound < most <= bound
    assert score_bound(weights[:2], weights[2:], 0.25) == pytest.approx(2 * bound)


def test_the_bound_is_remembered_until_a_weight_changes(monkeypatch):
    norms = HeadNorms(*(torch.ones(64) for _ in range(4)))
    assert known_bound(norms, 0.125) == pytest.approx(8.08)
    monkeypatch.setattr(_attention_hopper.known_bound.__globals__["torch"], "stack", None)  # nothing is computed again
    assert known_bound(norms, 0.125) == pytest.approx(8.08)
    monkeypatch.undo()
    norms.text_k[3] = 2.0
    assert known_bound(norms, 0.125) == pytest.approx(16.16)
    assert known_bound(norms, 0.25) == pytest.approx(32.32)
    assert known_bound(norms._replace(image_k=3 * torch.ones(64)), 0.125) == pytest.approx(24.24)
    with torch.inference_mode():
        assert known_bound(HeadNorms(*(torch.ones(64) for _ in range(4))), 0.125) is None


def test_the_bound_reaches_the_kernel(monkeypatch):
    """In inference by the norms; with a gradient, or without norms, no bound is known."""
    on_cpu(monkeypatch, "lens-hopper")
    monkeypatch.setattr(backend, "choose", lambda op, x: "cuda")
    bounds = []
    monkeypatch.setattr(backend, "launch", lambda *a, score_bound, **k: bounds.append(score_bound))
    norms = HeadNorms(*(torch.full((8,), 1.5) for _ in range(4)))
    arguments = (*inputs(), IMAGES, TEXTS, offsets_of(IMAGES), offsets_of(TEXTS))
    with torch.no_grad():
        ops.joint_attention(*arguments, norms=norms)
        ops.joint_attention(*arguments)
    with use("lens-hopper"):
        ops.joint_attention(*inputs(grad=True), *arguments[3:], norms=norms)
    assert bounds == [pytest.approx(1.01 * 8**0.5 * 2.25), float("inf"), float("inf")]
    choose.cache_clear()


@pytest.mark.parametrize("text_queries", [True, False])
def test_contracts_of_our_op(monkeypatch, text_queries):
    monkeypatch.setattr(backend, "launch", launch)
    q, k, v = inputs()
    places = offsets_of(IMAGES), offsets_of(TEXTS)
    arguments = (q, k, v, *places, sum(IMAGES), text_queries, 0.3, float("inf"), 0, True)
    torch.library.opcheck(torch.ops.lens.joint_attention_hopper.default, arguments)
    with pytest.raises(ValueError, match=r"scale must be positive for lens-hopper, got -0.1"):
        _attention_hopper.forward(q, k, v, *places, sum(IMAGES), text_queries, -0.1, float("inf"), 0, True)


def test_torch_kernels_are_told_to_be_repeatable():
    """Their backward passes add with atomics unless the global switch is on, for more than a warning: it is on there, and
    nowhere else."""
    seen = []

    class WatchedAttention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, dout):
            seen.append(torch.are_deterministic_algorithms_enabled())
            seen.append(torch.is_deterministic_algorithms_warn_only_enabled())
            return dout * 2

    class Product(WatchedAttention):
        pass

    x, fill = torch.ones(3, requires_grad=True), torch.utils.deterministic.fill_uninitialized_memory
    repeatable(WatchedAttention.apply(x)).sum().backward()
    WatchedAttention.apply(x).sum().backward()
    repeatable(Product.apply(x)).sum().backward()
    assert seen == [True, False, False, False, False, False], "a product wants a setting of cuBLAS there"
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == fill
    for name in (
        "ScaledDotProductFlashAttentionForCpuBackward0",
        "GeneratedBackwardFor_torch_attn__varlen_attn_default",
    ):
        assert any(word in name for word in ("Attention", "attn"))


def test_a_broken_package_is_named_and_the_next_one_serves(monkeypatch, machine):
    machine("flash_attn_interface", "flash_attn")
    real = BY_NAME["flash-attn-2"]
    monkeypatch.setattr(
        attention_backends,
        "CANDIDATES",
        [
            Candidate(
                **{**vars(BY_NAME["flash-attn-3"]), "device": "cpu", "arch": ((0, 0), (9, 9)), "dtypes": real.dtypes}
            ),
            Candidate(**{**vars(real), "device": "cpu", "arch": ((0, 0), (9, 9))}),
        ],
    )

    def load(module):
        if module == "flash_attn_interface":
            raise ImportError("undefined symbol: at::f")
        return Fake2

    monkeypatch.setattr(attention_candidates.importlib, "import_module", load)
    monkeypatch.setattr(Choice, "rank", lambda *_: (0, 1.0))  # the first of the list
    q, k, v = inputs(torch.bfloat16)
    joint = offsets_of([i + t for i, t in zip(IMAGES, TEXTS)])
    samples = Samples(joint, joint, 10, 10, 0.3)
    with pytest.warns(UserWarning, match="flash_attn_interface cannot be imported: undefined symbol"):
        got = attention_backends.run(q, k, v, samples)
    torch.testing.assert_close(got, true_attention(q, k, v, joint, joint, 0.3))
    with use("flash-attn-3"), pytest.raises(RuntimeError, match="cannot run: flash_attn_interface cannot be imported"):
        attention_backends.run(q, k, v, samples)
    attention_candidates.failed.clear()
    with use("flash-attn-3"), warnings.catch_warnings():
        warnings.simplefilter("error")  # no next one is tried
        with pytest.raises(RuntimeError, match="was asked for but cannot run"):
            attention_backends.run(q, k, v, samples)
    # who computes the gradients is another matter
    attention_candidates.failed.clear()
    choose.cache_clear()
    with attention_backends.use_backward("flash-attn-2"), pytest.warns(UserWarning, match="trying the next backend"):
        attention_backends.run(q, k, v, samples)
