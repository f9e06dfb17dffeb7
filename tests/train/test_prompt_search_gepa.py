"""The search by GEPA on the scripted server of test_prompt_search: the planted fix, our acceptance, resume, a spent budget."""

import json

import pytest

pytest.importorskip("openai")
pytest.importorskip("tenacity")
pytest.importorskip("gepa", reason="the optional optimiser: pip install -e '.[gepa]'")

from lens.chat_client import ChatError
from tests.chat_server import serving
from tests.train.test_prompt_search import FIX, ITEMS, NOTHING, START, WORSE, draw, quiet, script, search
from train.search import by_gepa
from train.search.loop import Outcome, failures_of, mean, rise, split


@pytest.fixture
def server():
    script.asked = 0
    with serving(script) as running:
        yield running


def test_gepa_finds_the_planted_fix(server, tmp_path):
    ours, _ = search(server, tmp_path)
    lines = []
    final = by_gepa.optimise(ours, 5, lines.append)
    assert final.text == FIX
    assert set(final.dev) == set(final.held) == {1.0}
    assert (tmp_path / "best.md").read_text() == FIX + "\n"
    assert [c.text for c in ours.archive] == [START, FIX]  # the others did not get beyond a minibatch
    assert [c.parent for c in ours.archive] == [None, 0]
    assert (final.rise, final.error) == rise(final.dev, ours.archive[0].dev, 0)
    assert final.accepted
    assert final.rise > final.error > 0
    assert ours.archive[0].held
    assert lines[0].startswith("start: dev 0.")
    assert "accepted: edit after 0" in lines[1]
    written = {call.system for call in server.calls if call.body["model"] == "reasoner"}
    assert {text.partition("\n")[0] for text in written} == {START, NOTHING, WORSE, FIX}  # tried, and dropped


def test_it_is_resumed_and_asks_nothing_twice(server, tmp_path):
    whole, _ = search(server, tmp_path / "a")
    by_gepa.optimise(whole, 3, quiet)
    before, script.asked = len(server.calls), 0
    first, _ = search(server, tmp_path / "b")
    by_gepa.optimise(first, 1, quiet)
    assert [c.text for c in first.archive] == [START]
    again, _ = search(server, tmp_path / "b")
    final = by_gepa.optimise(again, 3, quiet)
    assert again.archive == whole.archive
    assert final.text == FIX
    assert len(server.calls) - before == before
    own, _ = search(server, tmp_path / "c")
    own.run(0, quiet)
    with pytest.raises(ValueError, match=r"search.json: of a search by our own loop; give another --out"):
        by_gepa.optimise(own, 3, quiet)


def test_nothing_is_drawn_twice_under_one_text_though_it_was_interrupted(server, tmp_path):
    asked = []

    def counted():
        ours, _ = search(server, tmp_path)
        plain = ours.outcomes
        ours.outcomes = lambda text, items: asked.extend((text, item.id) for item in items) or plain(text, items)
        return ours

    by_gepa.optimise(counted(), 1, quiet)
    broken = counted()
    plain = broken.outcomes

    def gone(text, items):
        if (
            text == FIX and len(items) > by_gepa.MINIBATCH
        ):  # in the midst of an iteration, whose first pictures are drawn
            raise ChatError("connection", "the painter is gone")
        return plain(text, items)

    broken.outcomes = gone
    with pytest.raises(ChatError, match="gone"):
        by_gepa.optimise(broken, 3, quiet)
    assert sum(text == FIX for text, _ in asked) == by_gepa.MINIBATCH
    ours = counted()
    assert by_gepa.optimise(ours, 3, quiet).text == FIX
    assert len(asked) == len(set(asked))
    assert {key for text, key in asked if text == FIX} == {item.id for item in ITEMS}  # the held-out prompts, too


def test_the_writer_is_told_the_mean_and_the_worst_of_all_that_was_drawn(server, tmp_path):
    ours, _ = search(server, tmp_path)
    by_gepa.optimise(ours, 1, quiet)
    (told,) = (json.loads(call.user) for call in server.calls if call.body["model"] == "writer")
    start = ours.archive[0]
    assert 0 < len(start.failures) < len(ours.dev)
    assert told == {
        "system_prompt": START,
        "mean_score": round(mean(start.dev), 3),
        "failures": json.loads(json.dumps(start.failures)),
    }


