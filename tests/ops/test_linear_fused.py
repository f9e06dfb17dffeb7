"""GEMMs with a row op behind them: what they compute, which kernel does, and what is said when the wanted one cannot."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from lens.doctor import ops as doctor
from lens.ops import backend, reference
from lens.ops.linear import choice as linear_choice
from lens.ops.linear import fused as linear_fused
from lens.ops.linear.choice import GemmCall
from tests.ops.harness import DTYPES, Maker, cast, error, offsets_of, same_bits

HEADS, HEAD, HIDDEN = 2, 64, 128
WIDTH = HEADS * HEAD
IMAGES = {"two samples": ([40, 33], [7, 30]), "no text": ([9, 4], [0, 0]), "one has text": ([5, 70, 0], [0, 65, 2])}


def inputs(images: list[int], texts: list[int]) -> dict:
    """Arguments of the specification, float64, image first; spread so that silu and the norms are not near zero."""
    make = Maker()
    rows = [sum(images), sum(texts)]
    angle = make(sum(rows), HEAD // 2, grad=False)

    def matrix(columns: int, depth: int) -> Tensor:
        return (make(columns, depth, grad=False) * 2 / depth**0.5).requires_grad_()

    def pair(*shape: int) -> list[Tensor]:
        return [make(*shape), make(*shape)]

    tables = [make.modulation(len(images), WIDTH, 3) for _ in rows]
    return {
        "x": [make(r, WIDTH) for r in rows],
        "normed": [make(r, WIDTH) for r in rows],
        "hidden": [make(r, HIDDEN) for r in rows],
        "qkv": [matrix(3 * WIDTH, WIDTH) for _ in rows],
        "qkv_bias": pair(3 * WIDTH),
        "w13": [matrix(2 * HIDDEN, WIDTH) for _ in rows],
        "out": [matrix(WIDTH, HIDDEN) for _ in rows],
        "out_bias": pair(WIDTH),
        "q_weight": pair(HEAD),
        "k_weight": pair(HEAD),
        "norm": pair(WIDTH),
        "cos": angle.cos(),
        "sin": angle.sin(),
        "gate": [t[0] for t in tables],
        "scale": [t[1] for t in tables],
        "shift": [t[2] for t in tables],
        "offsets": [offsets_of(images), offsets_of(texts)],
    }


def typed(made: dict, dtype: torch.dtype) -> dict:
    return {
        name: [cast({name: v}, dtype)[name] for v in value] if isinstance(value, list) else cast({name: value}, dtype)[name]
        for name, value in made.items()
    }  # fmt: skip


def layer(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach())
    return made


def layers(weights: list[Tensor], biases: list[Tensor] | None = None) -> list[nn.Linear]:
    return [layer(w, b) for w, b in zip(weights, biases or [None] * len(weights), strict=True)]


def by_spec(m: dict) -> dict[str, list[Tensor]]:
    heads = m["q_weight"], m["k_weight"], m["cos"], m["sin"], *m["offsets"]
    residual = reference.linear_gated_residual(m["x"], m["hidden"], m["out"], m["out_bias"], m["gate"], m["offsets"])
    unbiased = reference.linear_gated_residual(m["x"], m["hidden"], m["out"], [None, None], m["gate"], m["offsets"])
    rows = zip(residual, m["norm"], m["scale"], m["shift"], m["offsets"])
    return {
        "qkv": [reference.linear_qkv_norm_rope(m["normed"], m["qkv"], m["qkv_bias"], *heads)],
        "swiglu": reference.linear_swiglu(m["normed"], m["w13"]),
        "residual": residual,
        "unbiased": unbiased,
        "norm": [reference.rms_norm_modulate(*row) for row in rows],
    }


def by_op(m: dict, lengths: tuple = (None, None)) -> dict[str, list[Tensor]]:
    heads = m["q_weight"], m["k_weight"], m["cos"], m["sin"], *m["offsets"]
    out = layers(m["out"], m["out_bias"])
    modulation = m["norm"], m["scale"], m["shift"], m["offsets"]
    residual, normed = linear_fused.linear_gated_residual_norm_modulate(
        m["x"], m["hidden"], out, m["gate"], *modulation, lengths=lengths
    )
    plain = linear_fused.linear_gated_residual(m["x"], m["hidden"], out, m["gate"], m["offsets"], lengths)
    assert all(map(same_bits, plain, residual))
    unbiased = layers(m["out"])
    return {
        "qkv": [
            linear_fused.linear_qkv_norm_rope(m["normed"], layers(m["qkv"], m["qkv_bias"]), *heads, lengths=lengths)
        ],
        "swiglu": linear_fused.linear_swiglu(m["normed"], layers(m["w13"]), lengths),
        "residual": residual,
        "unbiased": linear_fused.linear_gated_residual(m["x"], m["hidden"], unbiased, m["gate"], m["offsets"], lengths),
        "norm": normed,
    }


def composed(m: dict) -> dict[str, list[Tensor]]:
    """The spec with the roundings of the library way: a GEMM's result is stored before the row op reads it."""
    dtype = m["x"][0].dtype
    exact = reference.linear
    reference.linear = lambda *args: exact(*args).to(dtype)
    try:
        return by_spec(m)
    finally:
        reference.linear = exact


