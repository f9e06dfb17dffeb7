"""What every op is held to: the spec, float64, its own bits in other company, and torch's contracts.

A test file builds its inputs in float64 as a dict of arguments and hands them, with the op's name, to the functions
below. Tensors that require grad are the differentiable arguments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lens import ops
from lens.ops import backend, reference

ISAS = ["base", "avx2", "avx512"]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
Inputs = dict[str, Any]

# lengths of the packed samples: production, one row, empty samples, chunk edges of the column sums (32 rows)
LENGTHS = {
    "production": [576, 300],
    "one row": [1],
    "ragged": [1, 33, 0, 64, 31, 2],
    "long and empty": [0, 200, 0],
    "no rows": [0, 0],
    "no samples": [],
}


def every_isa_and_dtype(test: Any) -> Any:
    test = pytest.mark.parametrize("isa", ISAS)(test)
    return pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp64"])(test)


@contextlib.contextmanager
def compiled(isa: str | None = None) -> Iterator[None]:
    if isa is not None and isa not in backend.available_isas():
        pytest.skip(f"this CPU has no {isa}")
    with backend.use("compiled"), backend.use_isa(isa or backend.isa()):
        yield


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


class Maker:
    """Random float64 arguments from one seed."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, grad: bool = True) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.generator).requires_grad_(grad)

    def modulation(self, batch: int, width: int, count: int) -> list[Tensor]:
        """`count` slices [B, D] of one table with odd row stride and odd starts: no row is aligned."""
        table = torch.randn(batch, count * width + 3, dtype=torch.float64, generator=self.generator)
        return [table[:, 1 + i * width :][:, :width].requires_grad_() for i in range(count)]


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same arguments as leaves of another dtype; strides are kept. Tables named cos and sin, x and delta of the
    sampler stay in the arithmetic dtype when the op says so (they carry no gradient)."""
    out = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            wanted = dtype if value.requires_grad else reference.arithmetic_dtype(dtype)
            copy = torch.empty_strided(value.shape, value.stride(), dtype=wanted)
            out[name] = copy.copy_(value.detach()).requires_grad_(value.requires_grad)
        else:
            out[name] = value
    return out


def results(op: Any, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs, and gradients of a fixed weighting of the outputs."""
    outputs = op(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    wanted = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad}
    if not wanted:
        return found
    weights = Maker(99)
    douts = [weights(*out.shape, grad=False).to(torch.bfloat16).to(out.dtype) for out in outputs]
    gradients = torch.autograd.grad(outputs, list(wanted.values()), douts, allow_unused=True)
    for (name, x), gradient in zip(wanted.items(), gradients, strict=True):
        found[f"gradient of {name}"] = torch.zeros_like(x) if gradient is None else gradient
    return found


def error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact).abs().max().item() if exact.numel() else 0.0


def against_spec(name: str, inputs: Inputs, dtype: torch.dtype, isa: str) -> None:
    """Every output and gradient: error against float64 at most twice the spec's own in `dtype`, plus one rounding.

    The float64 kernels have no wider type to be held to: a few roundings away from the spec.
    """
    inputs = cast(inputs, dtype)
    with compiled(isa):
        got = results(getattr(ops, name), inputs)
    within_limits(name, inputs, dtype, got)


def within_limits(
    name: str, inputs: Inputs, dtype: torch.dtype, got: dict[str, Tensor], conditioned: bool = False
) -> None:
    """What `against_spec` asks of results, of inputs that are cast already.

    conditioned: the spec's roundings on this CPU are one draw of those a right kernel may have, by luck a small one. So
    twice the condition is allowed as well: what one rounding of every argument moves, which is large where sums cancel.
    """
    wide = cast(inputs, torch.float64)
    exact, spec = results(getattr(reference, name), wide), results(getattr(reference, name), inputs)
    moved = condition(name, wide, exact) if conditioned and dtype == torch.float32 else {}
    assert got.keys() == exact.keys()
    for part, value in got.items():
        assert value.dtype == spec[part].dtype, part
        assert value.shape == spec[part].shape, part
        scale = exact[part].abs().max().item() if value.numel() else 0.0
        rounding = torch.finfo(value.dtype).eps * scale
        allowed = 2 * (error(spec[part], exact[part]) + moved.get(part, 0.0))
        allowed += rounding * (32 if dtype == torch.float64 else 1)
        assert error(value, exact[part]) <= allowed, f"{part}: {error(value, exact[part])} > {allowed}"


