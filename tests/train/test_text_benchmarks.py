"""OneIG, LongText and CVTG: their arithmetic on texts and answers made by hand, their layouts, a judge that misbehaves."""

import argparse
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from lens.chat_client import ChatError
from tests import chat_server
from tests.train.published_judges import CARD, options
from train.evaluate.published import chat_judges, command, cvtg, drawing, judge_choice, longtext, oneig, text_match
from train.evaluate.published.chat_judges import ChatJudge, Said
from train.evaluate.published.judging import Card, Figure
from train.evaluate.published.oneig import Questions


def near(value):
    return pytest.approx(value, abs=1e-12)


# ------------------------------------------------------------------------------------------------ texts


def test_oneigs_filter_keeps_case_and_decides_by_each_string():
    assert text_match.oneig_clean("  Tea,  5!\n") == "Tea 5"
    assert text_match.oneig_clean("['Grand', 'Opening']") == "Grand Opening"
    assert text_match.oneig_clean("Ñandú Ça œuf") == "and Ça uf"  # French accents alone, and no ligature
    assert text_match.oneig_clean("欢迎 光临 ABC 1") == "欢迎光临ABC1"
    assert text_match.oneig_matches("ab ab c", "ab c c") == (2, 3)
    assert text_match.oneig_matches("欢迎光临", "光临欢") == (3, 4)
    assert text_match.oneig_matches("welcome", "欢迎") == (0, 1)


def test_oneigs_text_score_by_hand():
    # distances 0, 1 and 4; one of three exact; 2 + 0 + 1 of 2 + 1 + 2 words
    pairs = [("TEA FIVE", "TEA FIVE"), ("OPEN", "0PEN"), ("no way", "no")]
    matches = [text_match.oneig_match(*pair) for pair in pairs]
    assert matches == [(0, 2, 2), (1, 0, 1), (4, 1, 2)]
    found = text_match.oneig_text(matches, 100)
    assert found == {
        "ED": near(5 / 3),
        "CR": near(1 / 3),
        "WAC": near(3 / 5),
        "score": near(1 - 5 / 3 * (2 / 3) * (2 / 5) / 100),
    }
    assert text_match.oneig_text(matches, 50)["score"] == near(1 - 5 / 3 * (2 / 3) * (2 / 5) / 50)
    assert text_match.oneig_text([(900, 0, 1)], 100)["score"] == 0.0  # ED is capped
    assert text_match.oneig_text([(3, 0, 0)], 100) is None


def test_longtext_is_lower_case_and_chinese_by_letters():
    assert text_match.longtext_clean("Café  Münch's", "en") == "café münchs"
    assert text_match.longtext_matches("The The End", "the end, end", "en") == (2, 3)
    assert text_match.longtext_matches("你好 World", "好world 你", "zh") == (2 + 4, 7)  # W is not w
    assert longtext.pooled([(1, 1), (0, 3)]) == 0.25
    assert longtext.pooled([(0, 0)]) is None


def test_hallucinations_stay_where_the_published_code_leaves_them():
    both = "addCriterion\nHELLO No text recognized."
    assert text_match.without_hallucinations(both) == "\nHELLO "
    assert text_match.without_hallucinations(both, last_alone=True) == "addCriterion\nHELLO "
    assert text_match.without_hallucinations("No text recognized") == "No text recognized"


def test_cvtgs_words_and_their_closeness_by_hand():
    assert text_match.quoted_words("a sign 'Open Now' and 'TEA'") == ["open", "now", "tea"]
    assert text_match.quoted_words("a dog's bowl 'Rex' and its cat's") == [
        "s",
        "bowl",
        "and",
        "its",
        "cat",
    ]  # as published
    count, closeness = text_match.cvtg_words(["open", "tea", "tea"], ["OPEN sea", "now"])
    assert count == 1
    assert closeness == [near(1.0), near(1 - 1 / (3 + 1e-5)), near(1 - 1 / (3 + 1e-5))]
    assert text_match.cvtg_words(["tea", "tea"], ["tea"])[0] == 2  # a word read once serves twice
    assert text_match.cvtg_words(["tea"], [])[1] == [near(1 - 3 / (3 + 1e-5))]


# ------------------------------------------------------------------------------------------------ alignment


FAMILY = Questions({1: "a cat?", 2: "is it red?", 3: "does it run?", 4: "a hat?"}, {1: (0,), 2: (1,), 3: (2,), 4: (0,)})


