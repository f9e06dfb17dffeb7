"""Which kernel runs, and what is said when the wanted one cannot."""

import inspect
import os
import subprocess
import sys
import types

import pytest
import torch

from lens import ops
from lens.doctor.ops import OPS, report
from lens.doctor.selftest import op_cases
from lens.ops import backend
from tests.ops import harness


def in_a_child(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=120)


WITHOUT_EXTENSION = "import sys; sys.modules['lens._C'] = None; import torch; from lens import ops; "
CALL = "from lens.doctor.ops import report; print(ops.swiglu(torch.ones(1, 2)).item() > 0.7, report('cpu')[0][1])"


def test_the_compiled_kernel_runs_by_default():
    rows = report("cpu")
    assert [op for op, _, _ in rows] == list(OPS)
    assert {chosen for _, chosen, _ in rows} == {"cpu"}
    assert all(reason for _, _, reason in rows)
    assert f"lens._C, {backend.isa()} kernels" in {reason for _, _, reason in rows}


NO_OP_OF_A_PICTURE = (
    "backend",
    "reference",
    "HeadNorms",
    "ImageScores",
    "image_scores",
    "linear_rows",
)  # types, the data engine's op, and a GEMM that stands in for the library's


def test_every_public_op_is_reported():
    named = {name for name in ops.__all__ if name not in NO_OP_OF_A_PICTURE}
    assert named == set(OPS)


def test_use_forces_and_restores(monkeypatch):
    calls = []
    monkeypatch.setattr(backend, "launch", lambda kernel, *_, **__: calls.append(kernel))
    h = torch.ones(3, 4)
    ops.swiglu(h)
    with backend.use("reference"):
        ops.swiglu(h)
        assert {chosen for _, chosen, _ in report("cpu")} == {"reference"}
        with backend.use("compiled"):
            ops.swiglu(h)
        ops.swiglu(h)
    with backend.use("cpu"):
        ops.swiglu(h)
    assert calls == ["swiglu"] * 3
    with pytest.raises(ZeroDivisionError), backend.use("reference"):
        raise ZeroDivisionError
    assert backend.choose("swiglu", h) == "cpu"


def test_use_refuses_unknown_names():
    expected = "must be one of auto, reference, compiled, cpu, cuda, got 'fast'"
    with pytest.raises(ValueError, match=expected), backend.use("fast"):
        pass


def test_a_forced_backend_that_cannot_run_raises():
    with backend.use("cuda"), pytest.raises(RuntimeError, match=r"lens.swiglu: backend 'cuda' was asked for"):
        ops.swiglu(torch.ones(1, 2))
    with backend.use("compiled"), pytest.raises(RuntimeError, match="no compiled kernels for device type meta"):
        ops.swiglu(torch.ones(1, 2, device="meta"))
    with backend.use("cuda"):
        assert all(chosen == "none" and "cannot run on cpu" in why for _, chosen, why in report("cpu"))


def test_isa():
    assert backend.available_isas()[0] == "base"
    assert backend.isa() == backend.available_isas()[-1]
    for name in backend.available_isas():
        with backend.use_isa(name):
            assert backend.isa() == name
    assert backend.isa() == backend.available_isas()[-1]
    expected = "instruction set must be base, avx2, avx512, avx512bf16 or amx, got sse9"
    with pytest.raises(ValueError, match=expected), backend.use_isa("sse9"):
        pass


@pytest.mark.skipif("avx512" in backend.available_isas(), reason="this CPU runs every instruction set")
def test_an_isa_the_cpu_lacks_raises():
    with pytest.raises(RuntimeError, match="this CPU cannot run the avx512 kernels"), backend.use_isa("avx512"):
        pass


def test_environment():
    run = in_a_child("from lens import ops; print(ops.backend.isa())", LENS_CPU_ISA="base")
    assert run.stdout.split() == ["base"], run.stderr
    run = in_a_child("from lens import ops", LENS_CPU_ISA="mmx")
    assert "got mmx" in run.stderr
    assert run.returncode
    run = in_a_child("import torch; from lens import ops; " + CALL, LENS_OPS_BACKEND="reference")
    assert run.stdout.split() == ["True", "reference"], run.stderr
    run = in_a_child("from lens import ops", LENS_OPS_BACKEND="quick")
    assert "LENS_OPS_BACKEND must be one of" in run.stderr
    assert run.returncode


def test_a_missing_extension_is_named_once():
    run = in_a_child(WITHOUT_EXTENSION + CALL + "; ops.swiglu(torch.ones(1, 2))")
    assert run.stdout.split() == ["True", "reference"], run.stderr
    assert run.stderr.count("the cpu ops run their PyTorch reference: lens._C cannot be imported") == 1


def test_a_missing_extension_that_is_asked_for_raises():
    run = in_a_child(WITHOUT_EXTENSION, LENS_OPS_BACKEND="compiled")
    assert run.returncode
    assert "LENS_OPS_BACKEND=compiled cannot run on cpu: lens._C cannot be imported" in run.stderr
    run = in_a_child(WITHOUT_EXTENSION + "\nwith ops.backend.use('compiled'): ops.swiglu(torch.ones(1, 2))")
    assert "lens.swiglu: backend 'compiled' was asked for but cannot run on cpu" in run.stderr


