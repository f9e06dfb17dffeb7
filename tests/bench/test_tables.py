"""Committed results in the orders that choose kernels, and in the price of batch invariance: places, sources, refusals."""

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


@pytest.fixture
def places(tmp_path):
    """Copies of what is rewritten, and what points to them."""
    originals = {"attention": tables.ATTENTION, "linear": tables.LINEAR, "invariance": batch_invariance.TABLE}
    copies = {name: tmp_path / f"{name}{original.suffix}" for name, original in originals.items()}
    for name, original in originals.items():
        copies[name].write_text(original.read_text())
    return {**copies, "folder": tmp_path}


def attention(case="attention/4511,4096/bf16/forward", **milliseconds):
    """Rows of a case by subject; "_" stands for "-"."""
    return [row(case, 1e-3 * ms, subject=name.replace("_", "-")) for name, ms in milliseconds.items()]


def gemms(fused, library, rows=8607, gemm="w13", block=True):
    made = [row(f"gemm/{gemm}/{rows}", ms / 1e3, subject=n) for n, ms in (("fused", fused), ("library", library))]
    for one in made:
        one.more.update({"gemm": gemm, "rows": rows, "block": block})
    return made


def entries(path, **wanted):
    found = json.loads(path.read_text())["entries"]
    return [e for e in found if all(e[k] == v for k, v in wanted.items())]


def order(path, arch, use):
    return tables.orders_in(path.read_text())[arch, use]


def written(tmp_path, places, *rows, name="a.json", **identity):
    """The files that one result changes."""
    made = result(*rows, **{"capability": "9.0", **identity})
    return tables.tables([as_file(tmp_path / name, made)], **places)


def test_timed_names_are_sorted_among_their_places_and_the_line_names_its_result(tmp_path, places):
    before = tables.ATTENTION.read_text()
    rows = attention(torch_cudnn=0.7, torch_varlen=0.5, flash_attn_2=0.6, ours=0.1, sdpa_masked=0.2)
    assert written(tmp_path, places, *rows) == [places["attention"]]
    after = places["attention"].read_text()
    expected = ("flash-attn-3", "flash-attn-4", "torch-varlen", "flash-attn-2", "torch-cudnn", "torch-sdpa")
    assert order(places["attention"], "9.0", "long") == expected, "flash-attn-3, -4 and sdpa were not timed"
    assert "),  # NVIDIA H200, a.json, commit c\n" in after
    assert len(set(after.splitlines()) - set(before.splitlines())) == 1, "nothing else changes"
    compile(after, "choice.py", "exec")


def test_our_kernel_enters_before_what_it_beats(tmp_path, places):
    """By a committed result alone, and `--check` refuses it without one."""
    rows = attention(lens_hopper=0.55, torch_cudnn=0.7, torch_varlen=0.5, flash_attn_2=0.6)
    written(tmp_path, places, *rows)
    expected = (
        "flash-attn-3",
        "flash-attn-4",
        "torch-varlen",
        "lens-hopper",
        "flash-attn-2",
        "torch-cudnn",
        "torch-sdpa",
    )
    assert order(places["attention"], "9.0", "long") == expected
    assert tables.tables([tmp_path / "a.json"], check=True, **places) == []
    with pytest.raises(ValueError, match=r"without a committed result: lens-hopper in the order \('9.0', 'long'\)"):
        tables.tables([], check=True, **places)
    slowest = attention(lens_hopper=0.9, torch_cudnn=0.7)
    written(tmp_path, places, *slowest, name="b.json", capability="8.9")
    expected = ("flash-attn-2", "torch-varlen", "torch-sdpa", "torch-cudnn", "lens-hopper")
    assert order(places["attention"], "8.9", "long") == expected, "behind all, and beginning with 8.0's order"


