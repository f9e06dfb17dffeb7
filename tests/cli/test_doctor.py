"""lens doctor: complete on a healthy installation, and every kind of damage is named with exit code 1."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lens import LensTransformer2DModel, ops
from lens.cli import __main__ as cli
from lens.doctor import ops as doctor_ops
from lens.doctor import report, selftest
from lens.doctor.findings import BROKEN, NOTE, OK
from lens.doctor.ops import OPS
from lens.engine import batch_invariance
from lens.ops import backend
from lens.ops.attention import choice as attention_choice
from lens.ops.linear import choice as linear_choice
from lens.vae import PixelCodec

DEV = Path(__file__).parents[1] / "golden" / "dev"
CPU = torch.device("cpu")


def by_name(findings):
    return {(f.section, f.name): f for f in findings}


def test_a_healthy_installation():
    result = CliRunner().invoke(cli.app, ["doctor", "--model", str(DEV), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "everything that is here works" in result.stdout
    for word in ("torch", "driver", "lens._C", "cpu kernels", "batch invariant", "diffusers", "same bits in a batch"):
        assert word in result.stdout
    for op in OPS:
        assert result.stdout.count(f"  {op} ") == 2  # its backend, and its self-test


def test_json_says_the_same():
    result = CliRunner().invoke(cli.app, ["doctor", "--json", "--model", str(DEV), "--device", "cpu"])
    report = json.loads(result.stdout)
    assert report["status"] == "ok"
    assert {"section", "name", "status", "detail", "remedy"} == set(report["findings"][0])
    tested = {f["name"] for f in report["findings"] if f["section"] == "Self-test on cpu"}
    assert set(OPS) < tested


def test_every_op_has_a_case_whose_result_matters():
    cases = selftest.op_cases()
    assert set(cases) == set(OPS)
    for op, arguments in cases.items():
        error, spec_error = selftest.compare(op, arguments, torch.bfloat16, CPU)
        exact = op in ("pack_tokens", "unpack_tokens")
        assert (spec_error == 0) == exact, op
        assert error < 0.01


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("fault", ["scaled", "nan", "raises"])
def test_a_wrong_op_is_found(monkeypatch, op, fault):
    right = getattr(ops, op)

    def wrong(*args, **kwargs):
        if fault == "raises":
            raise RuntimeError("no such kernel")
        result = right(*args, **kwargs)
        first, *rest = result if isinstance(result, tuple) else (result,)
        first = (
            first * 1.01 if fault == "scaled" else torch.where(torch.arange(len(first))[:, None] == 3, torch.nan, first)
        )
        return (first, *rest) if isinstance(result, tuple) else first

    monkeypatch.setattr(ops, op, wrong)
    findings = selftest.run_ops(CPU)
    assert {f.name for f in findings if f.status == BROKEN} == {op}
    if fault == "raises":
        assert "no such kernel" in next(f for f in findings if f.name == op).detail


def test_gemms():
    (finding,) = report.gemms(CPU)
    assert (finding.status, finding.name) == (OK, "cpu")
    with linear_choice.use("fused"):
        (finding,) = report.gemms(CPU)
    assert finding.status == BROKEN
    assert "LENS_LINEAR=fused" in finding.detail


def test_a_broken_finding_decides_the_exit_code(monkeypatch):
    monkeypatch.setattr(selftest, "draw_image", lambda *_: [])
    monkeypatch.setattr(ops, "swiglu", lambda h: h[:, : h.shape[1] // 2])
    result = CliRunner().invoke(cli.app, ["doctor", "--device", "cpu"])
    assert result.exit_code == 1
    assert "broken: swiglu" in result.stdout


def test_a_missing_extension_is_broken_and_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "lens._C", None)
    (finding,) = report.extension()
    assert finding.status == BROKEN
    assert "pip install ." in finding.remedy


def test_the_targets_of_a_cuda_build_are_told(monkeypatch):
    names = {"__file__": "_C.so", "isa": lambda: "avx2", "available_isas": lambda: ["base", "avx2"]}
    cuda = {"with_cuda": True, "cuda_targets": "80-real 90a-real 120-virtual"}
    monkeypatch.setitem(sys.modules, "lens._C", types.SimpleNamespace(**names, **cuda))
    assert report.extension()[-1].detail == "built in, for 80 90a 120 and newer"
    monkeypatch.setitem(sys.modules, "lens._C", types.SimpleNamespace(**names, with_cuda=False, cuda_targets=""))
    monkeypatch.setattr(report, "driver_version", lambda: None)
    assert (report.extension()[-1].status, report.extension()[-1].detail) == (OK, "not built in")
    monkeypatch.setattr(report, "driver_version", lambda: "570.10")
    assert report.extension()[-1].status == NOTE
    assert "LENS_CUDA=ON" in report.extension()[-1].remedy


def test_a_device_that_no_target_of_the_build_serves_is_told(monkeypatch):
    module = {"with_cuda": True, "cuda_targets": "90a-real", "__file__": "_C.so", "isa": str, "available_isas": list}
    monkeypatch.setitem(sys.modules, "lens._C", types.SimpleNamespace(**module))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(backend, "no_target", lambda index: "built for others; rebuild it" if index else "")
    found = report.extension()[-1]
    assert (found.name, found.status, found.remedy) == ("cuda kernels on cuda:1", NOTE, "rebuild it")


def test_a_reference_op_is_noted_with_its_reason():
    with backend.use("reference"):
        findings = report.op_backends(CPU)
    for f in findings[:-1]:
        assert (f.status, f.detail) == (NOTE, "reference: forced to reference")


@pytest.mark.parametrize(("version", "detail"), [(None, "missing"), ("4.57.0", "4.57.0, needs >=5")])
def test_a_missing_or_old_package_is_broken(monkeypatch, version, detail):
    real = report._version
    monkeypatch.setattr(report, "_version", lambda name: version if name == "transformers" else real(name))
    found = by_name(report.packages())[("Packages", "transformers")]
    assert found.status == BROKEN
    assert detail in found.detail
    assert found.remedy == "pip install 'transformers>=5'"


def test_a_missing_extra_is_a_note(monkeypatch):
    real = report._version
    monkeypatch.setattr(report, "_version", lambda name: None if name == "fastapi" else real(name))
    found = by_name(report.packages())[("Packages", "[serve]")]
    assert found.status == NOTE
    assert "fastapi" in found.remedy


def test_weights_that_are_not_there_are_broken():
    (finding,) = selftest.draw_image(str(DEV.parent / "nowhere"), CPU)
    assert finding.status == BROKEN
    assert "nowhere" in finding.detail


@pytest.mark.parametrize(("wrong_call", "name"), [(2, "same bits again"), (4, "same bits in a batch")])
def test_a_picture_that_changes_is_found(monkeypatch, wrong_call, name):
    decode, calls = PixelCodec.decode, []

    def drifting(self, rows, grid):
        calls.append(grid)
        return decode(self, rows, grid) + (1e-6 if len(calls) == wrong_call else 0)

    monkeypatch.setattr(PixelCodec, "decode", drifting)
    findings = by_name(selftest.draw_image(str(DEV), CPU))
    assert findings[("Self-test on cpu", name)].status == BROKEN
    assert len([f for f in findings.values() if f.status == BROKEN]) == 1


@pytest.mark.parametrize(("promised", "status"), [(True, BROKEN), (False, NOTE)])
def test_a_neighbour_that_changes_bits_is_a_fault_where_none_may(monkeypatch, promised, status):
    denoise = LensTransformer2DModel.denoise

    def drifting(self, image_rows, text_rows, modulation, packing, *rest, **options):
        self.batch_invariant = promised
        return denoise(self, image_rows, text_rows, modulation, packing, *rest, **options) + 1e-4 * (
            packing.batch_size > 2
        )

    monkeypatch.setattr(LensTransformer2DModel, "denoise", drifting)
    assert by_name(selftest.draw_image(str(DEV), CPU))[("Self-test on cpu", "same bits in a batch")].status == status


@pytest.mark.parametrize("yes", [True, False])
def test_batch_invariance_of_a_gpu_is_told_with_its_way(monkeypatch, yes):
    monkeypatch.setattr(batch_invariance, "report", lambda device: (yes, "by ours"))
    monkeypatch.setattr(doctor_ops, "report", lambda device: [])
    (finding,) = report.op_backends(torch.device("cuda"))
    assert (finding.name, finding.status, finding.detail) == ("batch invariant", OK if yes else NOTE, "by ours")


def test_driver_without_usable_cuda(monkeypatch):
    monkeypatch.setattr(report, "driver_version", lambda: "570.10")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert by_name(report.devices())[("Devices", "cuda")].status == NOTE
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = by_name(report.devices())[("Devices", "cuda")]
    assert found.status == BROKEN
    assert "update the driver" in found.remedy


def test_every_attention_library_is_told_with_its_reason(monkeypatch):
    (finding,) = report.attention(CPU)
    assert "only candidate here" in finding.detail
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(attention_choice, "capability", lambda index: (9, 0))
    monkeypatch.setattr(attention_choice, "installed", lambda name: name == "torch.nn.attention.varlen")
    attention_choice.choose.cache_clear()
    try:
        findings = report.attention(torch.device("cuda"))
        names = sorted(c.name for c in attention_choice.CANDIDATES)
        for use, chosen in (("plain", "torch-cudnn"), ("captured", "torch-varlen"), ("training", "torch-varlen")):
            rows = [
                f
                for f in findings
                if f.section == f"Attention for {use} {'' if use == 'training' else 'steps'}".strip()
            ]
            assert sorted(f.name for f in rows) == names
            assert [f.name for f in rows if f.detail.startswith("CHOSEN: the first in the order for ")] == [chosen]
        (absent,) = [f for f in findings if f.section == "Attention for training" and f.name == "flash-attn-2"]
        assert absent.detail == "not: flash_attn is not installed"
        gradients = {f.name: f.detail for f in findings if f.section == "Gradients of attention"}
        assert sorted(gradients) == sorted(b.name for b in attention_choice.BACKWARDS)
        assert [n for n, detail in gradients.items() if detail.startswith("CHOSEN: the first in the order for ")] == [
            "torch-flash"
        ]
        assert "LENS_ATTENTION_BACKWARD=torch-cudnn forces it" in gradients["torch-cudnn"]
        with attention_choice.use_backward("torch-cudnn"):
            told = [f for f in report.attention(torch.device("cuda")) if f.section == "Gradients of attention"]
        assert (told[0].name, told[0].status, told[0].detail) == ("torch-cudnn", OK, "CHOSEN: forced")
        assert {f.status for f in told[1:]} == {NOTE}
        with attention_choice.use("torch-sdpa"):
            forced = report.attention(torch.device("cuda"))
        assert next(f for f in forced if f.name == "torch-sdpa").detail == "CHOSEN: forced"
        captured = [f for f in forced if f.section == "Attention for captured steps"]
        assert {f.status for f in captured} == {NOTE}, "the forced one reads lengths: nothing is chosen"
    finally:
        attention_choice.choose.cache_clear()


def test_the_memory_of_every_residency_is_told(monkeypatch):
    monkeypatch.setattr(report, "_available", lambda: 16 << 30)
    on_cpu = {f.name: f for f in report.memory(CPU)}
    assert {name: f.status for name, f in on_cpu.items()} == {"trimmed": NOTE, "balanced": OK}
    assert "text_encoder on_demand, transformer resident, vae resident, modulation host" in on_cpu["balanced"].detail
    assert "does not fit 16.0 GiB free" in on_cpu["trimmed"].detail
    monkeypatch.setattr(report, "_available", lambda: None)
    assert {f.status for f in report.memory(CPU)} == {OK}, "a system that does not tell"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (18 << 30, 24 << 30))
    fits = {f.name: f.status for f in report.memory(torch.device("cuda"))}
    assert (fits["resident"], fits["lean"]) == (NOTE, OK)
