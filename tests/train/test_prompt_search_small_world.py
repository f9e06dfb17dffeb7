"""The search that needs no server: what the two scripts do, word by word, and the loop with them on a generator with a known taste."""

import json

import numpy as np
import pytest

from lens.chat_client import Chat
from lens.reasoner import Refined
from train import prompt_search
from train.rewards.judge import Scores
from train.rewards.small_world_rubrics import GLOBAL, parse
from train.search import small_world
from train.search.loop import Item, Search, written
from train.search.small_world import RULES, START, LiteralWriter, ScriptedRewriter, understood

OPEN, BACKGROUND, NOTHING, SURFACE, _, _, STARS, _ = (rule.instruction for rule in RULES)


def writer(path, *instructions):
    path.write_text(START + "".join(f"\n- {text}" for text in instructions))
    return LiteralWriter(path)


def test_wishes_are_understood():
    wish = understood("a photo of a red apple left of a cactus")
    assert wish.objects == (("apple", "red"), ("cactus", small_world.KINDS["cactus"].natural))
    assert wish.subject == "a red apple left of a cactus"
    assert wish.several
    assert wish.under == "each object"
    assert not understood("a photo of an apple").several
    assert understood("a photo of two clouds").several
    with pytest.raises(ValueError, match="expected a wish for objects of the small world"):
        understood("a photo of nothing")


def test_a_backdrop_stands_out_from_every_object():
    assert small_world.backdrop(understood("a photo of a pink cloud")) != "pink"
    for colour in ("green", "purple", "pink", "white", "black"):
        wish = understood(f"a photo of a {colour} balloon and a {colour} umbrella")
        fits = [n for n in small_world.PLAIN if all(n in small_world.allowed(k, c) for k, c in wish.objects)]
        assert not fits or small_world.backdrop(wish) in fits


def test_the_writer_does_what_the_system_prompt_says_and_nothing_else(tmp_path):
    wish = "a photo of two red apples"
    (plain,) = writer(tmp_path / "a.md", "Be brilliant.")([wish])
    assert plain == Refined(wish, wish, "script")
    (opened,) = writer(tmp_path / "b.md", OPEN)([wish])
    assert opened.prompt == "The picture shows two red apples."
    (more,) = writer(tmp_path / "c.md", NOTHING, SURFACE)([wish])
    assert more.prompt == "a photo of two red apples. Nothing else is in view. The apple has clear outlines."
    (both,) = writer(tmp_path / "d.md", BACKGROUND, OPEN)([wish])
    assert both.prompt.startswith("The picture shows two red apples. The background is a plain ")


def ask(rewriter, prompt, failed, attempt):
    told = {"system_prompt": prompt, "mean_score": 0.5, "failures": [{"wish": "w", "prompt": "p", "failed": failed}]}
    return rewriter.ask(Chat(json.dumps(told), sample=attempt), written)


def test_the_rewriter_adds_what_the_failures_speak_for():
    failed = ["Verify that every apple stands out clearly from the background.: 0.10"] * 2
    failed.append("Verify that the image shows no object but apples.: 0.20")
    first = ask(ScriptedRewriter(), START, failed, 1)
    assert first["prompt"] == f"{START}\n- {BACKGROUND}"
    assert first["diagnosis"] == f"1.8 of 2.6 lost speak for: {BACKGROUND}"
    assert ask(ScriptedRewriter(), START, [*failed, "refused by the generator"], 1) == first
    others = [ask(ScriptedRewriter(), START, failed, k)["prompt"] for k in range(1, len(RULES) + 1)]
    assert len(set(others)) == len(RULES)
    assert others[1] == f"{START}\n- {STARS}"  # the other one that is about backgrounds
    assert others[2:4] == [f"{START}\n- {OPEN}", f"{START}\n- {NOTHING}"]
    whole = START + "".join(f"\n- {rule.instruction}" for rule in RULES)
    assert ask(ScriptedRewriter(), whole, failed, 3) == {"diagnosis": "no rule is left", "prompt": whole}


class Likes:
    """Scores are what is written in the pixels; no taste but the generator's."""

    def score(self, prompts, rubrics, images):
        values = np.array([image[0, 0, 0] / 255 for image in images], np.float32)
        table = np.stack([values], 1)
        return Scores(values, np.ones(len(values), bool), table, [[f"{v:.2f}"] for v in values])


def draw(prompts, seeds):
    """Better with a plain background, worse at night, more or less by the seed."""
    found = []
    for prompt, seed in zip(prompts, seeds):
        value = 80 + seed % 20 + 60 * ("plain" in prompt) - 60 * ("night" in prompt)
        found.append(np.full((8, 8, 3), value, np.uint8))
    return found


def test_the_loop_finds_what_the_generator_draws_better(tmp_path):
    items = [Item(f"i{k}", f"a photo of {n} apples", ("Verify that every apple stands out clearly from the background.",))
             for k in range(6) for n in ("two", "three", "four")]  # fmt: skip
    items = [Item(f"{i.id}{k}", i.prompt, i.rubrics) for k, i in enumerate(items)]
    search = Search(items, START, LiteralWriter, draw, Likes(), ScriptedRewriter(), tmp_path)
    final = search.run(4, lambda line: None)
    assert final.text == f"{START}\n- {BACKGROUND}"
    assert [c.accepted for c in search.archive] == [True, True, False, False, False]
    assert "lost speak for: Name a plain background" in search.archive[1].diagnosis
    assert np.mean(final.held) > np.mean(search.archive[0].held) + 0.2


def test_wishes_have_rubrics_that_the_local_judge_reads():
    items = small_world.wishes(6)
    assert len({item.id for item in items}) == 6
    assert all(item.rubrics[-1] == GLOBAL for item in items)
    assert all(parse(text) for item in items for text in item.rubrics)
    assert all(understood(item.prompt).objects for item in items)


def test_the_command_needs_no_server(tmp_path, capsys, monkeypatch):
    """Its judge is the real one; the pictures are grey."""
    from train.__main__ import main

    grey = lambda prompts, seeds: [np.full((64, 64, 3), 120, np.uint8) for _ in prompts]  # noqa: E731
    monkeypatch.setattr(prompt_search, "generator", lambda source: (grey, ""))
    argv = ["prompt_search", "--small-world", "4", "--held", "0.5", "--iterations", "1", "--out", str(tmp_path)]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "start: dev 0." in said
    assert "+0.000 [+0.000, +0.000] over the first" in said  # grey whatever was asked for
    assert (tmp_path / "best.md").read_text() == START + "\n"
    assert (tmp_path / "sheet.png").is_file()
    with pytest.raises(ValueError, match="--prompts needs --url and --reasoner-model"):
        main(["prompt_search", "--prompts", str(tmp_path / "p.jsonl")])
