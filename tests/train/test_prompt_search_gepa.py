"""The search by GEPA on the scripted server of test_prompt_search: the planted fix, our acceptance, resume, a spent budget."""

import pytest

pytest.importorskip("openai")
pytest.importorskip("tenacity")
pytest.importorskip("gepa", reason="the optional optimiser: pip install -e '.[gepa]'")

from lens.chat_client import ChatError
from tests.chat_server import serving
from tests.train.test_prompt_search import FIX, ITEMS, NOTHING, START, WORSE, quiet, script, search
from train.search import by_gepa
from train.search.loop import rise, split


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


@pytest.mark.parametrize("who", ["reasoner", "writer"])
def test_a_spent_budget_ends_it_with_what_was_found(server, tmp_path, who):
    dev, _ = split(ITEMS, 0.3)
    ours, ask = search(server, tmp_path)
    ask[who].max_calls = len(dev) if who == "reasoner" else 1
    lines = []
    final = by_gepa.optimise(ours, 9, lines.append)
    assert final.text == START
    assert f"stopped: {who}" in lines[-1]
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


def test_another_error_is_no_end_of_a_budget(server, tmp_path):
    def gone(prompts, seeds):
        raise ChatError("connection", "the painter is gone")

    ours, _ = search(server, tmp_path, gone)
    with pytest.raises(ChatError, match="the painter is gone"):
        by_gepa.optimise(ours, 3, quiet)
