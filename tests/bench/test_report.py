"""README table and picture: committed results only, honest where there are none."""

import json
import xml.etree.ElementTree as ET

import pytest

from bench import report
from bench.roofline import SAME_CHIP
from tests.bench.results import result, row
from tests.bench.test_compare import as_file


def results_in(folder):
    place = folder / "h200"
    place.mkdir(parents=True)
    rows = [row(f"e2e/{v}/1024/b1/bf16/denoise", s) for v, s in (("lens", 1.2), ("turbo", 0.15))]
    rows += [row("e2e/lens/1024/b1/bf16/denoise", 2.7, subject="reference_eager")]
    rows += [row("e2e/lens/1024/b1/bf16/text", 0.03), row("e2e/turbo/1024/b1/bf16/decode", 0.03)]
    as_file(place / "e2e.json", result(*rows))
    (place / "summary.json").write_text("{}")
    return folder


def test_without_results_nothing_is_claimed(tmp_path):
    table = report.speed_table(report.gpu_results(tmp_path), report.cpu_results(tmp_path))
    assert table.startswith("No GPU result is committed yet.")
    for number in ("3.15 s", "0.84 s", "681 ms", "71.3 ms"):
        assert number in table
    assert "|" not in table


def test_a_cpus_row_ops_stand_beside_eager_and_inductor(tmp_path):
    """Multiples within one run, below one where ours is slower; backward passes and other shapes have no place there."""
    subjects = {"ours": 1e-3, "spec_eager": 8e-3, "spec_compiled": 0.9e-3}
    rows = [
        row(f"ops/swiglu/pair/fp32/{p}", s, subject=n) for n, s in subjects.items() for p in ("forward", "backward")
    ]
    rows += [row("ops/pack_tokens/mini/fp32/forward", 1.0)]
    made = result(*rows, device="AMD EPYC", isa="avx512", threads=1)
    del made.identity["multiprocessors"]
    (tmp_path / "epyc").mkdir()
    as_file(tmp_path / "epyc" / "ops.json", made)
    table = report.speed_table({}, report.cpu_results(tmp_path))
    assert "| swiglu | 1 ms | 8x | 0.9x |  |  |  |" in table
    assert "pack_tokens" not in table
    assert "AMD EPYC; driver 580; isa avx512; 1 thread(s)" in table
    assert report.gpu_results(tmp_path) == {}


def test_results_are_told_with_what_they_lack_and_what_they_are_compared_with(tmp_path):
    found = report.gpu_results(results_in(tmp_path))
    table = report.speed_table(found)
    assert "1.23 s on one NVIDIA H200, without decode |" in table
    assert "210 ms on one NVIDIA H200 |" in table  # the text encoder is Lens's
    assert SAME_CHIP in table
    assert "not measured" not in table


def test_the_picture_stacks_the_stages_to_scale(tmp_path):
    drawing = report.chart(report.gpu_results(results_in(tmp_path)))
    root = ET.fromstring(drawing)
    assert "reference, eager, NVIDIA H200" in drawing
    bars = [r for r in root.iter("{http://www.w3.org/2000/svg}rect") if r.get("height") == "18"]
    widths = {r.get("fill"): float(r.get("width")) for r in bars[:3]}
    paper, denoise = widths[report.COLOURS["paper"]], widths[report.COLOURS["denoise"]]
    assert denoise / paper == pytest.approx(1.2 / 3.15, rel=0.01)
    assert SAME_CHIP in drawing


def test_throughput_is_told_where_batches_were_measured():
    rows = [row(f"e2e/turbo/1024/b{b}/bf16/total", s) for b, s in ((1, 0.2), (8, 1.25))]
    head = report.throughput({"NVIDIA H200": [result(*rows)]})[:2]
    assert report.throughput({"NVIDIA H200": [result(*rows)]}) == [
        *head,
        "| NVIDIA H200, one call, prompt to pixels | 5 |  | 6.4 |  |",
        "",
    ]
    assert report.throughput({"NVIDIA H200": [result(row("x", 1.0))]}) == []
    newer = [row("e2e/turbo/1024/b1/bf16/total", 0.16), row("e2e/turbo/1024/b4/bf16/denoise", 0.5)]
    for case, ours, calls in (("1024/b8", 4.0, 4.8), ("mixed/queue", 3.2, 4.0)):
        for subject, seconds in (("ours", ours), ("calls", calls)):
            streamed = row(f"e2e/turbo/{case}/bf16/stream", seconds, subject=subject)
            streamed.more["images"] = 24 if "b8" in case else 16
            newer.append(streamed)
    lines = report.throughput({"NVIDIA H200": [result(*rows), result(*newer)]})
    assert lines == [
        *head,
        "| NVIDIA H200, streamed, decode beside denoising |  |  | 6 | 5 |",
        "| NVIDIA H200, the same calls one after another |  |  | 5 | 4 |",
        "| NVIDIA H200, one call, prompt to pixels | 6.25 |  | 6.4 |  |",
        "| NVIDIA H200, one call, the denoiser alone |  | 8 |  |  |",
        "",
    ]
    assert all(line.count("|") == 6 for line in lines[:-1])


