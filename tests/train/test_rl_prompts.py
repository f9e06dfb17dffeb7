"""The taxonomy and the prompts written from it: shares, seeds, rules that a linter holds, a writer over HTTP and replayed."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from tests import chat_server
from tests.chat_server import serving
from train.__main__ import main
from train.data.prompt_rules import Draft, Thing, broken_rules
from train.data.prompts import read_prompts
from train.data.taxonomy import CATEGORIES, DIMENSIONS, Item, chosen, dimensions_of, levelled, read_taxonomy, shared
from train.rewards.rubric_judge import global_rubric


@pytest.fixture(scope="module")
def taxonomy():
    return read_taxonomy()


def test_the_taxonomy_has_its_total_its_shares_and_no_item_twice(taxonomy):
    items = chosen(taxonomy)
    assert len(items) == len({item.id for item in items}) == len({item.name.casefold() for item in items}) == 8406
    counts = Counter(item.category for item in items)
    assert tuple(taxonomy.shares) == CATEGORIES
    assert counts == shared(8406, taxonomy.shares)
    assert counts["Human"] == 1261  # the histogram that the seed and the file fix
    assert counts["UI and Graphic Design"] == 504
    subs = {(item.category, item.sub_category) for item in items}
    assert len(subs) == sum(map(len, taxonomy.pools.values())) > 60
    assert chosen(taxonomy) == items
    assert chosen(replace(taxonomy, seed=taxonomy.seed + 1)) != items
    few = chosen(taxonomy, 300)
    assert len(few) == 300
    assert {item.id for item in few} <= {item.id for item in items}


def test_dimensions_are_one_to_four_by_seed(taxonomy):
    items = chosen(taxonomy)
    drawn = [dimensions_of(item, 5) for item in items]
    sizes, names = Counter(map(len, drawn)), Counter(name for own in drawn for name in own)
    assert set(sizes) == {1, 2, 3, 4}
    assert min(sizes.values()) > 0.22 * len(items)
    assert set(names) == set(DIMENSIONS)
    assert min(names.values()) > 0.48 * len(items)
    assert drawn == [dimensions_of(item, 5) for item in items]
    assert sum(a != dimensions_of(item, 6) for a, item in zip(drawn, items)) > 0.8 * len(items)


def test_largest_remainders_and_level_parts():
    assert shared(10, {"a": 0.25, "b": 0.25, "c": 0.5}) == {"a": 3, "b": 2, "c": 5}
    assert levelled(10, [2, 9, 9]) == [2, 4, 4]
    assert levelled(11, [2, 9, 9]) == [2, 5, 4]
    assert levelled(5, [9, 9, 9]) == [2, 2, 1]
    assert levelled(0, [3]) == [0]
    with pytest.raises(ValueError, match="21 into 20"):
        levelled(21, [2, 9, 9])


SMALL = """total = 4
seed = 1
# Food = 0.5
## Fruit
{red|green} apple, pear
# Animal = 0.5
## Birds
@size = small|large
{@size} owl, crane
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("pear", "red apple", "line 5: 'red apple' is there already, in line 5"),
        ("= 0.5\n## Birds", "= 0.4\n## Birds", "shares add up to 0.9, expected 1"),
        ("total = 4\n", "", "expected a line like total = 1"),
        ("{@size} owl", "{@age} owl", "line 9: no line @age = ... before it"),
        ("## Fruit\n", "", "line 4: expected a sub-category before the first item"),
        ("# Animal", "# Food", "line 6: the category 'Food' is there twice"),
        ("total = 4", "total = 40", "Food has 3 items, its share asks for 20"),
    ],
)
def test_a_taxonomy_that_is_wrong_names_its_line(tmp_path, old, new, message):
    path = tmp_path / "t.txt"
    path.write_text(SMALL)
    assert [item.name for item in chosen(read_taxonomy(path), 6)] == [
        *("red apple", "green apple", "pear", "small owl", "large owl", "crane")
    ]
    assert old in SMALL
    path.write_text(SMALL.replace(old, new))
    with pytest.raises(ValueError, match=message):
        chosen(read_taxonomy(path))


