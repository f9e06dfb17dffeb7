"""OneIG, LongText and CVTG: their arithmetic on texts and answers made by hand, their layouts, a judge that misbehaves."""

import json
from dataclasses import dataclass, field

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
    prompts.write_text('{"prompt_id": 0, "prompt": "a", "text": [3]}\n')
    with pytest.raises(ValueError, match=r"p.jsonl, line 1: expected prompt_id"):
        longtext.prompts_of(prompts)


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
    oneig_copy(tmp_path / "copy", ["anime", "object", "text"])
    grids = {"anime/m/000": [200, 50, 0, 0], "object/m/001": [200, 200, 200, 200], "text/m/002": [200, 100, 0, 0]}
    for name, levels in grids.items():
        drawing.write_image(oneig.joined([coded(v, 16) for v in levels], 2), tmp_path / "images" / f"{name}.webp")
    judged = tmp_path / "elsewhere.jsonl"
    judged.write_text(
        '{"dimension": "style", "id": "000", "values": [0.2, 0.4]}\n{"dimension": "reasoning", "id": "9", "values": [0.25]}\n'
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
    assert column["figures"]["alignment"]["value"] == 1.0  # of the three images with all answers
    assert "no total" in column["figures"]["total"]["note"]


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
    assert bench.calls(given, asks)[0].number == 2 * 4


def test_intervals_are_of_always_the_same_draws():
    rows = [(k % 3, 3) for k in range(30)]
    one = longtext.bootstrapped(rows, longtext.pooled)
    assert one == longtext.bootstrapped(rows, longtext.pooled)
    spread = np.std([k % 3 / 3 for k in range(30)]) / np.sqrt(30)
    assert (one.high - one.low) / 2 == pytest.approx(1.96 * spread, rel=0.1)
    assert longtext.bootstrapped([], longtext.pooled) == Figure(None, note="nothing judged")
