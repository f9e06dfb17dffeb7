"""Table 6, figure 2, the paper's rows, rewrites of a reasoner, and the grid of sizes."""

import json
import re
from dataclasses import asdict, replace

import numpy as np
import pytest

from lens.reasoner import Refined, Refused
from tests.train.published_judges import CARD, options
from train.evaluate import sizes
from train.evaluate.published import command, drawing, frontier, geneval, paper, reasoners, rewrites
from train.evaluate.published.judging import Card, Column, Count, Figure, columns_of
from train.loop.clock import Interrupted

OTHER = Card("other", "1", "float32", "cpu")


def test_the_papers_rows_are_as_printed():
    assert paper.rows("table_2")["Lens (20-step)"]["GenEval"] == 0.930
    assert paper.rows("table_2")["Kolors 2.0"]["GenEval"] is None
    assert paper.sizes()["Lens (20-step)"] == 3.8
    assert "Seedream 4.0" not in paper.sizes()
    table, rows = paper.beside("cvtg")
    assert (table, rows["Lens"]["2R"], rows["Lens"]["total"], rows["Lens"]["CLIPScore"]) == (
        "table 5",
        0.897,
        0.869,
        0.814,
    )
    assert paper.beside("oneig", "zh")[1]["Lens (20-step)"]["total"] == 0.525
    assert paper.beside("geneval", "zh") == ("", {})
    # the compute as the paper counts it, of the dense bfloat16 peaks
    assert pytest.approx(paper.tables()["compute"]["ratio"], abs=5e-4) == 192e3 * 312 / (314e3 * 989.5)


def scores(path, benchmark, *columns, limit=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"benchmark": benchmark, "settings": {"limit": limit}, "columns": [c.as_json() for c in columns]}
    path.write_text(json.dumps(values))
    return path


def column(name, card=CARD, **figures):
    return Column(
        name,
        [card],
        {k: Figure(v, v - 0.01, v + 0.01, 9) for k, v in figures.items()},
        [],
        "total",
        {"images": Count(9, 9)},
    )


def test_table_6_has_our_rows_below_the_papers(tmp_path):
    one = scores(tmp_path / "a.json", "geneval", column("ours", total=0.5), column("ours, reasoner", total=0.625))
    areas = {f"{n}R": value for n, value in zip((2, 3, 4, 5), (0.4, 0.3, 0.2, 0.1))}
    two = scores(tmp_path / "b.json", "cvtg", column("ours", total=0.5, NED=0.75, **areas))
    found = reasoners.reasoners([one, two])
    text = reasoners.printed(found)
    lines = text.splitlines()
    assert lines[0].split("  ")[-1] == "CVTG CLIP"
    assert len(lines) == 1 + 7 + 2
    assert re.search(r"Lens w/o reasoner, paper +0.532 +0.843", text)
    assert re.search(r"^ours +0.500 \[0.490, 0.510\] +0.250 \[0.245, 0.255\] +0.750", text, re.MULTILINE)
    other = scores(tmp_path / "c.json", "geneval", column("theirs", OTHER, total=0.5))
    with pytest.raises(ValueError, match="scores of different judges do not compare"):
        reasoners.reasoners([one, other])
    part = scores(tmp_path / "d.json", "geneval", column("part", total=0.5), limit=3)
    with pytest.raises(ValueError, match=r"d.json: no scores of a whole published benchmark"):
        reasoners.reasoners([part])
    assert columns_of(one)[1][0] == column("ours", total=0.5)
    assert asdict(columns_of(one)[1][0].cards[0]) == asdict(CARD)


def test_table_6_is_of_english_and_of_whole_averages(tmp_path, capsys):
    one = scores(tmp_path / "a.json", "longtext", column("ours", total=0.5), replaced("ours, zh", "zh", total=0.25))
    assert list(reasoners.reasoners([one])) == ["ours"]
    assert "left out, table 6 is of English: ours, zh (zh)" in capsys.readouterr().out
    two = scores(tmp_path / "b.json", "longtext", replaced("ours, zh", "zh", total=0.25))
    with pytest.raises(
        ValueError, match=r"b.json: expected longtext of English, as table 6 has it, got ours, zh \(zh\)"
    ):
        reasoners.reasoners([one, two])
    again = scores(tmp_path / "c.json", "longtext", column("ours", total=0.25))
    with pytest.raises(
        ValueError, match=r"c.json: longtext of 'ours', as in .*a.json: give one of them another --name"
    ):
        reasoners.reasoners([one, again])
    # an older file says its languages in its settings alone
    values = json.loads(two.read_text())
    values["settings"]["language"] = ["zh"]
    for key in ("language", "counts"):
        del values["columns"][0][key]
    two.write_text(json.dumps(values))
    assert (columns_of(two)[1][0].language, columns_of(two)[1][0].judged) == ("zh", 9)
    part = scores(tmp_path / "d.json", "cvtg", column("ours", total=0.5, **{"2R": 0.5, "3R": 0.5, "4R": 0.5}))
    assert reasoners.reasoners([part])["ours"]["CVTG Avg."] == Figure(None, note="not all four areas")