@pytest.mark.parametrize(
    ("yes", "share"),
    [
        ([1, 1, 1, 1], 1.0),
        ([1, 0, 1, 1], 2 / 4),  # 3 falls with 2
        ([0, 1, 1, 0], 1 / 4),  # 2 falls with 1; 3 stands, for 2 itself was answered yes: not transitive
        ([0, 0, 0, 0], 0.0),
    ],
)
def test_dependent_questions_by_hand(yes, share):
    assert oneig.aligned(dict(zip((1, 2, 3, 4), map(float, yes))), FAMILY) == share


def test_soft_alignment_by_hand():
    chances = {1: 0.5, 2: 0.8, 3: 1.0, 4: 0.25}
    assert oneig.softly_aligned(chances, FAMILY) == near((0.5 + 0.4 + 0.8 + 0.25) / 4)


def test_grids_are_split_by_columns_and_black_cells_are_none():
    cells = [np.full((4, 6, 3), k, np.uint8) for k in (1, 2, 0, 4)]
    grid = oneig.joined([cells[0], cells[1], None, cells[3]], 2)
    assert grid.shape == (8, 12, 3)
    assert [int(c[0, 0, 0]) for c in oneig.split(grid, 2, 2)] == [1, 2, 4]
    wide = np.concatenate([cells[0], cells[1], cells[3]], 1)
    assert [c.shape for c in oneig.split(wide, 3, 1)] == [(4, 6, 3)] * 3
    assert chat_judges.as_jpeg(cells[1]).shape == (4, 6, 3)


# ------------------------------------------------------------------------------------------------ judges over HTTP


def test_only_yes_is_yes_and_probabilities_are_of_yes_and_no(tmp_path):
    def answer(call, number):
        said = "Yes" if "cat" in call.user else "yes" if "hat" in call.user else "Yes."
        top = [
            {"token": "Yes", "logprob": np.log(0.6)},
            {"token": " No", "logprob": np.log(0.2)},
            {"token": "x", "logprob": -9},
        ]
        logprobs = (
            {"content": [{"token": "Yes", "logprob": np.log(0.6), "top_logprobs": top}]}
            if call.body.get("logprobs")
            else None
        )
        return chat_server.text(said, logprobs=logprobs)

    image = np.zeros((8, 8, 3), np.uint8)
    with chat_server.serving(answer) as server:
        given = options(
            judge_url=server.url, judge_model="vlm", concurrency=2, max_calls=None, soft=True, rapidocr=False
        )
        judge = judge_choice.judge_of(given, tmp_path)
        assert judge.answer(image, ["a cat?", "a hat?", "a dog?"]) == [
            Said(True, near(0.75)),
            Said(False, near(0.75)),
            Said(False, near(0.75)),
        ]
        assert server.calls[0].user.endswith("?. Please answer 'Yes' or 'No' only.")
        before = len(server.calls)
        assert judge.answer(image, ["a cat?"])[0].yes  # out of the cache
        assert len(server.calls) == before
        assert "published judge is Qwen/Qwen2.5-VL-7B-Instruct" in judge.card.differs
        plain = ChatJudge(chat_judges.ChatClient(server.url, "vlm"))
        assert plain.answer(image, ["a cat?"]) == [Said(True, None)]
    with pytest.raises(ValueError, match="give --judge-url"):
        judge_choice.judge_of(options(judge_url=None, judge_model="vlm"), tmp_path)


@pytest.mark.parametrize(
    ("words", "finish"), [(None, "length"), ("", "stop"), (" \n", "stop"), ("a cat", "content_filter")]
)
def test_an_empty_answer_is_no_judgement_and_is_asked_for_again(tmp_path, words, finish):
    mended: list = []
    image = np.zeros((8, 8, 3), np.uint8)
    with chat_server.serving(
        lambda call, number: mended[0] if mended else chat_server.text(words, finish=finish)
    ) as server:
        given = options(
            judge_url=server.url, judge_model="vlm", concurrency=1, max_calls=None, soft=False, rapidocr=False
        )
        judge = judge_choice.judge_of(given, tmp_path)
        for (found,) in (judge.read([image], 9), judge.answer(image, ["a cat?"])):
            assert isinstance(found, ChatError)
            assert found.kind == "answer"
            assert f"finish reason '{finish}'" in str(found)
        mended.append("Yes")  # it is not in the cache
        assert judge.read([image], 9) == ["Yes"]
        assert judge.answer(image, ["a cat?"]) == [Said(True, None)]