# ------------------------------------------------------------------------------------------------ the linter

OWL = Item("Animal", "Birds", "barn owl")
EVERY = ("attribute", "spatial relationship", "count", "interaction", "colour")
PROMPT = (
    "A fluffy barn owl sits on a wooden gate and looks at three red apples that lie in a row to the left of the gate."
)
GOOD = Draft(
    PROMPT,
    (Thing("barn owl", 1, ""), Thing("gate", 1, ""), Thing("apples", 3, "red")),
    (
        ("attribute", "fluffy barn owl"),
        ("spatial relationship", "to the left of the gate"),
        ("count", "three red apples"),
        ("interaction", "looks at three red apples"),
        ("colour", "red apples"),
    ),
    tuple(
        (about, f"Verify that {text}.")
        for about, text in (
            ("subject", "the image shows a barn owl"),
            ("attribute", "the barn owl is fluffy"),
            ("attribute", "the gate is made of wood"),
            ("count", "there are exactly three apples"),
            ("colour", "every apple is red"),
            ("spatial relationship", "the apples lie left of the gate"),
            ("spatial relationship", "the barn owl sits on the gate"),
            ("interaction", "the barn owl looks at the apples"),
            ("scene", "the apples lie in a row"),
            ("subject", "the whole barn owl is inside the frame"),
        )
    ),
)


def test_a_good_draft_breaks_no_rule():
    assert broken_rules(GOOD, OWL, EVERY, global_rubric()) == []


def told(old, new):
    return {"prompt": PROMPT.replace(old, new)}


def rubric(place, about, text):
    rows = list(GOOD.rubrics)
    rows[place] = (about, text)
    return {"rubrics": tuple(rows)}


