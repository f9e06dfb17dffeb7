"""MXFP4 experts on a faked GPU: transformers' own answer, each package absent or of a wrong version."""

from __future__ import annotations

import pytest
import torch
from transformers import GptOssConfig
from transformers.utils import import_utils

from lens.doctor import report
from lens.doctor.findings import NOTE, OK
from lens.formats import mxfp4, text_encoder
from lens.formats.parts import Part
from tests.small_pipeline import FOLDER

LOW, HIGH = import_utils.KERNELS_MIN_VERSION, import_utils.KERNELS_MAX_VERSION
HERE = {"accelerate": "1.15.0", "triton": "3.6.0", "kernels": LOW}


@pytest.fixture
def machine(monkeypatch):
    """A function that fakes an H200 with these packages, by version."""
    checks = [import_utils.is_accelerate_available, import_utils.is_triton_available, import_utils.is_kernels_available]
    real = import_utils._is_package_available

    def forget():
        for check in checks:
            check.cache_clear()

    def fake(capability=(9, 0), **changes):
        have = {**HERE, **changes}

        def available(name, *arguments, **options):
            if name not in have:
                return real(name, *arguments, **options)
            return have[name] is not None, have[name] or "N/A"

        monkeypatch.setattr(import_utils, "_is_package_available", available)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        forget()

    yield fake
    monkeypatch.undo()
    forget()


def test_with_everything_the_experts_stay_packed(machine):
    machine()
    assert (mxfp4.why_expanded(), mxfp4.wanted()) == ("", [])
    (finding,) = report.packed_text_encoder()
    assert finding.status == OK


@pytest.mark.parametrize(
    ("changes", "word", "wanted"),
    [
        ({"accelerate": None}, "Accelerate", "accelerate"),
        ({"triton": None}, "Triton", "triton>=3.4.0"),
        ({"triton": "3.3.1"}, "Triton", "triton>=3.4.0"),
        ({"kernels": None}, "`kernels`", f"kernels>={LOW},<{HIGH}"),
        ({"kernels": "0.1.0"}, LOW, f"kernels>={LOW},<{HIGH}"),
        ({"kernels": HIGH}, HIGH, f"kernels>={LOW},<{HIGH}"),
    ],
    ids=lambda value: "".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_what_is_missing_is_said_every_time_and_by_the_doctor(machine, changes, word, wanted):
    machine(**changes)
    for _ in range(2):  # transformers itself says it once
        assert word in mxfp4.why_expanded()
    (finding,) = report.packed_text_encoder()
    assert (finding.status, finding.remedy) == (NOTE, f"pip install '{wanted}'")
    assert "expanded to bfloat16, 38 GiB instead of 12: " in finding.detail
    assert word in finding.detail


def test_an_old_device_is_said(machine):
    machine(capability=(7, 0))
    assert "compute capability" in mxfp4.why_expanded()
    assert report.packed_text_encoder()[0].remedy == ""


def test_loading_onto_a_gpu_tells_that_it_expands(machine, monkeypatch, tmp_path):
    """By the class of what was loaded, also where nothing foretold it."""
    config = GptOssConfig.from_pretrained(FOLDER / "text_encoder")
    given = []

    def loaded(folder, **options):
        given.append(options)
        return torch.nn.Linear(1, 1)

    monkeypatch.setattr("transformers.GptOssModel.from_pretrained", loaded)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)
    machine(kernels=None)
    with pytest.warns(UserWarning, match="are expanded, to about four times their size: MXFP4 quantization requires"):
        text_encoder._load_mxfp4(Part.of(tmp_path), config, torch.bfloat16, "cuda")
    assert given[0]["quantization_config"].dequantize
    machine()
    with pytest.warns(UserWarning, match="transformers does not say why"):
        text_encoder._load_mxfp4(Part.of(tmp_path), config, torch.bfloat16, "cuda")
    assert given[1]["device_map"] == {"": "cuda"}