@dataclass
class Reads:
    """Reads what `text(image)` says; an exception that it returns is a failure."""

    text: object
    card: Card = CARD
    limits: list = field(default_factory=list)

    def read(self, images, limit):
        self.limits.append(limit)
        return [self.text(image) for image in images]


def coded(number, size=8):
    return np.full((size, size, 3), number, np.uint8)


def test_longtext_counts_all_images_together(tmp_path):
    prompts = tmp_path / "p.jsonl"
    lines = [
        {"prompt_id": 0, "prompt": "a sign", "text": ["Open", "till TEN"], "category": "sign"},
        {"prompt_id": 1, "prompt": "a label", "text": ["Jam"], "category": "label"},
        {"prompt_id": 2, "prompt": "nothing", "text": ["!"], "category": "label"},
    ]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    images = tmp_path / "images"
    for name, number in (("0_0", 10), ("0_1", 20), ("1_0", 30), ("2_0", 30)):
        drawing.write_image(coded(number), images / f"{name}.png")
    said = {10: "open ten", 20: "No text recognized.", 30: "jam jar"}
    bench = longtext.LongText(Reads(lambda image: said[int(image[0, 0, 0])]))
    given = options(images=images, out=tmp_path / "out", prompts=prompts, rapidocr=True)
    assert command.run(bench, given) == 0
    column = json.loads((tmp_path / "out" / "scores.json").read_text())["columns"][0]
    # (2 + 0 + 1) of (3 + 3 + 1) words; the third target has no letter
    assert column["figures"]["total"]["value"] == near(3 / 7)
    assert column["figures"]["sign"]["value"] == near(2 / 6)
    assert column["figures"]["mean of images"]["value"] == near((2 / 3 + 0 + 1) / 3)
    assert column["figures"]["empty targets"]["value"] == 1
    assert column["judged"] == 4
    page = (tmp_path / "out" / "index.html").read_text()
    assert "0.937" in page
    for text in ("[3]", '"abc"'):
        prompts.write_text(f'{{"prompt_id": 0, "prompt": "a", "text": {text}}}\n')
        with pytest.raises(ValueError, match=r"p.jsonl, line 1: expected prompt_id"):
            longtext.prompts_of(prompts)