@pytest.mark.parametrize("length", ["long", "short"])
def test_training_is_ordered_by_both_passes_and_a_pair_enters_where_it_beats_both_its_libraries(
    tmp_path, places, length
):
    case = {"long": "attention/4511,4096/bf16", "short": "attention/8x968/bf16"}[length]
    forward = dict(lens_hopper=0.4, torch_cudnn=0.5, flash_attn_2=0.7, torch_varlen=0.6, torch_sdpa=0.9)
    rows = attention(f"{case}/training", **forward)
    rows += attention(f"{case}/gradients", flash_attn_2=1.5, torch_flash=2.0, torch_cudnn=1.0)
    written(tmp_path, places, *rows)
    expected = ("flash-attn-3", "flash-attn-4", "lens-hopper + flash-attn-2")  # 1.9 s
    expected += ("torch-cudnn + flash-attn-2", "torch-varlen + flash-attn-2", "flash-attn-2")  # 2.0, 2.1, 2.2
    expected += ("lens-hopper + torch-flash", "torch-cudnn + torch-flash")  # 2.4, 2.5: before torch-varlen's own, 2.6
    expected += ("torch-varlen", "torch-sdpa")
    assert order(places["attention"], "9.0", f"{length} training") == expected, "torch-cudnn's gradients serve nowhere"
    assert tables.tables([tmp_path / "a.json"], **places) == []


def test_ours_comes_first_where_it_is_faster_at_every_number_of_rows(tmp_path, places):
    kernels = [*gemms(0.5, 0.6), *gemms(0.3, 0.31, rows=4296), *gemms(0.1, 0.9, gemm="w2", block=False)]
    kernels += [*gemms(0.5, 0.6, gemm="qkv"), *gemms(0.4, 0.3, rows=4296, gemm="qkv"), *gemms(1, 9, 100, gemm="out")]
    assert written(tmp_path, places, *kernels) == [places["linear"]]
    assert order(places["linear"], "9.0", "w13") == ("fused", "library")
    assert order(places["linear"], "9.0", "qkv") == ("library", "fused")
    assert order(places["linear"], "9.0", "w2") == ("library",), "not as a block calls it"
    assert order(places["linear"], "9.0", "out") == ("library",), "too few rows"
    with pytest.raises(ValueError, match=r"without a committed result: fused in the order \('9.0', 'qkv'\)"):
        tables.tables([], check=True, **places)


FIRST = batch_invariance.CASES[0]


def priced(case, plain, invariant, gemms="ours", orders=True, **forced):
    """A step and the same under batch_invariant, in milliseconds."""
    rows = [row(case, 1e-3 * ms, subject=name) for name, ms in (("ours", plain), ("ours_batch_invariant", invariant))]
    for made in rows:
        made.more.update({"forced": forced, "gemms": gemms, "by_measured_orders": orders})
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
        priced(FIRST, 60, 60, gemms="library, sample by sample: w13"),
        priced(FIRST, 60, 60, orders=False),
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


def test_a_later_result_counts_and_the_second_time_changes_nothing(tmp_path, places):
    paths = [
        as_file(tmp_path / f"{k}.json", result(*attention(torch_varlen=ms, flash_attn_2=0.5), capability="9.0"))
        for k, ms in enumerate((0.6, 0.4))
    ]
    tables.tables(paths, **places)
    assert order(places["attention"], "9.0", "long")[3:5] == ("torch-varlen", "flash-attn-2")
    assert tables.tables(paths, **places) == []
    with pytest.raises(ValueError, match=r"stale: .*attention\.py"):
        tables.tables(paths[:1], check=True, **places)
    assert order(places["attention"], "9.0", "long")[3:5] == ("torch-varlen", "flash-attn-2")


def test_results_of_a_cpu_and_other_files_are_refused(tmp_path, capsys):
    (tmp_path / "a.json").write_text("{}")
    assert bench.main(["tables", str(tmp_path / "a.json")]) == 2
    cpu = as_file(tmp_path / "b.json", result(*attention(torch_varlen=1), device="AMD EPYC"))
    assert bench.main(["tables", str(cpu)]) == 2
    assert "the orders are of GPUs" in capsys.readouterr().err


def test_the_orders_are_what_the_committed_results_say(capsys):
    assert bench.main(["tables", "--check"]) == 0, capsys.readouterr().err
    for path, orders in ((tables.ATTENTION, attention_choice.ORDERS), (tables.LINEAR, linear_choice.ORDERS)):
        assert tables.orders_in(path.read_text()) == orders


def test_the_cases_of_the_orders_exist():
    assert set(tables.CASES) <= {c.id for c in cases(("attention",))}
    assert {use for _, use in attention_choice.ORDERS} <= set(tables.CASES.values())
    assert set(batch_invariance.CASES) <= {c.id for c in cases(("step",)) if "ours_batch_invariant" in c.subjects}
