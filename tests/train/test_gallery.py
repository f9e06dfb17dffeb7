"""The gallery's page: well-formed, escaped, complete; its numbers are the score file's; failures stay in."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from lens.image_file import read_recipe
from train.__main__ import main
from train.data.small_world.world import World
from train.evaluate import gallery, gallery_page, mini_bench, ocr
from train.evaluate.detector import SIGN
from train.evaluate.gallery_page import (
    Card,
    Class,
    Page,
    Share,
    StageLog,
    Task,
    curve,
    facts,
    lines,
    render,
    tally,
    tick,
)
from train.evaluate.geneval import Detection
from train.evaluate.scores import read_scores
from train.evaluate.sources import Source

NASTY = """a "red" <script>alert('x')</script> & a 'blue' one"""
EMPTY = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Tree(HTMLParser):
    """Tags in order; refuses what does not nest."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text, self.at = [], [], [], {}
        self.feed(text)
        self.close()
        assert self.open == [], "left open"

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), f"attribute twice in {tag}"
        self.tags.append((tag, dict(attributes)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.text.append(data)

    def every(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def card(prompt="a red apple", seed=0, right=True, reason="", language="en", label=""):
    out = io.BytesIO()
    Image.new("RGB", (64, 64), (seed, 0, 0)).save(out, "PNG")
    return Card(prompt, seed, out.getvalue(), (64, 64), right, reason, language, label)


def page(**changes):
    about = {
        "name": "Lens-Mini", "parameters": "1 million", "megabytes": 2, "classes": 2, "side": (64, 64), "steps": 20,
        "guidance": "3", "fingerprint": "0123456789abcdef", "version": "1", "pictures": 3, "seconds": 4, "threads": 1,
    }  # fmt: skip
    shares = {"3": Share(0.5, 0.123, 0.877, 40), "vae": None}
    parts = {
        "model": about,
        "classes": [
            Class("key", card("a key", right=False, reason="key: 1 asked for, 0 seen"), Share(0.25, 0.1, 0.4, 20))
        ],
        "tasks": [Task("counting", "so many of a kind", [card(NASTY, 0), card("two", 1, False, NASTY)], shares, "3")],
        "columns": [("3", "guidance 3"), ("vae", "VAE ceiling")],
        "means": [("guidance 3", ["0.111", "0.222", "0.333", "0.444"])],
        "numbers": [("5", Share(0.25, 0.1, 0.4, 8), Share(0.125, 0.02, 0.47, 8))],
        "class_sheet": replace(card("every class"), size=(64, 64)),
        "guidance": [(NASTY, [card(NASTY, label=f"guidance {g}") for g in (1, 3, 5)])],
        "sizes": [("a key", [card("a key", label=f"{n} by {n} pixels") for n in (64, 96, 128)])],
        "languages": [card("一个苹果", language="zh"), card("une pomme", language="fr")],
        "dense": [card("long " * 60)],
        "signs": [card('a sign that says "TEA"', right=None, reason="no reader")],
        "stages": [
            StageLog("pretrain", [("steps", "3")], {"loss": [(1, 2.0), (2, 0.5), (3, 0.25)]}, ("mini/x.py", NASTY))
        ],
        "notes": ["by a judge"],
        "commands": ["make gallery"],
    }
    return Page(**{**parts, **changes})


def test_page_is_well_formed_and_every_text_is_escaped():
    text = render(page())
    tree = Tree(text)
    assert "<script" not in text
    assert tree.words.count(NASTY) == 4  # prompt, reason, heading of the strengths, recipe
    assert {a["alt"] for a in tree.every("img")} >= {NASTY, "a key", "une pomme"}
    assert {a["lang"] for a in tree.every("p") if "lang" in a} == {"en", "zh", "fr"}
    ids = [a["id"] for _, a in tree.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in tree.tags:
        assert attributes.get("aria-labelledby", ids[0]) in ids
        if attributes.get("href", "").startswith("#"):
            assert attributes["href"][1:] in ids


def test_nothing_is_fetched_and_every_picture_is_inside():
    text = render(page())
    for tag, attributes in Tree(text).tags:
        assert tag not in ("script", "iframe", "object", "embed")
        for name in ("src", "href", "action", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    assert "url(" not in text
    assert "@import" not in text
    for image in Tree(text).every("img"):
        kind, data = image["src"].split(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.size == (int(image["width"]), int(image["height"])) == (64, 64)


def test_sections_without_pictures_are_left_out_with_their_links():
    tree = Tree(render(page(languages=[], dense=[], signs=[])))
    links = {a["href"] for a in tree.every("a")}
    assert links == {"#tasks", "#classes", "#shapes", "#sizes", "#guidance", "#scores", "#made"}


def test_failures_and_the_unjudged_are_said():
    tree = Tree(render(page()))
    kinds = [a["class"] for a in tree.every("figure") if "card" in a["class"]]
    assert kinds.count("card wrong") == 2
    assert kinds.count("card unjudged") == 1
    assert "✗ wrong: key: 1 asked for, 0 seen" in tree.words
    assert "1 of 2 right here" in tree.words
    assert tally([card(right=None)]) == "1 not judged"
    assert tally([card(), card(right=False), card(right=None)]) == "1 of 2 right, 1 not judged"


def test_an_unknown_name_in_the_template_is_an_error():
    with pytest.raises(gallery_page.jinja2.UndefinedError):
        render(page(model={"name": "Lens-Mini"}))


@pytest.mark.parametrize("largest", [0.013, 0.9, 1.0, 7, 199, 23_000, 1e6])
def test_ticks(largest):
    step = tick(largest)
    assert 2 <= largest / step <= 6
    assert f"{step:e}"[0] in "125"


def test_curve_keeps_ends_and_scale():
    points = [(s, 3.0 if s < 10 else 1 / s + 0.2) for s in range(1, 1001)]
    drawn = curve({"loss": points})
    xy = [tuple(map(float, p.split(","))) for p in drawn["lines"][0]["points"].split()]
    _, top, right, bottom = drawn["frame"]
    assert len(xy) < 300
    assert xy[-1][0] == right
    assert all(x <= right and y <= bottom for x, y in xy)
    assert xy[0][1] < top < xy[-1][1]  # the start leaves the picture at its top, the end lies within
    assert drawn["lines"][0]["last"] == points[-1][1]


def test_log_facts_over_sittings_and_a_repeated_step():
    rows = [
        {"step": 10, "loss": 2.0, "rate": 5.0, "seconds": 60.0},
        {"step": 20, "loss": 1.0, "rate": 5.0, "seconds": 120.0},
        {"step": 20, "loss": 0.9, "samples": 300.0, "seconds": 30.0, "text_explains": 0.6},
        {"step": 1500, "loss": float("nan"), "samples": 600.0, "seconds": 60.0},
    ]
    assert facts(rows) == [
        ("steps", "1,500"),
        ("samples", "1,200"),
        ("minutes", "3"),
        ("of the loss explained by text", "0.6"),
    ]
    assert lines(rows) == {"training loss": [(10, 2.0), (20, 0.9)]}
    assert facts([]) == []


# ------------------------------------------------------------------------------------------------ scores


CLASSES = ["apple", "car", "key", "book", "star", "heart"]


def file_of(**changes):
    """A score file as mini-bench writes it; scores differ from task to task."""

    def rows(base):
        return {
            task: {
                "score": base + i / 100,
                "low": base - 0.1,
                "high": base + 0.123,
                "audit": 0.1 + i / 100,
                "said": base + i / 100 - 0.05,
                "shape": base + i / 100 - 0.15,
                "soft": base + i / 100 - 0.2,
                "distance": 0.05 + i / 100,
                "pictures": 40,
            }
            for i, task in enumerate(gallery.ASKS)
        }

    strengths = {"1": rows(0.401), "3": rows(0.612), "5": rows(0.513)}
    strengths["3"]["text"] = {
        **{"not_measured": "no reader", "objects": 0.5, "audit": None, "pictures": 40},
        **{"shape": None, "soft": 0.31, "distance": None},
    }
    strengths["3"]["counting"]["numbers"] = {n: {"pictures": 10, "score": 9, "shape": 7} for n in "2345"}
    names = ("score", "shape", "soft", "distance")
    means = {n: {k: 0.9 - i / 10 for i, k in enumerate(names)} for n in (*strengths, "render", "vae")}
    per_class = {"3": {kind: {"asked": 20, "found": 20 - 3 * i} for i, kind in enumerate(CLASSES[:5])}}
    settings = {"classes": CLASSES, "captions": "geneval", "steps": 2, "side": 64, "per_task": 40, "model": "fake"}
    whole = {"settings": settings, "guidance": strengths, "ceilings": {"render": rows(0.87), "vae": rows(0.713)}}
    whole["means"] = means
    return {**whole, "per_class": per_class, **changes}


def write(path, values):
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def test_scores_are_read(tmp_path):
    scores = read_scores(write(tmp_path / "scores.json", file_of()), list(gallery.ASKS), 3.0)
    assert [key for key, _ in scores.columns] == [
        *("1", "3", "5", "said", "audit", "shape", "soft", "distance", "vae", "render")
    ]
    assert scores.tasks["text"]["3"] is None
    assert scores.tasks["text"]["audit"] is None
    assert str(scores.tasks["two_object"]["3"]) == "0.622"
    said = scores.tasks["position"]["said"]
    assert said.value == pytest.approx(0.602)
    assert said.low < 0.602 < said.high
    assert scores.tasks["position"]["shape"].value == pytest.approx(0.502)
    assert scores.tasks["position"]["distance"].value == pytest.approx(0.09)
    assert scores.tasks["text"]["shape"] is None
    assert {n: (s["score"].value, s["shape"].value, s["shape"].of) for n, s in scores.numbers.items()} == dict.fromkeys(
        "2345", (0.9, 0.7, 10)
    )
    assert scores.means["vae"]["shape"] == 0.8
    assert scores.classes["book"].value == 0.55
    assert scores.classes["book"].low < 0.55 < scores.classes["book"].high


def broken(*path, value=None):
    values = file_of()
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return values


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ("{", "not JSON"),
        ("[]", "guidance must be there"),
        ({"settings": {}, "tasks": {"single": {"whole": 1.0}}}, "guidance must be there"),
        (broken("guidance", "3"), "'3', the model's own strength"),
        (broken("guidance", "5", "row"), "guidance.5.row must be there"),
        (broken("guidance", "3", "row", "low"), "guidance.3.row.low must be there"),
        (broken("guidance", "3", "row", "score", value="0.5"), "guidance.3.row.score must be a number"),
        (broken("guidance", "3", "row", "score", value=0.99), "a share within its interval"),
        (broken("guidance", "3", "row", "pictures", value=True), "pictures must be a whole number"),
        (broken("ceilings", "vae"), "ceilings.vae must be there"),
        (broken("per_class", "3", "key", "found", value=21), "found of asked"),
        (broken("settings", "classes", value=6), "settings.classes must be a list"),
        (broken("guidance", "3", "row", "shape"), "guidance.3.row.shape must be there"),
        (broken("guidance", "3", "row", "distance", value=1.5), "guidance.3.row.distance must be a number from 0 to 1"),
        (broken("guidance", "3", "counting", "numbers"), "guidance.3.counting.numbers must be there"),
        (broken("guidance", "3", "counting", "numbers", "5", "shape", value=11), "shape of pictures"),
        (broken("means"), "means must be there"),
    ],
)
def test_a_score_file_of_another_form_is_refused(tmp_path, values, match):
    with pytest.raises(ValueError, match=match) as error:
        read_scores(write(tmp_path / "scores.json", values), list(gallery.ASKS), 3.0)
    assert "scores.json" in str(error.value)


def test_a_missing_score_file_names_what_writes_it(tmp_path):
    with pytest.raises(ValueError, match="mini-bench"):
        read_scores(tmp_path / "scores.json", ["row"], 3.0)


# ------------------------------------------------------------------------------------------------ the whole way


class Pipe:
    """Draws grey; remembers what it was asked."""

    dtype, fingerprint = "torch.float32", "f" * 64

    class defaults:
        variant = "lens"

    def __init__(self):
        self.asked = []

    def __call__(self, prompts, seed, num_inference_steps, guidance_scale, height, width):
        self.asked += [(p, s, guidance_scale, (height, width)) for p, s in zip(prompts, seed, strict=True)]
        self.images = [Image.new("RGB", (width, height), (s % 256, 99, 99)) for s in seed]
        return self


class Judges:
    """Finds in every second picture what its scene holds, in the others nothing; reads "NO"."""

    reader = object()

    def __init__(self, scenes):
        self.scenes, self.detector = sorted(scenes, key=lambda s: (s.height, s.width)), self

    def look(self, pictures):
        own, self.scenes = self.scenes[: len(pictures)], self.scenes[len(pictures) :]
        assert {p.shape[:2] for p in pictures} == {(s.height, s.width) for s in own}
        return [
            [Detection(t.kind, 0.9, t.box, t.colour) for t in s.things]
            + ([Detection(SIGN, 0.9, s.sign.box)] if s.sign else [])
            if i % 2
            else []
            for i, s in enumerate(own)
        ]

    def read(self, picture, seen):
        return "NO"


def test_from_scores_to_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gallery, "SIGNS", 12)
    scores = read_scores(write(tmp_path / "scores.json", file_of()), list(gallery.ASKS), 3.0)
    wanted = gallery.contents(scores.settings, 2, 3.0)
    wishes, pipe = gallery.flat(wanted), Pipe()
    made = gallery.draw_wishes(pipe, wishes, "mini", 2)
    assert len(pipe.asked) == len(set(pipe.asked)) == len({(w.prompt, w.seed, w.guidance, w.size) for w in wishes})
    assert {made[w][0].shape[:2] for w in gallery.flat(wanted["sizes"])} == {(n, n) for n in (64, 96, 128)}
    assert "pictures" in capsys.readouterr().err
    assert {task: [w.seed for w in of] for task, of in wanted["tasks"].items()} == {t: [0, 1] for t in gallery.ASKS}
    unique = list(dict.fromkeys(wishes))
    words = gallery.verdicts(Judges([w.scene for w in unique]), wishes, made)
    signs = [words[w] for w in unique if w.scene.sign]
    assert all(right is False for right, _ in signs)
    assert any(f"“{w.scene.sign.text}” asked, “NO” read" in words[w][1] for w in wanted["signs"])
    assert {right for right, _ in words.values()} == {True, False}

    about = page().model
    tree = Tree(
        render(
            gallery.assemble(
                wanted,
                made,
                words,
                scores,
                model=about,
                stages=[],
                notes=[],
                commands=[],
                class_sheet=card("every class"),
            )
        )
    )
    assert [a["alt"] for a in tree.every("img") if a.get("class") == "sheet"] == ["every class"]
    assert "0.800" in tree.words  # the mean by the shape judge
    assert "0.700" in tree.words  # counting by it
    kinds = [a["class"] for a in tree.every("figure")]
    assert kinds.count("card wrong") == sum(not words[w][0] for w in wishes)
    assert kinds.count("card right") == sum(bool(words[w][0]) for w in wishes)
    assert [a["alt"] for a in tree.every("img")][:4] == [
        w.prompt for t in list(wanted["tasks"])[:2] for w in wanted["tasks"][t]
    ]
    assert {a["lang"] for a in tree.every("p") if "lang" in a} == set(gallery.SPOKEN)

    order = tree.words[tree.words.index("Every class, worst first") :]
    places = {kind: re.search(rf"\b{kind} a photo of", order).start() for kind in CLASSES}
    assert sorted(places, key=places.get) == [*reversed(CLASSES[:5]), "heart"]  # the class without a score comes last

    for task in gallery.ASKS:  # the table's numbers are the file's
        for column, share in scores.tasks[task].items():
            assert share is None or f"{share.value:.3f}" in tree.words, (task, column)
    assert tree.words.count("not measured") == 5  # text: at guidance 3, said, audit, shape, distance
    assert "0.612 0.512–0.735 / 40" in tree.words


def test_a_picture_redraws_from_its_recipe(tmp_path):
    scene = World("train", {"single_object": 1.0}, ["apple"], "geneval").scene(0)
    wish = gallery.Wish(scene, scene.caption, 7, 1.0)
    _, file = gallery.draw_wishes(Pipe(), [wish], "mini", 20)[wish]
    (tmp_path / "one.png").write_bytes(file)
    recipe = read_recipe(tmp_path / "one.png")
    assert (recipe.prompt, recipe.seed, recipe.guidance, recipe.steps) == (scene.caption, 7, 1.0, 20)
    assert (recipe.model, recipe.fingerprint, recipe.size, recipe.dtype) == ("mini", "f" * 64, (64, 64), "float32")


def test_an_unread_sign_is_not_called_right():
    world = World("held_out", {"text": 1.0}, CLASSES, "geneval")
    scene = next(s for s in map(world.scene, range(100)) if s.things)
    wish, picture = gallery.Wish(scene, scene.caption, 0, 3.0), np.zeros((64, 64, 3), np.uint8)
    found = [Detection(t.kind, 0.9, t.box, t.colour) for t in scene.things]
    for seen, expected in (([], False), (found, None)):
        judges = Judges([scene])
        judges.reader, judges.look = None, lambda pictures, seen=seen: [seen]
        right, reason = gallery.verdicts(judges, [wish], {wish: (picture, b"")})[wish]
        assert right is expected
        assert "not read" in reason


def test_what_mini_bench_writes_is_understood(tmp_path, monkeypatch):
    def draw(prompts, seeds, guidance, size):
        return [np.full((64, 64, 3), 128, np.uint8) for _ in prompts]

    source = Source("fake", 64, draw, lambda pictures: pictures, tuple(CLASSES))
    monkeypatch.setattr(mini_bench, "from_pipeline", lambda model, steps: source)
    monkeypatch.setattr(mini_bench, "BINDING", 3)  # of 80
    monkeypatch.setattr(ocr, "available", lambda: False)
    out = ["--out", str(tmp_path)]
    assert main(["evaluate", "mini-bench", "--model", "fake", "--quick", "--no-audit", "--per-task", "1", *out]) == 0
    scores = read_scores(tmp_path / "scores.json", list(gallery.ASKS), 3.0)
    written = json.loads((tmp_path / "scores.json").read_text())
    assert scores.settings["classes"] == CLASSES
    for number, row in written["guidance"]["3"]["counting"]["numbers"].items():
        assert scores.numbers[number]["score"].of == row["pictures"]
    assert written["guidance"]["3"]["color_attr"]["pictures"] == mini_bench.BINDING
    for task in gallery.ASKS:
        for column, row in (("3", written["guidance"]["3"]), ("render", written["ceilings"]["render"])):
            share = scores.tasks[task][column]
            assert (share.value if share else None) == row[task].get("score")
    asked = {kind: share.of for kind, share in scores.classes.items()}
    assert asked == {kind: entry["asked"] for kind, entry in written["per_class"]["3"].items()}
    assert all(share.value == 0 for share in scores.classes.values())  # grey pictures hold nothing