def test_longtexts_images_are_found_by_the_number_in_their_names(tmp_path):
    prompts = tmp_path / "p.jsonl"
    lines = [{"prompt_id": k, "prompt": "a sign", "text": ["Open"]} for k in (1, 12, 3)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("0001_0", "0001_1", "12_0", "12_1", "grid", "7_0"):
        drawing.write_image(coded(10), tmp_path / "images" / f"{name}.png")
    bench = longtext.LongText(Reads(lambda image: "open"))
    given = options(images=tmp_path / "images", prompts=prompts)
    asks = bench.asks(given, "en")
    # a prompt without any counts as many as the others have
    assert [a.files for a in asks] == [("0001_0.png", "0001_1.png"), ("12_0.png", "12_1.png"), ("3_0.png", "3_1.png")]
    column = bench.score(given, asks, tmp_path / "images", "c", "en")
    assert (column.judged, column.missing) == (6, 2)


@pytest.mark.parametrize("module", [longtext, cvtg])
def test_there_is_nothing_soft_about_a_reading(module, capsys):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    asked = ["--prompts", "p", "--model", "mini"]
    assert parser.parse_args(asked).soft is False
    with pytest.raises(SystemExit):
        parser.parse_args([*asked, "--soft"])
    with pytest.raises(ValueError, match="--max-calls bounds calls to a server: with --rapidocr"):
        judge_choice.reader_of(parser.parse_args([*asked, "--rapidocr", "--max-calls", "3"]), Path("out"))


class Similar:
    card = Card("clip", "1", "float32", "cpu")

    def __init__(self):
        self.asked = []

    def similarity(self, image, text):
        self.asked.append(text)
        return float(image[0, 0, 0]) / 100 - 0.2


def test_cvtg_is_micro_averaged_and_its_areas_are_of_both_parts(tmp_path):
    for part in cvtg.PARTS:
        for area in cvtg.AREAS:
            file = tmp_path / "set" / part / f"{area}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            prompt = f"{part} " + " and ".join(f"'w{k}'" for k in range(area))
            file.write_text(json.dumps({"data_list": [{"index": 0, "prompt": prompt}]}))
            number = {"CVTG": 40, "CVTG-Style": 10}[part]
            drawing.write_image(coded(number), tmp_path / "images" / part / str(area) / "0.png")
    # the plain part reads all words, the styled one the first alone
    bench = cvtg.Cvtg(Reads(lambda image: "W0 w1\nw2 w3 w4" if image[0, 0, 0] == 40 else "w0"), clip := Similar())
    given = options(
        images=tmp_path / "images", out=tmp_path / "out", prompts=tmp_path / "set", rapidocr=True, no_clip=False
    )
    assert command.run(bench, given) == 0
    figures = json.loads((tmp_path / "out" / "scores.json").read_text())["columns"][0]["figures"]
    areas = [(k + 1) / (2 * k) for k in cvtg.AREAS]
    assert [figures[f"{k}R"]["value"] for k in cvtg.AREAS] == near(areas)
    assert figures["total"]["value"] == near((14 + 4) / 28)
    assert figures["mean of areas"]["value"] == near(sum(areas) / 4)
    # of the styled part each word but the first is one letter of two away
    assert figures["NED"]["value"] == near((14 + 4 + 10 * (1 - 1 / (2 + 1e-5))) / 28)
    assert figures["CLIPScore"]["value"] == near((2.5 * 0.2 + 0) / 2)  # below 0 counts as 0
    assert clip.asked[0].startswith("A photo depicts CVTG 'w0'")
    # a dead CLIP is no figure, and no traceback
    given.out, bench = tmp_path / "dead", cvtg.Cvtg(bench.reader, dead := Dead())
    assert command.run(bench, given) == 1
    figures = json.loads((tmp_path / "dead" / "scores.json").read_text())["columns"][0]["figures"]
    assert "no figure" in figures["CLIPScore"]["note"]
    assert figures["mean of areas"]["value"] == near(sum(areas) / 4)
    assert dead.calls == 1
    (tmp_path / "set" / "CVTG" / "2.json").write_text("{}")
    with pytest.raises(ValueError, match="expected data_list"):
        bench.asks(given, "en")


def oneig_copy(folder, categories):
    """A small copy of the repository: one prompt a category, two questions each, one text."""
    names = {short: long for long, short in oneig.CATEGORIES.items()}
    lines = ["category,id,prompt_en,type,prompt_length,class"]
    lines += [f"{names[c]},00{k},a {c},NP,short,None" for k, c in enumerate(categories)]
    (folder / "scripts" / "alignment" / "Q_D").mkdir(parents=True)
    (folder / "scripts" / "text").mkdir()
    (folder / "OneIG-Bench.csv").write_text("\n".join(lines) + "\n")
    for k, category in enumerate(categories):
        item = {"question": json.dumps({"1": "is it there?", "2": "is it red?"}), "dependency": {"1": [0], "2": [1]}}
        (folder / "scripts" / "alignment" / "Q_D" / f"{category}.json").write_text(json.dumps({f"00{k}": item}))
    (folder / "scripts" / "style").mkdir()
    (folder / "scripts" / "style" / "style.csv").write_text(",id,class\n0,000,Pop Art\n1,001,\n2,002,baroque\n")
    index = categories.index("text")
    (folder / "scripts" / "text" / "text_content.csv").write_text(f"id,text_content\n00{index},\"['Grand', 'Tea']\"\n")


class Answers:
    """Of an image the brightness says what is answered: below 100 only the second question, else both."""

    card = CARD

    def __init__(self, failing=()):
        self.failing, self.calls = failing, 0

    def answer(self, image, questions):
        self.calls += 1
        if self.calls in self.failing:
            return [RuntimeError("timeout"), Said(True, 1.0)]
        return [Said(bool(image.mean() > 100), 0.5), Said(True, 1.0)]


def oneig_options(tmp_path, **given):
    values = dict(
        out=tmp_path / "out",
        prompts=tmp_path / "copy",
        grid=2,
        dimensions=list(oneig.DIMENSIONS),
        dreamsim=True,
        judged=None,
        csd=None,
        style_encoder=None,
    )
    return options(**values, soft=True, rapidocr=False, **given)


class Apart:
    card = Card("distance", "1", "float32", "cpu")

    def distance(self, one, two):
        return abs(float(one.mean()) - float(two.mean())) / 100


def test_oneigs_five_dimensions_by_hand(tmp_path):
    oneig_copy(tmp_path / "copy", ["anime", "object", "text", "reasoning"])
    grids = {
        "anime/m/000": [200, 50, 0, 0],
        "object/m/001": [200, 200, 200, 200],
        "text/m/002": [200, 100, 0, 0],
        "reasoning/m/003": [200, 0, 0, 0],
    }
    for name, levels in grids.items():
        drawing.write_image(oneig.joined([coded(v, 16) for v in levels], 2), tmp_path / "images" / f"{name}.webp")
    judged = tmp_path / "elsewhere.jsonl"
    judged.write_text(
        '{"dimension": "style", "id": "000", "values": [0.2, 0.4]}\n{"dimension": "reasoning", "id": "003", "values": [0.25]}\n'
    )
    reader = Reads(lambda image: "Grand Tea" if image.mean() > 150 else "Grand Te")
    given = oneig_options(tmp_path, images=tmp_path / "images", name="m")
    given.judged = judged
    bench = oneig.OneIG(Answers(), reader, Apart())
    assert command.run(bench, given) == 0
    figures = json.loads((tmp_path / "out" / "scores.json").read_text())["columns"][0]["figures"]
    # anime: bright 2 of 2, dark: the first no, so the second falls: 0; object: 1; text is not asked
    assert figures["alignment"]["value"] == near((0.5 + 1.0) / 2)
    assert figures["alignment, soft"]["value"] == near((0.5 + 0.5) / 2)
    # text: one exact of two, distance 1, 2 + 1 of 4 words
    assert figures["text"]["value"] == near(1 - 0.5 * 0.5 * 0.25 / 100)
    assert figures["style"]["value"] == near(0.3)
    # distances: anime 1.5, object 0, text 1.0
    assert figures["diversity"]["value"] == pytest.approx(2.5 / 3, abs=0.02)
    parts = [figures[d]["value"] for d in oneig.DIMENSIONS]
    assert figures["total"]["value"] == near(sum(parts) / 5)
    assert reader.limits == [128]
    # what is not measured leaves the total blank
    given.judged, given.out = None, tmp_path / "out2"
    command.run(oneig.OneIG(Answers(), reader, Apart()), given)
    blank = json.loads((tmp_path / "out2" / "scores.json").read_text())["columns"][0]["figures"]
    assert blank["total"]["value"] is None
    assert "LLM2CLIP" in blank["reasoning"]["note"]


def test_a_judge_that_misbehaves_leaves_no_total(tmp_path):
    oneig_copy(tmp_path / "copy", ["anime", "text"])
    drawing.write_image(oneig.joined([coded(200, 16)] * 4, 2), tmp_path / "images" / "anime" / "m" / "000.webp")
    given = oneig_options(tmp_path, images=tmp_path / "images")
    given.dimensions = ["alignment"]
    bench = oneig.OneIG(Answers(failing=(2,)))
    assert command.run(bench, given) == 1
    column = json.loads((tmp_path / "out" / "scores.json").read_text())["columns"][0]
    assert (column["missing"], column["judged"]) == (1, 8)
    assert column["figures"]["alignment"]["note"] == "no figure: 1 of 8 judgements missing"
    assert column["figures"]["total"]["note"] == "no total: alignment: 1 of 8 judgements missing"
    row = json.loads((tmp_path / "out" / "rows_images.jsonl").read_text().splitlines()[0])
    assert row["score"] == 1.0  # of the three images with all answers


def oneig_grids(tmp_path, number, category):
    """A copy with so many prompts of a category, each with a grid of two bright cells."""
    oneig_copy(tmp_path / "copy", [category, "text"])
    names = {short: long for long, short in oneig.CATEGORIES.items()}
    ids = [f"{k:03d}" for k in range(number)]
    lines = [f"{names[category]},{key},a {category},NP,short,None" for key in ids]
    (tmp_path / "copy" / "OneIG-Bench.csv").write_text("\n".join(["category,id,prompt_en", *lines]) + "\n")
    item = {"question": {"1": "is it there?", "2": "is it red?"}, "dependency": {"1": [0], "2": [1]}}
    path = tmp_path / "copy" / "scripts" / "alignment" / "Q_D" / f"{category}.json"
    path.write_text(json.dumps(dict.fromkeys(ids, item)))
    (tmp_path / "copy" / "scripts" / "style" / "style.csv").write_text(
        "id,class\n" + "".join(f"{key},Pop Art\n" for key in ids)
    )
    (tmp_path / "copy" / "scripts" / "text" / "text_content.csv").write_text(
        "id,text_content\n" + "".join(f"{key},\"['Tea']\"\n" for key in ids)
    )
    for key in ids:
        grid = oneig.joined([coded(200, 16), coded(100, 16), None, None], 2)
        drawing.write_image(grid, tmp_path / "images" / category / "m" / f"{key}.webp")


class Dead:
    """Every judge in one, all of them dead."""

    card, cards = CARD, (CARD,)

    def __init__(self):
        self.calls = 0

    def fails(self, *_):
        self.calls += 1
        raise RuntimeError("out of memory")

    scores = distance = similarity = fails

    def answer(self, image, questions):
        self.calls += 1
        return [RuntimeError("timeout") for _ in questions]


@pytest.mark.parametrize(
    ("dimension", "category", "who"),
    [("alignment", "object", "answerer"), ("style", "anime", "styles"), ("diversity", "anime", "distance")],
)
def test_a_dead_judge_ends_its_dimension_early(tmp_path, dimension, category, who):
    oneig_grids(tmp_path, 40, category)
    given = oneig_options(tmp_path, images=tmp_path / "images")
    given.dimensions = [dimension]
    bench = oneig.OneIG(**{who: (dead := Dead())})
    column = command.closed(bench.score(given, bench.asks(given, "en"), tmp_path / "images", "c", "en"))
    assert 0 < dead.calls < 40
    assert (column.counts[dimension].stopped, column.complete) == (True, False)
    assert "the rest not made" in column.figures[dimension].note


def test_each_dimension_of_oneig_counts_its_own(tmp_path):
    """All of few readings fail beside many answers that are there: no total. Answers that fail keep no text from being read."""
    oneig_grids(tmp_path, 40, "object")
    with (tmp_path / "copy" / "OneIG-Bench.csv").open("a") as file:
        file.write("Text_Rendering,000,a text\n")
    drawing.write_image(oneig.joined([coded(200, 16)] * 4, 2), tmp_path / "images" / "text" / "m" / "000.webp")
    given = oneig_options(tmp_path, images=tmp_path / "images")
    given.dimensions = ["alignment", "text"]
    bench = oneig.OneIG(Answers(), Reads(lambda image: RuntimeError("timeout")))
    column = command.closed(bench.score(given, bench.asks(given, "en"), tmp_path / "images", "c", "en"))
    assert (column.missing, column.judged, column.complete) == (4, 164, False)  # 2.4 % of all
    assert column.figures["alignment"].value is not None
    assert column.figures["text"].note == "no figure: 4 of 4 judgements missing"
    bench = oneig.OneIG(Answers(failing=(1, 2, 3)), reader := Reads(lambda image: "Tea"))
    column = command.closed(bench.score(given, bench.asks(given, "en"), tmp_path / "images", "c", "en"))
    assert (len(reader.limits), column.counts["text"].judged, column.complete) == (1, 4, True)
    # a prompt without images counts as four
    (tmp_path / "images" / "text" / "m" / "000.webp").unlink()
    (tmp_path / "images" / "object" / "m" / "000.webp").unlink()
    given.dimensions = list(oneig.DIMENSIONS)
    bench = oneig.OneIG(Answers(), Reads(lambda image: "Tea"), Apart())
    column = bench.score(given, bench.asks(given, "en"), tmp_path / "images", "c", "en")
    assert {name: count.missing for name, count in column.counts.items()} == {
        "alignment": 4 * 2,
        "text": 4,
        "diversity": 2 * 6,
    }


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"dimension": "diversity", "id": "000", "values": [0.1]}, "diversity needs a category"),
        ({"dimension": "diversity", "category": "anime", "id": "777", "values": [0.1]}, "no prompt anime/777"),
        ({"dimension": "style", "id": "001", "values": [0.1]}, "no prompt anime/001"),  # names no style
        ({"dimension": "style", "category": "object", "id": "001", "values": [0.1]}, "no prompt object/001"),
        ({"dimension": "style", "id": "000", "values": ["nan"]}, "finite numbers"),
        ({"dimension": "style", "id": "000", "values": [True]}, "finite numbers"),
        ({"dimension": "style", "id": "000", "values": [float("nan")]}, ""),
        ({"dimension": "style", "id": "000", "values": "0.5"}, "finite numbers"),
        ({"dimension": "reasoning", "id": "003", "values": [0.5]}, "reasoning/003 a second time"),
    ],
)
def test_values_of_elsewhere_are_of_one_prompt_each(tmp_path, line, words):
    oneig_copy(tmp_path / "copy", ["anime", "object", "text", "reasoning"])
    given = oneig_options(tmp_path, images=tmp_path, name="m")
    given.judged, given.dreamsim = tmp_path / "j.jsonl", False
    good = [
        {"dimension": "reasoning", "id": "003", "values": [0.5]},
        {"dimension": "diversity", "category": "Anime_Stylization", "id": "000", "values": [0.25]},
        {"dimension": "diversity", "category": "object", "id": "001", "values": [0.75]},
    ]
    given.judged.write_text("".join(json.dumps(one) + "\n" for one in good))
    given.dimensions = ["reasoning", "diversity"]
    bench = oneig.OneIG()
    column = bench.score(given, bench.asks(given, "en"), tmp_path, "c", "en")
    assert column.figures["diversity"].value == 0.5
    counts = column.counts
    assert [(counts[d].judged, counts[d].missing) for d in given.dimensions] == [(1, 0), (4, 2)]
    assert not column.complete
    given.dimensions = ["reasoning"]
    column = bench.score(given, bench.asks(given, "en"), tmp_path, "c", "en")
    assert (column.figures["diversity"].note, list(column.counts)) == ("not asked for", ["reasoning"])
    given.dimensions = list(oneig.DIMENSIONS)
    given.judged.write_text("".join(json.dumps(one) + "\n" for one in [*good, line]))
    with pytest.raises(ValueError, match=r"j.jsonl, line 4: .*" + words):
        bench.prepare(given)


