"""The choice among attention libraries, for the forward pass and for gradients."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import warnings

import pytest
import torch

from lens import ops
from lens.ops import backend
from lens.ops.attention import choice as attention_choice
from lens.ops.attention.choice import (
    BACKWARDS,
    ORDERS,
    AttentionCall,
    Candidate,
    Choice,
    attention_call,
    choose,
    report,
    use,
)
from lens.ops.attention.layout import DeviceLayout, Samples
from tests.ops.attention_stand_ins import BY_NAME, IMAGES, TEXTS, Fake2, inputs, offsets_of, true_attention

ALL_MODULES = {
    "flash_attn_interface",
    "fa3_fwd_interface",
    "flash_attn",
    "flash_attn.flash_attn_interface",
    "flash_attn.cute",
    "flash_attn.cute.interface",
    "torch.nn.attention.varlen",
}


def call(**changes: object) -> AttentionCall:
    released = dict(
        device="cuda",
        arch=(9, 0),
        dtype=torch.bfloat16,
        head_dim=64,
        backward=False,
        device_lengths=False,
        longest=4511,
    )
    return AttentionCall(**{**released, **changes})


@pytest.fixture
def machine(monkeypatch):
    """Says which modules are installed; what is there may then be chosen."""

    def have(*modules: str) -> None:
        monkeypatch.setattr(attention_choice, "installed", lambda name: name in modules)
        choose.cache_clear()

    monkeypatch.setattr(attention_choice, "failed", {})
    monkeypatch.setattr(backend, "unavailable", lambda device: "")
    monkeypatch.setattr(backend, "without", lambda kernel: "")
    have(*ALL_MODULES, "cutlass")
    yield have
    choose.cache_clear()


# ------------------------------------------------------------------------------------------------ the choice


def test_the_first_of_the_order_that_is_installed_serves(machine):
    assert choose(call()).name == "flash-attn-3"
    machine("torch.nn.attention.varlen", "flash_attn")
    assert choose(call()).name == "torch-cudnn"  # before flash-attn-2 for long samples
    assert choose(call(longest=600)).name == "flash-attn-2"  # and behind it for short ones, a launch for each
    assert choose(call(device_lengths=True)).name == "flash-attn-2"  # a captured step has no lengths to loop over
    machine("torch.nn.attention.varlen")
    assert choose(call(device_lengths=True)).name == "torch-varlen"
    machine()
    assert choose(call(arch=(7, 5))).name == "torch-sdpa"


def test_an_adapter_and_its_name_in_an_order_add_a_library(machine, monkeypatch):
    """Chosen where it can serve, explained by the doctor where it cannot, forced where it is in no order."""
    added = Candidate("fast", lambda q, k, v, samples, module: q, forward_modules=("fast",), head_dim=(8, 64))
    monkeypatch.setattr(attention_choice, "CANDIDATES", [*attention_choice.CANDIDATES, added])
    monkeypatch.setitem(ORDERS, ("9.0", "long"), ("fast", *ORDERS["9.0", "long"]))
    machine("fast", "flash_attn")
    assert choose(call()) == Choice(added)
    assert report(call())[0] == ("fast", True, "the first in the order for long calls on 9.0 that can serve")
    rows = {name: why for name, _, why in report(call())}
    assert rows["flash-attn-2"] == "after fast in the order for long calls on 9.0"
    for changes, expected, why in (
        (dict(head_dim=128), "torch-cudnn", "needs heads of a multiple of 8 up to 64 channels, these have 128"),
        (dict(longest=9), "flash-attn-2", "not in the order for short calls on 9.0 without a committed result; "
         "LENS_ATTENTION=fast forces it"),
    ):  # fmt: skip
        assert choose(call(**changes)).name == expected
        assert {name: said for name, _, said in report(call(**changes))}["fast"] == why
    with use("fast"):
        assert choose(call(longest=9)).name == "fast"
    machine()
    assert {name: why for name, _, why in report(call())}["fast"] == "fast is not installed"
    with use("fast"), pytest.raises(RuntimeError, match="fast was asked for but cannot run: fast is not installed"):
        choose(call())


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
    rows = {row[0]: row for row in report(call(**changes))}
    assert not rows[name][1]
    assert why in rows[name][2]
    with use(name), pytest.raises(RuntimeError, match=f"{name} was asked for but cannot run: "):
        choose(call(**changes))


def test_batch_invariance_refuses_what_looks_at_other_samples(machine, monkeypatch):
    """And chooses the same for captured and plain steps, whatever the longest sample of the call is."""
    monkeypatch.setitem(ORDERS, ("9.0", "long"), ("torch-cudnn-varlen", *ORDERS["9.0", "long"]))
    for name, why in (
        ("torch-cudnn-varlen", "is not batch-invariant: cuDNN plans all samples of a call as one problem"),
        ("flash-attn-4", "is not batch-invariant: on Blackwell its tiles follow the longest sample of the call"),
    ):
        assert not next(c for c in attention_choice.CANDIDATES if c.name == name).why_unsupported(call())
        rows = {row[0]: row for row in report(call(batch_invariant=True))}
        assert rows[name] == (name, False, why)
        with use(name), pytest.raises(RuntimeError, match=f"{name} was asked for but cannot run: {why}"):
            choose(call(batch_invariant=True))
    libraries = {"flash_attn": "flash-attn-2", "": "torch-varlen", "flash_attn_interface": "flash-attn-3"}
    for installed, expected in libraries.items():
        machine("torch.nn.attention.varlen", installed)
        for device_lengths in (True, False):
            for longest in (1, 600, 4511):
                asked = attention_call(
                    torch.device("meta"), torch.bfloat16, 64, longest, device_lengths, batch_invariant=True
                )
                asked = dataclasses.replace(asked, device="cuda", arch=(9, 0))
                assert choose(asked).name == expected, (installed, device_lengths, longest)
    assert "after flash-attn-3 in" in {r[0]: r for r in report(call(batch_invariant=True))}["torch-cudnn"][2]
    assert choose(call(batch_invariant=True, dtype=torch.float32)).name == "torch-sdpa", "one call per sample"
    with pytest.raises(RuntimeError, match="no attention backend can serve"):
        choose(call(batch_invariant=True, dtype=torch.float32, device_lengths=True))


@pytest.mark.parametrize("places", [False, True])
def test_batch_invariance_is_asked_of_the_choice(monkeypatch, places):
    asked = []
    monkeypatch.setattr(backend, "choose", lambda op, x: "cuda")
    candidate = Candidate("zero", lambda q, k, v, samples, module: torch.zeros_like(q))
    monkeypatch.setattr(attention_choice, "choose", lambda call: asked.append(call) or Choice(candidate))
    q, offsets = torch.randn(5, 1, 8), torch.tensor([0, 5], dtype=torch.int32)
    none = torch.zeros(2, dtype=torch.int32)
    where = DeviceLayout(None, None, 5, 5, offsets) if places else None
    with torch.no_grad():
        for invariant in (False, True):
            ops.joint_attention(q, q, q, [5], [0], offsets, none, layout=where, batch_invariant=invariant)
    assert [call.batch_invariant for call in asked] == [False, False, True, True]


def test_our_kernel_is_in_no_order_without_a_committed_result(machine, monkeypatch):
    """`python -m bench tables --check` holds what is in the orders to the results."""
    for changes in ({}, {"longest": 600}, {"device_lengths": True}, {"backward": True}):
        rows = {row[0]: row for row in report(call(**changes))}
        assert not rows["lens-hopper"][1]
        assert "without a committed result; LENS_ATTENTION=lens-hopper forces it" in rows["lens-hopper"][2]
        with use("lens-hopper"):
            assert choose(call(**changes)).name == "lens-hopper"
            assert report(call(**changes))[0] == ("lens-hopper", True, "forced")
    monkeypatch.setitem(ORDERS, ("9.0", "long"), ("lens-hopper", *ORDERS["9.0", "long"]))
    choose.cache_clear()
    assert choose(call()).name == "lens-hopper"
    assert choose(call(longest=600)).name == "flash-attn-3"


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
        choose(call(**changes))


def test_the_forward_only_package_serves_no_training(machine):
    machine("fa3_fwd_interface")
    assert choose(call()).name == "flash-attn-3"
    assert (
        BY_NAME["flash-attn-3"].why_unsupported(call(backward=True))
        == "flash_attn_interface is not installed (backward)"
    )
    assert choose(call(backward=True)).name == "torch-sdpa", "in no pair without a committed result"
    with use("flash-attn-3"):
        assert choose(call(backward=True)).gradients == "torch-flash", "its lse serves another's gradients"


def test_a_library_without_its_compiler_is_not_there(machine):
    machine("flash_attn", "flash_attn.cute")
    assert BY_NAME["flash-attn-4"].why_unsupported(call()) == "cutlass is not installed, which it is built on"
    assert choose(call(device_lengths=True)).name == "flash-attn-2"


def test_every_candidate_is_reported_once_with_a_reason_and_one_is_chosen(machine):
    for changes in ({}, {"backward": True}, {"device_lengths": True}, {"dtype": torch.float32}, {"arch": (8, 6)}):
        rows = report(call(**changes))
        assert sorted(name for name, _, _ in rows) == sorted(BY_NAME)
        assert [chosen for _, chosen, _ in rows].count(True) == 1
        assert rows[0][1], "the chosen one comes first"
        assert all(why for _, _, why in rows)
    rows = report(call(device="cpu"))
    assert not any(chosen for _, chosen, _ in rows)


def test_the_choice_in_a_few_words(machine, monkeypatch):
    monkeypatch.setattr(attention_choice, "capability", lambda index: (9, 0))
    machine("flash_attn", "torch.nn.attention.varlen")
    said = attention_choice.summary()
    assert said == "torch-cudnn (plain), flash-attn-2 (captured), flash-attn-2 (training), flash-attn-2 (gradients)"
    with use("torch-cudnn"):
        said = attention_choice.summary()
        assert said == "torch-cudnn (plain), none (captured), torch-cudnn (training), torch-cudnn (gradients)"
    with use("torch-cudnn-varlen"):
        said = attention_choice.summary()
        assert said == "torch-cudnn-varlen (plain), torch-cudnn-varlen (captured), none (training)"
    with use("flash-attn-3"), pytest.raises(RuntimeError, match="is not installed"):
        attention_choice.summary()


def test_forcing(machine):
    with use("torch-sdpa"):
        assert choose(call()).name == "torch-sdpa"
        first, *others = report(call())
        assert first == ("torch-sdpa", True, "forced")
        assert ("flash-attn-3", False, "torch-sdpa is forced") in others
    assert choose(call()).name == "flash-attn-3"
    with pytest.raises(ValueError, match=r"name must be one of lens-hopper, .*, got 'flash'"), use("flash"):
        pass


def test_environment():
    code = "from lens.ops.attention import choice as a; print(a.override.name); a.choose(a.AttentionCall('cuda',(9,0),None,64,0,0,9))"
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
    attention_choice.installed.cache_clear()
    try:
        found = {name for name in ALL_MODULES if attention_choice.installed(name)}
        # flash-attn-4 alone makes a folder flash_attn without code of its own: that is not flash-attn 2
        assert found == ALL_MODULES - {"flash_attn", "flash_attn.flash_attn_interface"}
        (tmp_path / "flash_attn" / "__init__.py").write_text("raise SystemExit('imported')")
        attention_choice.installed.cache_clear()
        sys.path_importer_cache.clear()
        assert attention_choice.installed("flash_attn")
        assert attention_choice.installed("flash_attn.cute")
    finally:
        attention_choice.installed.cache_clear()
    assert not {"flash_attn", "flash_attn_interface", "fa3_fwd_interface"} & set(sys.modules)


def test_the_orders_name_what_can_serve_there():
    backwards = {b.name: b for b in BACKWARDS}
    for (arch, use_), names_ in ORDERS.items():
        assert use_.partition(" ")[0] in ("long", "short")
        assert len(set(names_)) == len(names_)
        assert any(BY_NAME[n].dtypes != attention_choice.HALF for n in names_ if n in BY_NAME), (
            "float32 has to be served"
        )
        for name in names_:
            forward, _, gradients = name.partition(" + ")
            choice = Choice(BY_NAME[forward], backwards[gradients] if gradients else None)
            low, high = choice.forward.arch
            assert low <= tuple(map(int, arch.split("."))) <= high
            if use_.endswith("training"):
                assert backwards[choice.gradients].deterministic
    assert {use for arch, use in ORDERS if arch == "8.0"} == {"long", "short", "long training", "short training"}


# ------------------------------------------------------------------------------------------------ who computes gradients


def ordered(monkeypatch, *names: str, use: str = "long training", arch: str = "9.0") -> None:
    monkeypatch.setitem(ORDERS, (arch, use), names)
    choose.cache_clear()


def names(choice: Choice) -> tuple[str, str, bool]:
    return choice.name, choice.gradients, choice.backward is not None


def test_a_library_computes_its_own_gradients_unless_a_pair_comes_before_it(machine, monkeypatch):
    machine("flash_attn", "flash_attn.flash_attn_interface", "torch.nn.attention.varlen")
    assert names(choose(call(backward=True))) == ("flash-attn-2", "flash-attn-2", False)
    ordered(monkeypatch, "lens-hopper + flash-attn-3", "torch-varlen + flash-attn-2", "torch-varlen", "torch-sdpa")
    assert names(choose(call(backward=True))) == ("torch-varlen", "flash-attn-2", True), "no flash-attn-3 is here"
    assert names(choose(call(backward=True, longest=600))) == ("flash-attn-2", "flash-attn-2", False), "another order"
    for row in report(call(backward=True)), report(call(backward=True), backward=True):
        assert row[0][1:] == (True, "the first in the order for long training calls on 9.0 that can serve")
        assert [chosen for _, chosen, _ in row].count(True) == 1
    with use("torch-varlen"):
        assert names(choose(call(backward=True))) == ("torch-varlen", "torch-flash", False), "forced for both passes"


def test_an_architecture_without_an_order_goes_by_its_family_and_then_by_8_0(machine, monkeypatch):
    machine("flash_attn", "torch.nn.attention.varlen", "flash_attn.cute", "cutlass")
    assert choose(call(arch=(8, 6))).name == "flash-attn-2"
    assert choose(call(arch=(10, 3))).name == "flash-attn-4"
    assert choose(call(arch=(12, 0))).name == "flash-attn-2"
    ordered(monkeypatch, "torch-varlen", "torch-sdpa", use="long", arch="8.6")
    assert choose(call(arch=(8, 6))).name == "torch-varlen"


def test_nondeterministic_gradients_are_taken_only_where_they_are_forced(machine):
    machine("torch.nn.attention.varlen")
    asked = call(backward=True)
    assert names(choose(asked)) == ("torch-varlen", "torch-flash", False)
    why = {row[0]: row[2] for row in report(asked, backward=True)}["torch-cudnn"]
    assert "nondeterministic, which torch cannot switch off; LENS_ATTENTION_BACKWARD=torch-cudnn forces it" in why
    with attention_choice.use_backward("torch-cudnn"):
        assert names(choose(asked)) == ("torch-varlen", "torch-cudnn", True)
        assert report(asked, backward=True)[0] == ("torch-cudnn", True, "forced")
        with use("torch-cudnn"):
            assert names(choose(asked)) == ("torch-cudnn", "torch-cudnn", False)
    with use("torch-cudnn"):
        assert names(choose(asked)) == ("torch-cudnn", "torch-cudnn", False), "forced for both passes"
    with use("lens-hopper"):
        assert names(choose(asked)) == ("lens-hopper", "torch-flash", True), "forced for the forward pass alone"


def test_forced_gradients_that_cannot_run_raise(machine):
    machine("torch.nn.attention.varlen")
    asked = call(backward=True)
    for name, why in (("flash-attn-3", "flash_attn_interface is not installed"), ("flash-attn-2", "flash_attn")):
        with (
            attention_choice.use_backward(name),
            pytest.raises(RuntimeError, match=f"{name} was asked for but cannot run: .*{why}"),
        ):
            choose(asked)
    with (
        attention_choice.use_backward("torch-cudnn"),
        use("torch-sdpa"),
        pytest.raises(RuntimeError, match=r"torch-sdpa with the gradients of torch-cudnn .* gives no lse"),
    ):
        choose(asked)
    with attention_choice.use_backward("torch-cudnn"):
        assert choose(call()).backward is None, "inference does not ask for gradients"
    with pytest.raises(ValueError, match="must be one of flash-attn-3"), attention_choice.use_backward("torch-sdpa"):
        pass


def test_heads_too_wide_for_a_fixed_order_are_left_to_another_library(machine):
    """flash-attn 3 refuses a deterministic backward pass beyond 192 channels, by its own words."""
    machine("flash_attn_interface", "torch.nn.attention.varlen")
    assert names(choose(call(backward=True, head_dim=192))) == ("flash-attn-3", "flash-attn-3", False)
    assert choose(call(head_dim=256)).name == "flash-attn-3"
    assert names(choose(call(backward=True, head_dim=256))) == ("torch-varlen", "torch-flash", False)
    with use("flash-attn-3"):
        assert names(choose(call(backward=True, head_dim=256))) == ("flash-attn-3", "torch-flash", True)


def test_a_broken_package_is_named_and_the_next_one_serves(monkeypatch, machine):
    machine("flash_attn_interface", "flash_attn")
    real = BY_NAME["flash-attn-2"]
    monkeypatch.setattr(
        attention_choice,
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

    monkeypatch.setattr(attention_choice.importlib, "import_module", load)
    ordered(monkeypatch, "flash-attn-3", "flash-attn-2", use="long", arch="8.0")
    ordered(monkeypatch, "flash-attn-3", "flash-attn-2", use="short", arch="8.0")
    q, k, v = inputs(torch.bfloat16)
    joint = offsets_of([i + t for i, t in zip(IMAGES, TEXTS)])
    samples = Samples(joint, joint, 10, 10, 0.3)
    with pytest.warns(UserWarning, match="flash_attn_interface cannot be imported: undefined symbol"):
        got = attention_choice.run(q, k, v, samples)
    torch.testing.assert_close(got, true_attention(q, k, v, joint, joint, 0.3))
    with use("flash-attn-3"), pytest.raises(RuntimeError, match="cannot run: flash_attn_interface cannot be imported"):
        attention_choice.run(q, k, v, samples)
    attention_choice.failed.clear()
    with use("flash-attn-3"), warnings.catch_warnings():
        warnings.simplefilter("error")  # no next one is tried
        with pytest.raises(RuntimeError, match="was asked for but cannot run"):
            attention_choice.run(q, k, v, samples)
    # who computes the gradients is another matter
    attention_choice.failed.clear()
    choose.cache_clear()
    with attention_choice.use_backward("flash-attn-2"), pytest.warns(UserWarning, match="trying the next backend"):
        attention_choice.run(q, k, v, samples)