def replaced(name, language, **figures):
    return replace(column(name, **figures), language=language)


def bench_file(path, device, *cases):
    entries = [{"extra_info": {"case": c, "subject": s}, "stats": {"median": m}} for c, s, m in cases]
    path.write_text(json.dumps({"machine_info": {"identity": {"device": device}}, "benchmarks": entries}))
    return path


def test_figure_2_has_measured_times_alone(tmp_path, capsys):
    score = scores(tmp_path / "s.json", "geneval", column("ours", total=0.9))
    bench = bench_file(
        tmp_path / "e2e.json", "NVIDIA H100 SXM",
        ("e2e/lens/1024/b4/bf16/total", "ours", 8.0), ("e2e/lens/1024/b1/bf16/total", "ours", 2.5),
        ("e2e/lens/512/b1/bf16/total", "ours", 0.5), ("e2e/lens/1024/b1/bf16/total", "reference_eager", 1.0),
        ("e2e/lens/1024/b1/bf16/denoise", "ours", 1.0),
    )  # fmt: skip
    assert frontier.seconds_of(bench) == ("NVIDIA H100 SXM", 2.0)
    benchmark, points = frontier.dots([("ours", str(score), str(bench), "4.1")])
    assert (benchmark, [p.seconds for p in points]) == ("geneval", [2.0, 3.15, 0.84])
    assert [p.score for p in points] == [0.9, 0.930, 0.914]
    page = frontier.page(benchmark, points)
    assert page.count("<circle") == 3
    assert page.count('fill="none"') == 2
    assert "not the same axis" not in page
    # area by parameters: radii as the roots of 4.1 and 3.8
    radii = [float(r) for r in re.findall(r' r="([\d.]+)"', page)]
    assert radii[0] / radii[1] == pytest.approx((4.1 / 3.8) ** 0.5, rel=0.02)
    assert frontier.run(frontier_options(tmp_path, [])) == 0
    assert (
        "Lens-Turbo (4-step), paper: geneval 0.914, 0.84 s on H100, 3.8 billion parameters" in capsys.readouterr().out
    )
    with pytest.raises(ValueError, match="nothing was measured"):
        frontier.seconds_of(bench_file(tmp_path / "n.json", "x", ("e2e/lens/512/b1/bf16/total", "ours", 1.0)))
    both = bench_file(
        tmp_path / "both.json", "NVIDIA H100 SXM",
        ("e2e/lens/1024/b1/bf16/total", "ours", 3.0), ("e2e/turbo/1024/b1/bf16/total", "ours", 0.75),
    )  # fmt: skip
    with pytest.raises(ValueError, match="times of lens, turbo: say which as the fifth value of --model"):
        frontier.seconds_of(both)
    assert frontier.dots([("ours", str(score), str(both), "4.1", "lens")])[1][0].seconds == 3.0
    with pytest.raises(ValueError, match=r"no case e2e/turbo/1024/.* of our subject, only of lens"):
        frontier.seconds_of(bench, "turbo")
    with pytest.raises(ValueError, match=r"expected NAME SCORES BENCH BILLIONS \[VARIANT\], got a b"):
        frontier.dots([("a", "b")])
    chinese = scores(tmp_path / "zh.json", "geneval", replaced("ours, zh", "zh", total=0.9))
    with pytest.raises(ValueError, match=r"zh.json: ours, zh is of zh, the paper's figure 2 of English"):
        frontier.dots([("ours", str(chinese), str(bench), "4.1")])
    slow = bench_file(tmp_path / "h200.json", "NVIDIA H200", ("e2e/lens/1024/b1/bf16/total", "ours", 2.0))
    assert "not the same axis" in frontier.page(*frontier.dots([("ours", str(score), str(slow), "4.1")]))
    with pytest.raises(ValueError, match="expected one of each"):
        frontier.dots([("a", str(score), str(bench), "4"), ("b", str(score), str(slow), "4")])


def frontier_options(tmp_path, model):
    import argparse

    return argparse.Namespace(model=model, out=tmp_path / "f.html")


# ------------------------------------------------------------------------------------------------ rewrites


def test_rewrites_are_made_once_and_judged_by_the_original(tmp_path, monkeypatch):
    asks = command.limited(geneval.Geneval().asks(options(), "en"), 8)
    calls: list = []

    def reasoner(wishes):
        calls.append(list(wishes))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [
            Refused("other", "no")
            if "bench" in w
            else Refined(w, f"rich {w}", "m, geneval.v1", "" if "a" in w else "empty")
            for w in wishes
        ]

    given = options(reasoner="http://server/v1", reasoner_model="m")
    with pytest.raises(KeyboardInterrupt):
        rewrites.rewritten(given, "geneval", asks, tmp_path, reasoner)
    told = rewrites.rewritten(given, "geneval", asks, tmp_path, reasoner)
    assert [len(c) for c in calls] == [32, 16, 16]  # what was answered before is not asked again
    assert [a.prompt for a in told] == [a.prompt for a in asks]
    assert told[1].drawn == f"rich {asks[1].prompt}"
    refused = next(k for k, a in enumerate(asks) if "bench" in a.prompt)
    assert told[refused].drawn == drawing.REFUSED
    (file,) = tmp_path.glob("rewrites_*.jsonl")
    assert "geneval_v1" in file.name  # the benchmark's own system prompt, with its version
    assert json.loads(file.read_text().splitlines()[1])["source"] == "m, geneval.v1"
    assert rewrites.rewritten(given, "geneval", asks, tmp_path, reasoner) == told
    assert len(calls) == 3
    # a refusal draws nothing
    drawn: list = []
    model = drawing.Model("m", {}, 64, lambda p, s: drawn.extend(p) or [np.zeros((16, 16, 3), np.uint8)] * len(p))
    drawing.drawn(model, told, tmp_path / "i", lambda _: None)
    assert len(drawn) == 4 * sum(a.drawn != "" for a in told)