def condition(name: str, wide: Inputs, exact: dict[str, Tensor]) -> dict[str, float]:
    """How far a rounding of every float64 argument to float32, up or down as drawn, moves each of the exact results."""
    found = dict.fromkeys(exact, 0.0)
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        shaken = {}
        for key, value in wide.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                sign = torch.randint(0, 2, value.shape, generator=generator) * 2 - 1
                shaken[key] = (value.detach() * (1 + torch.finfo(torch.float32).eps * sign)).requires_grad_(
                    value.requires_grad
                )
            else:
                shaken[key] = value
        for part, value in results(getattr(reference, name), shaken).items():
            found[part] = max(found[part], error(value, exact[part]))
    return found


def same_bits(got: Tensor, expected: Tensor) -> bool:
    """Equal shapes and bits; NaN equals NaN."""
    return got.shape == expected.shape and torch.equal(got.nan_to_num(7.25), expected.nan_to_num(7.25))


def whatever_the_threads(name: str, inputs: Inputs, dtype: torch.dtype) -> None:
    """Outputs and gradients are the same bits with one and with three threads, and from run to run."""
    inputs = cast(inputs, dtype)
    before = torch.get_num_threads()
    runs = []
    with compiled():
        try:
            for threads in (1, 3, 3):
                torch.set_num_threads(threads)
                runs.append(results(getattr(ops, name), inputs))
        finally:
            torch.set_num_threads(before)
    for run in runs[1:]:
        for part, value in run.items():
            assert same_bits(value, runs[0][part]), part


def shifted(inputs: Inputs) -> Inputs:
    """The same arguments one element further in memory."""
    out = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.is_contiguous():
            room = torch.empty(value.numel() + 1, dtype=value.dtype)
            value = room[1:].view(value.shape).copy_(value.detach()).requires_grad_(value.requires_grad)
        out[name] = value
    return out


def wherever_it_lies(name: str, inputs: Inputs, dtype: torch.dtype) -> None:
    """Misaligned inputs give the same bits."""
    inputs = cast(inputs, dtype)
    with compiled():
        expected = results(getattr(ops, name), inputs)
        got = results(getattr(ops, name), shifted(inputs))
    for part, value in got.items():
        assert same_bits(value, expected[part]), part


def contiguous_or_not(name: str, inputs: Inputs) -> None:
    """Arguments whose channels do not lie side by side give the same bits as dense ones."""
    inputs = cast(inputs, torch.float32)
    spread = {}
    for key, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            room = torch.zeros(*value.shape, 2, dtype=value.dtype)
            room[..., 0] = value.detach()
            value = room[..., 0].requires_grad_(value.requires_grad)
            assert value.numel() < 2 or not value.is_contiguous()
        spread[key] = value
    with compiled():
        expected, got = results(getattr(ops, name), inputs), results(getattr(ops, name), spread)
    for part, value in got.items():
        assert same_bits(value, expected[part]), part


def gradcheck(name: str, inputs: Inputs) -> None:
    """Numerical differentiation in float64."""
    names = [key for key, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad]

    def call(*values: Tensor) -> Any:
        return getattr(ops, name)(**{**inputs, **dict(zip(names, values, strict=True))})

    with compiled():
        assert torch.autograd.gradcheck(call, [inputs[key] for key in names])


def refuses(name: str, inputs: Inputs, changes: Inputs, message: str) -> None:
    """The op names itself, the argument, what it expected and what it got, on both backends."""
    for choice in ("compiled", "reference"):
        with backend.use(choice), pytest.raises(ValueError) as refusal:
            getattr(ops, name)(**{**cast(inputs, torch.float32), **changes})
        assert str(refusal.value).startswith(f"lens.{name}: ")
        assert message in str(refusal.value)
