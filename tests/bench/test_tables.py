"""Measured rates in the tables that choose kernels: their arithmetic, their place, their source."""

import json

import pytest

from bench import __main__ as bench
from bench import tables
from bench.suites import cases
from lens.engine import batch_invariance
from lens.ops.attention import choice as attention_choice
from lens.ops.linear import choice as linear_choice
from tests.bench.results import result, row
from tests.bench.test_compare import as_file

ATTENTION, LINEAR = attention_choice.TABLE, linear_choice.TABLE


@pytest.fixture
def places(tmp_path):
    """Copies of the tables, and what points to them."""
    originals = {"attention": ATTENTION, "linear": LINEAR, "invariance": batch_invariance.TABLE}
    copies = {name: tmp_path / original.name for name, original in originals.items()}
    for name, original in originals.items():
        copies[name].write_text(original.read_text())
    return {**copies, "folder": tmp_path}


def timed(case, seconds, subject, flops, **more):
    made = row(case, seconds, subject=subject)
    made.more.update({"flops": flops, **more})
    return made


def attention(*rates, case="attention/4511,4096/bf16/forward"):
    return [timed(case, 1e-3, name, rate * 1e9) for name, rate in rates]


def products(fused, library, rows=8607):
    case = "gemm/w13_swiglu/8192+text415/bf16"
    of = {"gemm": "w13", "rows": rows, "block": True}
    return [timed(case, 0.5e-3, n, rate * 0.5e9, **of) for n, rate in (("fused", fused), ("library", library))]


def entries(path, **wanted):
    found = json.loads(path.read_text())["entries"]
    return [e for e in found if all(e[k] == v for k, v in wanted.items())]


def test_a_rate_is_flops_over_the_best_time_and_names_case_file_and_commit(tmp_path, places):
    rows = attention(("torch-cudnn", 412.34), ("ours", 412), ("sdpa_masked", 220))
    path = as_file(tmp_path / "attention.json", result(*rows, capability="9.0"))
    assert tables.tables([path], **places) == [places["attention"]]
    assert entries(places["attention"], arch="9.0", shape="long", backend="torch-cudnn") == [
        {
            "arch": "9.0",
            "shape": "long",
            "backend": "torch-cudnn",
            "tflops": 412.3,
            "status": "measured",
            "source": "attention/4511,4096/bf16/forward, NVIDIA H200, attention.json, commit c",
        }
    ]
    assert not entries(places["attention"], backend="sdpa_masked") + entries(places["attention"], backend="ours")
    untouched = [
        e for e in entries(ATTENTION) if (e["shape"], e["backend"], e["arch"]) != ("long", "torch-cudnn", "9.0")
    ]
    assert entries(places["attention"], status="predicted") == untouched, "in their order, too"


def test_gradients_have_lines_of_their_own(tmp_path, places):
    rows = attention(("flash-attn-2", 199.96), ("torch-flash", 190), case="attention/8x968/bf16/gradients")
    tables.tables([as_file(tmp_path / "attention.json", result(*rows, capability="9.0"))], **places)
    found = entries(places["attention"], status="measured")
    assert [(e["shape"], e["backend"], e["tflops"]) for e in found] == [
        ("short backward", "flash-attn-2", 200.0),
        ("short backward", "torch-flash", 190.0),
    ]


def test_products_are_measured_as_a_block_calls_them(tmp_path, places):
    alone = timed("gemm/w2_residual/8192/bf16", 1e-3, "fused", 1e11, gemm="w2", rows=8192, block=False)
    plain = timed("gemm/w13/8192/bf16", 1e-3, "matmul", 1e11)
    made = result(*products(688, 571), alone, plain, capability="9.0")
    assert tables.tables([as_file(tmp_path / "gemm.json", made)], **places) == [places["linear"]]
    found = entries(places["linear"], status="measured")
    assert [(e["gemm"], e["rows"], e["backend"], e["tflops"]) for e in found] == [
        ("w13", 8607, "fused", 688.0),
        ("w13", 8607, "library", 571.0),
    ]
    lines = [e["gemm"] for e in entries(places["linear"])]
    assert lines == sorted(lines, key=lines.index), "new lines stand with their product"


def test_both_tables_are_read_by_what_chooses_by_them(tmp_path, places, monkeypatch):
    import torch

    rows = [*attention(("torch-cudnn-varlen", 640)), *products(700, 600)]
    tables.tables([as_file(tmp_path / "all.json", result(*rows, capability="9.0"))], **places)
    monkeypatch.setattr(attention_choice, "TABLE", places["attention"])
    monkeypatch.setattr(linear_choice, "TABLE", places["linear"])
    monkeypatch.setattr(linear_choice, "why_unsupported", lambda call: "")
    caches = (attention_choice.table, attention_choice.choose, linear_choice.table, linear_choice.choose)
    try:
        for cache in caches:
            cache.cache_clear()
        call = attention_choice.AttentionCall("cuda", (9, 0), torch.bfloat16, 64, False, True, 4511)
        assert attention_choice.choose(call).name == "torch-cudnn-varlen"
        products_need = linear_choice.GemmCall("w13", "cuda", (9, 0), torch.bfloat16, 8607, 1536, 8192)
        assert linear_choice.decide(products_need)[0] == "fused"
    finally:
        for cache in caches:
            cache.cache_clear()