def test_rewrites_of_another_prompt_file_are_not_taken(tmp_path):
    asks = command.limited(geneval.Geneval().asks(options(), "en"), 1)
    for text in ("be short", "be long"):
        (tmp_path / text).mkdir()
        (tmp_path / text / "best.md").write_text(text)
        given = options(
            reasoner="http://x/v1", reasoner_model="m", reasoner_prompt=str(tmp_path / text / "best.md")
        )  # the name of both

        def reasoner(wishes, text=text):
            return [Refined(w, f"{text}: {w}", "m") for w in wishes]

        told = rewrites.rewritten(given, "geneval", asks, tmp_path, reasoner)
        assert {a.drawn.partition(":")[0] for a in told} == {text}
    mini = rewrites.told_to(options(reasoner="mini"), "geneval")
    assert mini == rewrites.told_to(options(reasoner="mini"), "geneval")
    assert mini != rewrites.told_to(given, "geneval")


def test_broken_answers_of_a_server_are_asked_for_again(tmp_path):
    asks = command.limited(geneval.Geneval().asks(options(), "en"), 8)
    given, calls, ill = options(reasoner="http://x/v1", reasoner_model="m"), [], 3

    def reasoner(wishes):
        first = len(calls)
        calls.extend(wishes)
        return [Refined(w, w, "m", "broken" if first + k < ill else "") for k, w in enumerate(wishes)]

    with pytest.raises(Interrupted, match=r"3 of 48 answers of http://x/v1 were broken, at most 5% may be"):
        rewrites.rewritten(given, "geneval", asks, tmp_path, reasoner)
    ill = len(calls) + 2
    rewrites.rewritten(given, "geneval", asks, tmp_path, reasoner)
    assert len(calls) == 48 + 3
    # not once images are there, which were drawn of the words as they were
    rewrites.rewritten(given, "geneval", asks, tmp_path, reasoner, begun=True)
    assert len(calls) == 51
    rewrites.rewritten(given, "geneval", asks, tmp_path, reasoner)
    assert len(calls) == 53


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reasoner": "gpt5"}, "expected none, gpt-oss, mini or the address"),
        ({"reasoner": "http://x/v1"}, "needs --reasoner-model"),
    ],
)
def test_a_reasoner_there_is_not(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        rewrites.reasoner_of(options(**given), "geneval", tmp_path)


def test_images_that_are_there_have_no_reasoner(tmp_path):
    with pytest.raises(ValueError, match="nothing to rewrite"):
        command.run(geneval.Geneval(), options(images=tmp_path, reasoner="mini"))


# ------------------------------------------------------------------------------------------------ sizes


def test_the_grid_of_sizes_by_hand():
    grid = sizes.grid_of(["1:2", "6:7", "1:1", "5:4", "2:1"], [1024])
    assert list(grid) == [(1472, 736), (1104, 944), (1024, 1024), (912, 1152), (736, 1472)]
    assert [name.endswith("unseen)") for name in grid.values()] == [False, True, False, True, False]
    small = sizes.grid_of(["6:7", "1:1"], [64])
    assert small == {(64, 64): "64x64 (6:7 1:1)"}  # one size, of which a trained ratio is a part
    alone = sizes.grid_of(["6:7", "5:4"], [128])  # the sizes of 3:4 and 4:3, though nobody asks for these
    assert alone == {(144, 112): "144x112 (6:7)", (112, 144): "112x144 (5:4)"}
    assert sizes.pooled(
        {"a": {"score": 0.5, "pictures": 10}, "b": {"score": 1.0, "pictures": 30}, "c": {"pictures": 9}}, "score"
    )[::3] == (
        35 / 40,
        40,
    )
    assert sizes.pooled({"a": {"score": None, "pictures": 10}}, "score") is None


def test_one_sheet_of_all_sizes(tmp_path):
    from PIL import Image

    from train.evaluate.sources import Source

    def draw(prompts, seeds, guidance, size):
        return [np.full((*size, 3), 40 * s, np.uint8) for s in seeds]

    source = Source("s", 64, draw, lambda p: p)
    sizes.sheet(source, sizes.grid_of(["1:2", "2:1"], [64]), ["a", "b", "c"], 3.0, tmp_path / "sheet.png")
    width, height = Image.open(tmp_path / "sheet.png").size
    assert width == 3 * 164
    assert height > 2 * 160
    assert replace(source, side=96).side == 96