@pytest.mark.parametrize("more", [{"language": ["en", "zh"]}, {"reasoner": "mini"}])
def test_values_of_elsewhere_are_of_one_column(tmp_path, more):
    given = oneig_options(tmp_path, model="mini", **more)
    given.judged = tmp_path / "j.jsonl"
    with pytest.raises(ValueError, match="--judged has the values of one column"):
        oneig.OneIG().prepare(given)


def test_questions_are_counted_in_each_language(tmp_path, capsys):
    oneig_copy(tmp_path / "copy", ["anime", "object", "text"])
    (tmp_path / "copy" / "OneIG-Bench-ZH.csv").write_text("category,id,prompt_cn\nMultilingualism,000,a\n")
    item = {"000": {"question": {"1": "is it there?"}, "dependency": {"1": [0]}}}
    folder = tmp_path / "copy" / "scripts" / "alignment" / "Q_D"
    (folder / "multilingualism_zh.json").write_text(json.dumps(item))
    given = oneig_options(tmp_path, model="mini", language=["en", "zh"], dry_run=True)
    assert command.run(oneig.OneIG(), given) == 0
    text = capsys.readouterr().out
    assert re.search(rf"questions +{(2 + 2 + 1) * 4} judgements", text)
    assert re.search(r"reader +4 judgements", text)