def against_spec(case: str, dtype: torch.dtype, call=by_op, spec=by_spec) -> None:
    """Error against float64 at most twice the spec's own in ``dtype``, plus one rounding."""
    made = inputs(*IMAGES[case])
    small = typed(made, dtype)
    with torch.no_grad():
        exact, expected, got = by_spec(typed(small, torch.float64)), spec(small), call(small)
    for name, values in got.items():
        assert len(values) == len(exact[name])
        for value, right, own in zip(values, exact[name], expected[name], strict=True):
            assert (value.dtype, value.shape) == (dtype, right.shape), name
            rounding = torch.finfo(dtype).eps * (right.abs().max().item() if right.numel() else 0.0)
            allowed = 2 * error(own, right) + rounding * (32 if dtype == torch.float64 else 1)
            assert error(value, right) <= allowed, f"{name}: {error(value, right)} > {allowed}"


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("case", IMAGES)
def test_the_library_way_against_the_spec(case, dtype):
    against_spec(case, dtype, spec=composed)


@pytest.mark.parametrize("choice", ["compiled", "reference"])
def test_row_ops_of_either_backend(choice):
    with backend.use(choice):
        against_spec("two samples", torch.float32)


def test_gradients():
    """Of the GEMMs' weights, biases and rows, by the library way: numerical differentiation in float64."""
    made = inputs([3], [2])
    m = {k: [t.detach()[..., :8] if k in ("x", "normed", "hidden") else t for t in v] for k, v in made.items()}
    functional = torch.nn.functional

    def call(a, b, up, weight, bias):
        (hidden,) = linear_fused.linear_swiglu([a], [lambda rows: functional.linear(rows, up)])
        out = [lambda rows: functional.linear(rows, weight, bias)]
        gate = [m["gate"][0][:, :8].detach()]
        return linear_fused.linear_gated_residual([b], [hidden], out, gate, m["offsets"])[0]

    make = Maker()
    values = [m["normed"][0].requires_grad_(), m["x"][0].requires_grad_(), make(6, 8), make(8, 3), make(8)]
    assert torch.autograd.gradcheck(call, values)


def test_sample_by_sample():
    """With lengths, a sample's rows have the bits they have alone."""
    images, texts = IMAGES["two samples"]
    made = typed(inputs(images, texts), torch.bfloat16)
    with torch.no_grad():
        whole = by_op(made, (images, texts))
        first = {**made, "offsets": [o[:2] for o in made["offsets"]]}
        for name in ("x", "normed", "hidden"):
            first[name] = [v[:n].detach() for v, n in zip(made[name], (images[0], texts[0]))]
        for name in ("gate", "scale", "shift"):
            first[name] = [v[:1].detach() for v in made[name]]
        joint = images[0] + texts[0]
        first |= {name: made[name][:joint] for name in ("cos", "sin")}
        alone = by_op(first, ([images[0]], [texts[0]]))
    assert same_bits(alone["qkv"][0], whole["qkv"][0][:, :joint])
    for name in ("swiglu", "residual", "norm"):
        for value, all_rows in zip(alone[name], whole[name], strict=True):
            assert same_bits(value, all_rows[: len(value)]), name