THINGS = GOOD.things
BROKEN = {
    "vague number": (told("three red", "several red"), "'several', expected an exact number"),
    "hidden": (told("sits on", "sits behind"), "'behind', expected a wholly visible thing"),
    "cropped": (told("A fluffy", "A partially hidden fluffy"), "'hidden', 'partially'"),
    "many colours": (told("wooden gate", "striped gate"), "'striped', expected one uniform colour"),
    "two colours": (told("three red", "three red and green"), "'red and green', expected one uniform colour"),
    "a colour of nothing": (told("wooden gate", "white gate"), "'white', which is the colour of no listed object"),
    "a number of nothing": (told("a wooden gate", "two wooden gate"), "'two', which is the number of no listed object"),
    "another number": ({"things": (*THINGS[:2], Thing("apples", 4, "red"))}, "'apples': expected 'four' right before it"),
    "the number elsewhere": (told("three red apples", "red apples, three in all"), "expected 'three' right before it"),
    "the colour elsewhere": (told("red apples", "apples, all of them red"), "'apples': expected 'red' right before it"),
    "an unknown colour": ({"things": (*THINGS[:2], Thing("apples", 3, "sunset"))}, "the colour 'sunset'"),
    "a thing of another prompt": ({"things": (*THINGS, Thing("ladder", 1, ""))}, "'ladder' is not in the prompt"),
    "another subject": (told("barn owl", "parrot"), "lacks barn, owl of the subject"),
    "too short": ({"prompt": "A barn owl."}, "the prompt has 3 words"),
    "no evidence": ({"evidence": GOOD.evidence[1:]}, "expected it for attribute, spatial relationship"),
    "invented evidence": ({"evidence": (("attribute", "shiny"), *GOOD.evidence[1:])}, "'shiny' is not in the prompt"),
    "nine rubrics": ({"rubrics": GOOD.rubrics[1:]}, "9 rubrics"),
    "one rubric twice": (rubric(0, *GOOD.rubrics[1]), "9 of them different"),
    "another beginning": (rubric(0, "subject", "Is there a barn owl?"), "expected 'Verify that'"),
    "the global rubric": (rubric(0, "scene", global_rubric()), "is the general one"),
    "two facts": (rubric(0, "subject", "Verify that there is a barn owl or a hawk."), "says 'or'"),
    "a count without number": (rubric(3, "count", "Verify that the apples are counted."), "expected its number"),
    "a colour without one": (rubric(4, "colour", "Verify that the apples have a colour."), "expected one that an object has"),
    "a dimension without rubric": (rubric(7, "subject", GOOD.rubrics[7][1]), "no rubric is about interaction"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_every_rule_is_noticed_when_broken(name):
    change, message = BROKEN[name]
    assert any(message in text for text in broken_rules(replace(GOOD, **change), OWL, EVERY, global_rubric()))


def test_words_of_the_item_break_nothing():
    item = Item("Human", "Dress", "woman in a striped bathing suit of the 1920s")
    prompt = "A woman in a striped bathing suit of the 1920s stands on a wooden jetty and waves with one hand."
    draft = replace(GOOD, prompt=prompt, things=(Thing("woman", 1, ""),), evidence=(("attribute", "wooden jetty"),))
    texts = broken_rules(draft, item, ("attribute",), global_rubric())
    assert not any("striped" in text for text in texts)


def test_text_of_the_item_must_stand_in_quotes():
    item = Item("Text", "Signs", 'shop sign reading "OLD TOWN"')
    wrong = replace(
        GOOD, prompt="A shop sign above a door, reading OLD TOWN in large letters, on a quiet and sunny street."
    )
    assert any('lacks the text "OLD TOWN"' in text for text in broken_rules(wrong, item, (), global_rubric()))
    right = replace(wrong, prompt=wrong.prompt.replace("OLD TOWN", '"OLD TOWN"'))
    assert not any("lacks the text" in text for text in broken_rules(right, item, (), global_rubric()))


# ------------------------------------------------------------------------------------------------ the writer


def values(draft):
    return {
        "prompt": draft.prompt,
        "objects": [vars(thing) for thing in draft.things],
        "evidence": [{"dimension": name, "quote": quote} for name, quote in draft.evidence],
        "rubrics": [{"about": about, "text": text} for about, text in draft.rubrics],
    }


def writes(call):
    """A draft that keeps every rule, for any item of SMALL and any dimensions."""
    lines = dict(line.split(": ", 1) for line in call.user.splitlines() if ": " in line)
    noun, tested = lines["Subject"], lines["Test"].split(", ")
    three, red = ("three " if "count" in tested else "the "), ("blue " if "colour" in tested else "")
    prompt = (
        f"A large {noun} leans on a wooden gate that holds {three}{red}bells to the left of the road in a quiet valley."
    )
    quotes = {
        "attribute": "wooden gate",
        "spatial relationship": "to the left of the road",
        "count": "three",
        "interaction": "leans on a wooden gate",
        "colour": "blue bells",
    }
    things = (Thing(noun, 1, ""), Thing("gate", 1, ""), Thing("bells", 3 if three == "three " else 1, red.strip()))
    rubrics = [("subject", f"Verify that there is a {noun}."), ("subject", "Verify that the bells hang on the gate.")]
    facts = {"count": "there are exactly three bells", "colour": "the bells are blue"}
    rubrics += [(name, f"Verify that {facts.get(name, f'{quotes[name]} is seen')}.") for name in tested]
    rubrics += [("scene", f"Verify that the valley is quiet, part {n}.") for n in range(10 - len(rubrics))]
    return Draft(prompt, things, tuple((name, quotes[name]) for name in tested), tuple(rubrics))


def command(tmp_path, *more):
    (tmp_path / "t.txt").write_text(SMALL.replace("total = 4", "total = 6"))
    return ["rl_prompts", "--taxonomy", str(tmp_path / "t.txt"), *more]


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_items_become_prompts_that_rl_reads_and_a_transcript_writes_again(tmp_path, capsys):
    pytest.importorskip("openai")
    drafts = Counter()

    def script(call, number):
        noun = call.user.split("Subject: ")[1].splitlines()[0]
        drafts[noun] += 1
        good = writes(call)
        if number == 0:
            return chat_server.error(429, "slow down", Retry_After="0")
        if noun == "pear":
            return chat_server.text(None, finish="content_filter")
        if noun == "crane" and drafts[noun] == 1:
            return chat_server.text("Certainly! Here it is")
        if noun == "red apple" and "broke these rules" not in call.user:
            return json.dumps(values(replace(good, prompt=good.prompt.replace("A large", "Some large"))))
        if noun == "small owl":
            return json.dumps(values(replace(good, rubrics=good.rubrics[:9])))
        return json.dumps(values(good))

    out = tmp_path / "first" / "p.jsonl"
    with serving(script) as server:
        assert main([*command(tmp_path), "--url", server.url, "--out", str(out), "--concurrency", "2"]) == 0
        calls = len(server.calls)
        assert main([*command(tmp_path), "--url", server.url, "--out", str(out), "--concurrency", "1"]) == 0
        # only what failed is asked again: a refusal is an answer and is kept
        assert len(server.calls) == calls
    body = server.calls[-1].body
    assert (body["model"], body["response_format"]["json_schema"]["strict"]) == ("gpt-4.1", True)
    prompts = read_prompts(out)
    assert [prompt.item for prompt in prompts] == ["red apple", "green apple", "large owl", "crane"]
    taxonomy = read_taxonomy(tmp_path / "t.txt")
    for prompt in prompts:
        item = Item(prompt.category, prompt.sub_category, prompt.item)
        assert (prompt.id, prompt.dimensions) == (item.id, dimensions_of(item, taxonomy.seed))
        assert len(set(prompt.rubrics)) == 10
        assert global_rubric() not in prompt.rubrics
    left = {row["name"]: row for row in read_lines(tmp_path / "first" / "p.left_out.jsonl")}
    assert left["pear"]["reason"] == "refused: content_filter"
    assert left["small owl"]["reason"].startswith("breaks: 9 rubrics")
    assert left["small owl"]["drafts"] == 3
    manifest = json.loads((tmp_path / "first" / "p.manifest.json").read_text())
    assert (manifest["prompts"], manifest["left_out"], manifest["items"]) == (4, 2, 6)
    assert manifest["rules_broken"]["an exact number"] == 1
    page = (tmp_path / "first" / "p.html").read_text()
    assert "<svg" in page
    assert "Animal: Birds" in page
    assert "4 prompts" in capsys.readouterr().out
    # without a server, to the byte
    again = tmp_path / "again.jsonl"
    replay = tmp_path / "first" / "p_calls" / "transcript.jsonl"
    assert main([*command(tmp_path), "--replay", str(replay), "--out", str(again)]) == 0
    assert again.read_bytes() == out.read_bytes()


def test_a_budget_that_is_spent_ends_it_and_the_same_command_goes_on(tmp_path, capsys):
    pytest.importorskip("openai")
    out = tmp_path / "p.jsonl"
    with serving(lambda call, _: json.dumps(values(writes(call)))) as server:
        arguments = [*command(tmp_path), "--url", server.url, "--out", str(out), "--concurrency", "1"]
        assert main([*arguments, "--max-calls", "4"]) == 1
        assert "all 4 calls of the budget are made; the same command goes on" in capsys.readouterr().err
        assert not out.exists()
        assert main(arguments) == 0
    assert len(server.calls) == 6
    assert len(read_prompts(out)) == 6


def test_what_does_not_fit_together_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--taxonomy needs --url of a server"):
        main(command(tmp_path))
    with pytest.raises(ValueError, match="--url is for --taxonomy, not for --world"):
        main(["rl_prompts", "--world", "mini", "--url", "http://127.0.0.1:1/v1"])


def test_the_plan_is_drawn_without_a_server(tmp_path, capsys):
    assert main(["rl_prompts", "--taxonomy", "--dry-run", "--out", str(tmp_path / "p.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "8406 items" in said
    assert "USD by gpt-4.1" in said
    assert "1,261 (15.0%)" in (tmp_path / "p.html").read_text()