def test_drawn_images_become_grids(tmp_path):
    oneig_copy(tmp_path / "copy", ["anime", "text"])
    bench, given = oneig.OneIG(), oneig_options(tmp_path)
    asks = bench.asks(given, "en")
    assert asks[0].files == tuple(f"single/anime/000_{k}.png" for k in range(4))
    assert asks[0].seeds == (42, 43, 44, 45)
    for k, file in enumerate(asks[0].files[:3]):
        drawing.write_image(coded(50 + k, 16), tmp_path / "i" / file)
    bench.arrange(given, asks, tmp_path / "i")
    assert (tmp_path / "i" / "anime" / "lens" / "000.webp").is_file()
    assert [round(float(c.mean())) for c in bench.cells(given, asks[0], tmp_path / "i")] == [50, 51, 52]
    assert bench.calls(given, asks, "en")[0].number == 2 * 4


def test_intervals_are_of_always_the_same_draws():
    rows = [(k % 3, 3) for k in range(30)]
    one = longtext.bootstrapped(rows, longtext.pooled)
    assert one == longtext.bootstrapped(rows, longtext.pooled)
    spread = np.std([k % 3 / 3 for k in range(30)]) / np.sqrt(30)
    assert (one.high - one.low) / 2 == pytest.approx(1.96 * spread, rel=0.1)
    assert longtext.bootstrapped([], longtext.pooled) == Figure(None, note="nothing judged")