# ---- which kernel


NEED = GemmCall("w13", "cuda", (9, 0), torch.bfloat16, 8192, 1536, 8192)


@pytest.fixture
def able(monkeypatch):
    """A build with every kernel, on a machine that has the GPU for them."""
    monkeypatch.setattr(backend, "unavailable", lambda device: "")
    monkeypatch.setattr(backend, "without", lambda kernel: "")
    linear_choice.choose.cache_clear()
    yield monkeypatch
    linear_choice.choose.cache_clear()


FUSED_FIRST, LIBRARY_FIRST = ("fused", "library"), ("library", "fused")


def ordered(monkeypatch, names: tuple[str, ...]) -> None:
    monkeypatch.setitem(linear_choice.ORDERS, ("9.0", "w13"), names)
    linear_choice.choose.cache_clear()


@pytest.mark.parametrize(
    ("names", "rows", "expected", "why"),
    [
        (FUSED_FIRST, 8192, "fused", "the first in the order for w13 with 8192 rows on 9.0"),
        (LIBRARY_FIRST, 8192, "library", "the first in the order for w13 with 8192 rows on 9.0"),
        (("library",), 8192, "library", "fused is not in the order for w13 with 8192 rows on 9.0 without a committed"),
        (FUSED_FIRST, 4095, "library", "fused is not in the order for w13 with 4095 rows"),
    ],
)
def test_the_first_of_the_order_that_can_serve_is_chosen(able, names, rows, expected, why):
    ordered(able, names)
    chosen, said = linear_choice.decide(at(rows))
    assert chosen == expected
    assert said.startswith(why)


def at(rows: int = 8192, **changes) -> GemmCall:
    return dataclasses.replace(NEED, rows=rows, **changes)