def test_the_archive_holds_what_was_scored_whole_each_against_its_own_parent(server, tmp_path):
    ours, _ = search(server, tmp_path)
    adapter = by_gepa.Adapter(ours, START)

    def outcomes(*scores):
        return {item.id: Outcome(scores[k % len(scores)], "p", ("ill",)) for k, item in enumerate(ours.dev)}

    adapter.known = {START: outcomes(0.2, 0.4), "A": outcomes(0.9, 0.5), "B": outcomes(0.6, 0.5)}
    adapter.known["C"] = {ours.dev[0].id: Outcome(1.0, "p")}
    adapter.parents = {START: None, "A": START, "B": "A", "C": START}
    adapter.diagnoses = dict.fromkeys(adapter.known, "d")
    start, a, b = adapter.archive()
    assert [(c.text, c.parent, c.accepted) for c in (start, a, b)] == [
        (START, None, True),
        ("A", 0, True),
        ("B", 1, False),
    ]
    assert (b.rise, b.error) == rise(b.dev, a.dev, ours.seed)
    assert b.rise < 0
    assert a.failures == failures_of(ours.dev, list(adapter.known["A"].values()))


def test_another_seed_is_another_search(server, tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(by_gepa.require_gepa(), "optimize", lambda **told: seeds.append(told["seed"]))
    ours, _ = search(server, tmp_path)
    ours.seed, ours.archive = 5, []
    with pytest.raises(ValueError, match="empty"):  # nothing was scored, so that there is nothing to choose
        by_gepa.optimise(ours, 1, quiet)
    assert seeds == [5]


def test_a_text_that_is_written_again_keeps_its_first_parent(server, tmp_path):
    ours, _ = search(server, tmp_path)
    adapter = by_gepa.Adapter(ours, START)
    adapter.known, adapter.parents = {NOTHING: {ours.dev[0].id: Outcome(0.5, "p")}}, {START: None, NOTHING: START}
    assert adapter.propose_new_texts({by_gepa.PART: NOTHING}, {by_gepa.PART: []}, [by_gepa.PART]) == {
        by_gepa.PART: NOTHING
    }
    assert adapter.parents == {START: None, NOTHING: START}


@pytest.mark.parametrize("who", ["reasoner", "writer"])
def test_a_spent_budget_ends_it_with_what_was_found(server, tmp_path, who):
    dev, _ = split(ITEMS, 0.3)
    ours, ask = search(server, tmp_path)
    ask[who].max_calls = len(dev) if who == "reasoner" else 1
    lines, proposals, plain = [], [], ours.proposed
    ours.proposed = lambda *told: proposals.append(told) or plain(*told)
    final = by_gepa.optimise(ours, 9, lines.append)
    assert final.text == START
    assert f"stopped: {who}" in lines[-1]
    assert len(proposals) <= 3  # GEPA would go on after a proposal that died, nine times
    assert (tmp_path / "best.md").read_text() == START + "\n"


def test_a_judgement_that_failed_is_left_out_of_our_figures(server, tmp_path):
    ours, _ = search(server, tmp_path)
    dev, _ = split(ITEMS, 0.3)
    plain = ours.judge.score

    def failing(prompts, rubrics, images):
        found = plain(prompts, rubrics, images)
        for row, prompt in enumerate(prompts):
            if prompt == dev[0].prompt:
                found.valid[row] = False
        return found

    ours.judge.score = failing
    by_gepa.optimise(ours, 3, quiet)
    assert ours.archive[0].dev[0] is None
    known = [score for score in ours.archive[0].dev if score is not None]
    assert len(known) == len(dev) - 1
    assert ours.archive[-1].rise == pytest.approx(1.0 - sum(known) / len(known))


@pytest.mark.parametrize("where", ["the first figures", "a rewrite's minibatch", "the held-out prompts"])
def test_another_error_is_no_end_of_a_budget(server, tmp_path, where):
    drawn, held = [], {item.prompt for item in split(ITEMS, 0.3)[1]}

    def gone(prompts, seeds):
        drawn.append(len(prompts))
        reached = {"the first figures": True, "a rewrite's minibatch": len(drawn) > 2}
        if reached.get(where, prompts[0].partition(",")[0] in held):
            raise ChatError("connection", "the painter is gone")
        return draw(prompts, seeds)

    ours, _ = search(server, tmp_path, gone)
    with pytest.raises(ChatError, match="the painter is gone"):
        by_gepa.optimise(ours, 3, quiet)


def test_a_state_goes_on_only_beside_the_file_that_says_whose_it_is(server, tmp_path, monkeypatch):
    def killed(**_):
        raise KeyboardInterrupt

    ours, _ = search(server, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(by_gepa.require_gepa(), "optimize", killed)
        with pytest.raises(KeyboardInterrupt):
            by_gepa.optimise(ours, 1, quiet)
    assert json.loads((tmp_path / "search.json").read_text())["search"] == ours.name  # before anything is drawn
    by_gepa.optimise(search(server, tmp_path)[0], 1, quiet)
    (tmp_path / "search.json").unlink()
    with pytest.raises(ValueError, match=r"gepa_state.bin: expected search.json beside its folder"):
        by_gepa.optimise(search(server, tmp_path)[0], 1, quiet)