def test_a_variants_own_decode_counts_whatever_the_order():
    """Both variants decode alike; a set of names would pick either, by the seed of the process's hashes."""
    own = [row("e2e/turbo/1024/b1/bf16/denoise", 0.15), row("e2e/turbo/1024/b1/bf16/decode", 0.03)]
    for rows in ([row("e2e/lens/1024/b1/bf16/decode", 0.04), *own], [*own, row("e2e/lens/1024/b1/bf16/decode", 0.04)]):
        assert report.measured([result(*rows)], "turbo", "ours").stages == {"denoise": 0.15, "decode": 0.03}


@pytest.mark.parametrize(
    ("total", "told", "drawn"),
    [
        (0.2, "200 ms", {"text": 0.03, "denoise": 0.12, "decode": 0.03, "rest": 0.02}),
        (
            0.17,
            "170 ms (stages alone 180 ms: they overlap)",
            {"text": 0.17 / 6, "denoise": 0.68 / 6, "decode": 0.17 / 6},
        ),
        (0.179, "179 ms", {"text": 0.179 / 6, "denoise": 0.716 / 6, "decode": 0.179 / 6}),
        (None, "180 ms", {"text": 0.03, "denoise": 0.12, "decode": 0.03}),
    ],
)
def test_what_counts_is_the_total_whatever_its_stages_take_alone(total, told, drawn):
    stages = {"text": 0.03, "denoise": 0.12, "decode": 0.03}
    rows = [row(f"e2e/turbo/1024/b1/bf16/{stage}", s) for stage, s in stages.items()]
    rows += [] if total is None else [row("e2e/turbo/1024/b1/bf16/total", total)]
    results = {"NVIDIA H200": [result(*rows)]}
    times = report.measured(results["NVIDIA H200"], "turbo", "ours")
    assert f"| {told} on one NVIDIA H200 |" in report.speed_table(results)
    assert times.drawn == pytest.approx(drawn)
    assert sum(times.drawn.values()) == pytest.approx(times.seconds)
    assert f">{told}</text>" in report.chart(results)


def test_a_total_alone_lacks_nothing():
    rows = [row("e2e/lens/1024/b1/bf16/denoise", 1.2), row("e2e/lens/1024/b1/bf16/total", 1.3)]
    assert "| 1.3 s on one NVIDIA H200 |" in report.speed_table({"NVIDIA H200": [result(*rows)]})


def test_a_cpu_has_no_headline(tmp_path):
    (tmp_path / "epyc").mkdir()
    made = result(row("e2e/lens/1024/b1/bf16/denoise", 9.0))
    del made.identity["multiprocessors"]
    as_file(tmp_path / "epyc" / "a.json", made)
    assert report.gpu_results(tmp_path) == {}


def test_writing_changes_only_what_is_between_the_markers_and_then_nothing(tmp_path):
    readme, drawing = tmp_path / "README.md", tmp_path / "speed.svg"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    where = dict(results=tmp_path / "none", readme=readme, drawing=drawing)
    with pytest.raises(ValueError, match="stale"):
        report.write(check=True, **where)
    assert readme.read_text().count("old") == 1
    assert report.write(**where) == [readme]
    assert not drawing.exists(), "nothing to draw"
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert report.write(**where) == []
    assert report.write(check=True, **where) == []
    results_in(tmp_path / "none")
    assert report.write(**where) == [readme, drawing]
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="must hold"):
        report.write(**where)


def test_the_readme_is_what_the_committed_results_say():
    assert report.write(check=True) == []


def test_committed_results_can_be_read():
    for path in report.RESULTS.rglob("*.json"):
        json.loads(path.read_text())
    report.gpu_results()