REFUSALS = [
    (dict(device="cpu"), "runs on cuda, not on cpu"),
    (dict(arch=(8, 0)), "needs compute capability 9.0, this is 8.0"),
    (dict(arch=(10, 0)), "needs compute capability 9.0, this is 10.0"),
    (dict(dtype=torch.float32), "computes in bfloat16, not in float32"),
    (dict(backward=True), "has no backward pass"),
    (dict(plain=False), "no plain torch.nn.Linear"),
    (dict(depth=96), "needs input columns in multiples of 64, got 96"),
    (dict(gemm="qkv", head_dim=128), "needs heads of 64 channels, these have 128"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSALS, ids=lambda v: ",".join(v) if isinstance(v, dict) else "")
def test_what_ours_cannot_serve(able, changes, message):
    ordered(able, FUSED_FIRST)
    assert linear_choice.decide(at())[0] == "fused"
    chosen, why = linear_choice.decide(at(**changes))
    assert chosen == "library"
    assert message in why
    with linear_choice.use("fused"), pytest.raises(RuntimeError, match="fused was asked for but cannot run") as told:
        linear_choice.choose(at(**changes))
    assert message in str(told.value)
    assert str(told.value).startswith(f"lens.{linear_choice.GEMMS[at(**changes).gemm]}: ")


def test_forced(able, monkeypatch):
    ordered(able, FUSED_FIRST)
    with linear_choice.use("library"):
        assert linear_choice.choose(at()) == "library"
    ordered(able, LIBRARY_FIRST)
    with linear_choice.use("fused"):
        assert linear_choice.choose(at(batch_invariant=True)) == "fused"
        made = typed(inputs([3], [2]), torch.float32)
        with pytest.raises(RuntimeError, match=r"lens.linear_swiglu: fused was asked for but cannot run: runs on cuda"):
            linear_fused.linear_swiglu(made["normed"], layers(made["w13"]))
    assert linear_choice.override.name is None
    with pytest.raises(ValueError, match="must be library or fused, got 'quick'"), linear_choice.use("quick"):
        pass
    monkeypatch.setattr(linear_choice.override, "name", "quick")
    with pytest.raises(RuntimeError, match="LENS_LINEAR must be library or fused, got 'quick'"):
        linear_choice.choose(at(rows=1))


@pytest.mark.parametrize("names", [FUSED_FIRST, LIBRARY_FIRST, ("library",)])
def test_under_batch_invariance_ours_serves_wherever_it_can_whatever_rows_and_orders(able, names):
    ordered(able, names)
    for rows in (0, 1, 8192, 9000):
        chosen, why = linear_choice.decide(at(rows, batch_invariant=True))
        assert (chosen, why) == ("fused", "batch-invariant: a row's bits depend on that row alone")
    chosen, why = linear_choice.decide(at(batch_invariant=True, arch=(8, 0)))
    assert (chosen, why) == ("library", "fused needs compute capability 9.0, this is 8.0")
    with linear_choice.use("library"):
        assert linear_choice.choose(at(batch_invariant=True)) == "library"


def test_batch_invariance_wakes_the_choice(able):
    """Nothing forced, "fused" first nowhere: the library serves unseen, but not samples that must not depend on their batch."""
    ordered(able, LIBRARY_FIRST)
    assert linear_choice.idle()
    assert not linear_choice.idle(batch_invariant=True)
    with backend.use("reference"):
        assert linear_choice.idle(batch_invariant=True)
    ordered(able, FUSED_FIRST)
    assert not linear_choice.idle()


def test_a_need_that_must_not_depend_on_its_batch_has_no_rows(monkeypatch):
    """The GEMMs of both streams and of one ask for the same, however many rows and samples there are."""
    asked = []
    monkeypatch.setattr(linear_choice, "idle", lambda batch_invariant=False: False)
    monkeypatch.setattr(linear_choice, "choose", lambda call: asked.append(call) or "library")
    for lengths in ([2], [2, 3]):
        x = torch.randn(sum(lengths), 8)
        linear_fused.linear_swiglu([x, x[:2]], [torch.nn.Linear(8, 4, bias=False)] * 2, (lengths, [2]))
        linear_fused.linear_swiglu([x], [torch.nn.Linear(8, 4, bias=False)], (lengths,))
        linear_fused.linear_swiglu([x], [torch.nn.Linear(8, 4, bias=False)])
    assert len(set(asked)) == 3
    assert {call.rows for call in asked if call.batch_invariant} == {0}
    assert {call.rows for call in asked if not call.batch_invariant} == {2, 5}


def test_lengths_that_only_the_device_knows_are_refused_by_the_library():
    x, lengths = torch.randn(3, 8), linear_fused.ON_DEVICE
    with pytest.raises(
        RuntimeError, match=r"lens.linear: the library's GEMM runs sample by sample, by lengths that the host"
    ):
        linear_fused.linear(torch.nn.Linear(8, 8), x, lengths)
    with pytest.raises(RuntimeError, match=r"lens.linear: the library's GEMM runs sample by sample"):
        linear_fused.linear_swiglu([x, x], [torch.nn.Linear(8, 4, bias=False)] * 2, ([3], lengths))


def test_a_build_without_the_kernels_says_so(monkeypatch):
    monkeypatch.setattr(backend, "unavailable", lambda device: "")
    monkeypatch.setattr(backend, "_extension", object())
    assert linear_choice.why_unsupported(at()) == "lens._C was built without linear_swiglu"


def test_the_orders_hold_every_gemm_and_what_can_serve_wherever_ours_cannot():
    assert {gemm for _, gemm in linear_choice.ORDERS} == set(linear_choice.GEMMS)
    assert all("library" in names for names in linear_choice.ORDERS.values())


def test_the_report_names_every_gemm(able):
    able.setattr(linear_choice, "capability", lambda index: (9, 0))
    rows = doctor.gemms()
    assert [name for name, _, _ in rows] == list(linear_choice.GEMMS)
    assert all(by == "library" and "without a committed result" in why for _, by, why in rows)
    with linear_choice.use("fused"):
        assert {by for _, by, _ in doctor.gemms()} == {"fused"}
        able.setattr(linear_choice, "capability", lambda index: (8, 0))
        assert all(by == "none" and "needs compute capability" in why for _, by, why in doctor.gemms())