def test_the_table_itself_refuses():
    """What the ops never send: the extension still names op, argument, expected and got."""
    from lens import _C

    zeros = dict.fromkeys(("h", "y", "device", "stream"), 0)
    with pytest.raises(ValueError, match=r"lens.swiglu: R must be at least 0, got -1"):
        _C.swiglu(**{**zeros, "device": -1}, R=-1, F=4, dtype=0)
    with pytest.raises(ValueError, match=r"lens.swiglu: h must point to 8 elements, got a null pointer"):
        _C.swiglu(**{**zeros, "device": -1}, R=1, F=4, dtype=0)
    with pytest.raises(ValueError, match=r"lens.swiglu: dtype must be 0, 1 or 2, got 7"):
        _C.swiglu(**{**zeros, "device": -1}, R=0, F=4, dtype=7)
    if not _C.with_cuda:
        with pytest.raises(RuntimeError, match=r"lens.swiglu: this build has no CUDA kernels"):
            _C.swiglu(**zeros, R=0, F=4, dtype=0)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"R": 2**31, "F": 4}, r"lens.swiglu: R must be at most 2\^31 - 1, got 2147483648"),
        ({"R": 2**62, "F": 2**62}, "lens.swiglu: R must be at most"),
        ({"R": 2**31 - 1, "F": 2**31 - 1}, r"sizes must multiply to at most 2\^48 elements, got F = 2147483647"),
        ({"R": 2**25, "F": 2**24}, r"sizes must multiply to at most 2\^48 elements, got F = 16777216"),
    ],
)
def test_sizes_whose_products_overflow_are_refused(sizes, message):
    from lens import _C

    with pytest.raises(ValueError, match=message):
        _C.swiglu(h=64, y=64, device=-1, stream=0, dtype=0, **sizes)


def test_a_stride_that_leaves_memory_is_refused():
    from lens import _C

    row = torch.zeros(4)
    given = dict.fromkeys(("x", "y", "gate", "out", "offsets"), row.data_ptr())
    given |= {"R": 0, "B": 1, "D": 4, "device": -1, "stream": 0, "dtype": 0}
    for stride in (-4, 2**31):
        with pytest.raises(ValueError, match=rf"gate_stride must lie in \[0, 2\^31\), got {stride}"):
            _C.gated_residual(**given, gate_stride=stride)


@pytest.mark.parametrize("op", op_cases())
def test_what_is_no_dense_tensor_is_named(op):
    """None, a list or a sparse tensor in the place of any tensor: the op, the argument and what came."""
    made, names = op_cases()[op], list(inspect.signature(getattr(ops, op)).parameters)
    for k, value in enumerate(made):
        if not isinstance(value, torch.Tensor):
            continue
        dense = value.double() if value.is_floating_point() else value
        for wrong, got in ((None, "NoneType"), ([1.0], "list"), (dense.to_sparse(), "sparse_coo")):
            if wrong is None and names[k] == "uncond":
                continue  # without guidance
            with pytest.raises(ValueError, match=rf"lens\.{op}: {names[k]} must be a (dense )?tensor, got .*{got}"):
                getattr(ops, op)(*made[:k], wrong, *made[k + 1 :])


def test_no_torch_in_the_extension():
    root = harness.__file__.split("tests")[0]
    for folder, _, files in os.walk(os.path.join(root, "csrc")):
        for name in files:
            with open(os.path.join(folder, name), encoding="utf-8") as source:
                text = source.read()
            for header in ("<torch/", "<ATen/", "<c10/"):
                assert header not in text, f"{name} includes {header}"


@pytest.mark.parametrize(
    ("targets", "runs", "fails"),
    [
        ("80-real 90a-real 120-virtual", [(8, 0), (8, 9), (9, 0), (12, 0), (12, 1)], [(7, 5), (10, 0)]),
        ("90a-real", [(9, 0)], [(8, 0), (10, 0), (12, 0)]),
        ("80 90a", [(8, 0), (8, 6), (9, 0), (10, 3), (12, 0)], [(7, 5)]),
        ("86-real", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("", [], [(9, 0)]),
    ],
)
def test_what_a_builds_targets_run_on(targets, runs, fails):
    assert all(backend.covers(targets, capability) for capability in runs)
    assert not any(backend.covers(targets, capability) for capability in fails)


def test_a_device_beside_the_targets_gets_the_reference_and_a_reason(monkeypatch):
    """A faked device: the launch would fail with error 209, no kernel image."""
    monkeypatch.setattr(backend, "_extension", types.SimpleNamespace(cuda_targets="90a-real"))
    monkeypatch.setattr(backend, "_with_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (8, 6)][index])
    backend.no_target.cache_clear()
    there, other = (types.SimpleNamespace(device=torch.device("cuda", i), dtype=torch.float32) for i in range(2))
    try:
        assert backend.choose("swiglu", there) == "cuda"
        with pytest.warns(
            UserWarning, match=r"built for 90a-real, which compute capability 8.6 cannot run; rebuild it with"
        ):
            assert backend.choose("swiglu", other) == "reference"
        with backend.use("compiled"), pytest.raises(RuntimeError, match='LENS_CUDA_ARCHS="86"'):
            backend.choose("swiglu", other)
    finally:
        backend.no_target.cache_clear()