FIRST = batch_invariance.CASES[0]


def priced(case, plain, invariant, products="ours", rates=True, **forced):
    """A step and the same under batch_invariant, in milliseconds."""
    rows = [row(case, 1e-3 * ms, subject=name) for name, ms in (("ours", plain), ("ours_batch_invariant", invariant))]
    for made in rows:
        made.more.update({"forced": forced, "products": products, "by_measured_rates": rates})
    return rows


def test_the_price_of_batch_invariance_decides_its_default_once_every_case_is_measured(tmp_path, places, monkeypatch):
    monkeypatch.setattr(batch_invariance, "TABLE", places["invariance"])
    prices = {"step/1024/cfg/text415/bf16": (60, 60.6), "step/1024/b4/text200/bf16": (120, 121.8)}
    prices["step/1024/b8/text200/bf16"] = (240, 241.2)
    try:
        for k, (case, (plain, invariant)) in enumerate(prices.items()):
            made = result(*priced(case, plain, invariant), capability="9.0")
            assert tables.tables([as_file(tmp_path / f"{k}.json", made)], **places) == [places["invariance"]]
            batch_invariance.table.cache_clear()
            assert (batch_invariance.price((9, 0)) is None) == (k < 2)
        assert batch_invariance.price((9, 0)) == 0.015
        first = entries(places["invariance"], arch="9.0")[0]
        assert first["source"] == "step/1024/cfg/text415/bf16, NVIDIA H200, 0.json, commit c"
        assert [e["case"] for e in entries(places["invariance"])] == list(batch_invariance.CASES)
        assert [e["price"] for e in entries(places["invariance"])] == [0.01, 0.015, 0.005]
    finally:
        batch_invariance.table.cache_clear()


@pytest.mark.parametrize(
    "rows",
    [
        priced(FIRST, 60, 60, linear="fused"),
        [*priced(FIRST, 60, 60, linear="fused")[:1], *priced(FIRST, 60, 60)[1:]],
        [*priced(FIRST, 60, 60)[:1], *priced(FIRST, 60, 60, linear="fused")[1:]],
        priced(FIRST, 60, 60, products="library, sample by sample: w13"),
        priced(FIRST, 60, 60, rates=False),
        priced("step/1024/cfg/text200/bf16", 60, 60),
        priced(FIRST, 60, 60)[:1],
        priced(FIRST, 60, 60)[1:],
    ],
    ids=[
        "forced",
        "one forced",
        "the other",
        "by the library",
        "beside the library",
        "another case",
        "without it alone",
        "with it alone",
    ],
)
def test_no_other_measurement_is_a_price(tmp_path, places, rows):
    made = result(*rows, capability="9.0")
    assert tables.tables([as_file(tmp_path / "step.json", made)], **places) == []


def test_a_later_result_replaces_an_earlier_one_and_the_second_time_changes_nothing(tmp_path, places):
    paths = [
        as_file(tmp_path / f"{k}.json", result(*attention(("torch-varlen", rate)), capability="9.0"))
        for k, rate in enumerate((300, 330))
    ]
    tables.tables(paths, **places)
    assert [e["tflops"] for e in entries(places["attention"], backend="torch-varlen", shape="long", arch="9.0")] == [
        330
    ]
    assert tables.tables(paths, **places) == []
    with pytest.raises(ValueError, match=r"stale: attention_table\.json"):
        tables.tables(paths[:1], check=True, **places)
    assert [e["tflops"] for e in entries(places["attention"], backend="torch-varlen", shape="long", arch="9.0")] == [
        330
    ]


def test_another_architecture_gets_lines_of_its_own(tmp_path, places):
    made = result(*attention(("torch-varlen", 900)), capability="10.0", device="NVIDIA B200")
    tables.tables([as_file(tmp_path / "b200.json", made)], **places)
    assert [e["backend"] for e in entries(places["attention"], arch="10.0", shape="long")] == [
        "flash-attn-4",
        "torch-varlen",
    ]
    assert len(entries(places["attention"])) == len(entries(ATTENTION)) + 1


def test_results_of_a_cpu_and_other_files_are_refused(tmp_path, capsys):
    (tmp_path / "a.json").write_text("{}")
    assert bench.main(["tables", str(tmp_path / "a.json")]) == 2
    cpu = as_file(tmp_path / "b.json", result(*attention(("torch-varlen", 1)), device="AMD EPYC"))
    assert bench.main(["tables", str(cpu)]) == 2
    assert "the tables are of GPUs" in capsys.readouterr().err


def test_the_tables_are_what_the_committed_results_say(capsys):
    assert bench.main(["tables", "--check"]) == 0, capsys.readouterr().err


def test_the_cases_of_the_tables_exist():
    assert [c.id for c in cases(("attention",)) if c.id in tables.SHAPES]
    assert len([c for c in cases(("attention",)) if c.id in tables.SHAPES]) == len(tables.SHAPES)
    classes = {f"{length}{which}" for length in ("long", "short") for which in ("", " training", " backward")}
    assert set(batch_invariance.CASES) <= {c.id for c in cases(("step",)) if "ours_batch_invariant" in c.subjects}
    assert set(tables.SHAPES.values()) == classes
