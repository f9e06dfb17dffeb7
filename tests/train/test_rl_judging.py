"""The rubric judge over HTTP in a run: rewards, failures masked or fatal, a key nowhere, replays to the bit; arms compared."""

import json

import numpy as np
import pytest

pytest.importorskip("openai")
pytest.importorskip("tenacity")

from tests import chat_server
from tests.chat_server import serving
from tests.train.small_rl import ALONE, recipe, trained, trainer_of
from train.__main__ import main
from train.data.prompts import Prompt, read_prompts, subsets_of, write_prompts
from train.loop.clock import Interrupted
from train.rl_judging import held_out, judging, spent

SETTINGS = {"WATCH": "none", "VALIDATION": 3, "GROUPS": 1, "SLOTS": 2, "SAMPLING_STEPS": 2, "TIMES": 1}
KEY = "a-key-that-is-a-secret"


def verdicts(call, number):
    """Of eleven rubrics as many pass as the request is long, more or less: something that depends on the picture."""
    passed = call.size % 12
    entries = [{"rubric": n, "reason": f"because {n}", "verdict": n <= passed} for n in range(1, 12)]
    return json.dumps({"verdicts": entries})


@pytest.fixture
def prompts(tmp_path):
    path, rubrics = tmp_path / "prompts.jsonl", tuple(f"rubric {n}" for n in range(10))
    own = [
        Prompt(f"p{i}", "objects" if i % 2 else "text", "x", "x", (), f"prompt {i}", rubrics, subsets_of(f"p{i}"))
        for i in range(10)
    ]
    write_prompts(path, own)
    return path


def run_of(out, where, prompts, **changes):
    settings = recipe(**SETTINGS, **changes)
    seen = judging(settings, where, out, ALONE, prompts, "full", [])
    trainer = trainer_of(out, settings, judge=seen.judge)
    trainer.method.prompts, trainer.method.held, trainer.method.global_rubric = (
        seen.prompts,
        seen.held,
        seen.global_rubric,
    )
    return trainer, seen


def test_a_server_judges_a_run_and_its_transcript_repeats_it(tmp_path, prompts, monkeypatch):
    monkeypatch.setenv("LENS_CHAT_KEY", KEY)
    with serving(verdicts) as server:
        first, seen = run_of(tmp_path / "first", server.url, prompts)
        with seen.client:
            batches = first.method.batches()
            losses = [first.train_step(batches)["loss"] for _ in range(2)]
            held = first.method.validate(0)
            first.save(last=True)
            assert first.method.validate(2) == held  # the same pictures: out of the cache
            _, numbers = first.method.iteration(2)
    assert {p.id for p in seen.prompts}.isdisjoint(p.id for p in held_out(read_prompts(prompts), 3))
    assert (len(seen.prompts), len(seen.held.prompts)) == (7, 3)
    assert all(call.headers["authorization"] == f"Bearer {KEY}" for call in server.calls)
    assert "1. rubric 0" in server.calls[0].user
    assert "11. Verify that the entire image" in server.calls[0].user
    assert len(server.calls) == 3 * 4 + 3 == seen.client.counters.calls
    assert seen.client.counters.cached == 3
    assert "15 calls, 3 from the cache, 0 failed" in spent(seen.client)
    assert 0 < numbers["score"] < 1
    assert 0 < held["held_score"] < 1
    assert held["held_invalid_share"] == 0
    kinds = {name for name in numbers if name.startswith("passed_")}
    assert (
        {"passed_specific", "passed_global"}
        < kinds
        <= {"passed_specific", "passed_global", "passed_of_objects", "passed_of_text"}
    )
    assert all(KEY.encode() not in path.read_bytes() for path in (tmp_path / "first").rglob("*") if path.is_file())

    replay = tmp_path / "first" / "judge" / "transcript.jsonl"
    second, seen = run_of(tmp_path / "second", str(replay), prompts)
    batches = second.method.batches()
    assert [second.train_step(batches)["loss"] for _ in range(2)] == losses
    for name, value in trained(first).items():
        assert np.array_equal(trained(second)[name], value), name


def test_failed_calls_are_masked_and_too_many_stop_with_their_reason(tmp_path, prompts, monkeypatch):
    monkeypatch.setenv("LENS_CHAT_KEY", KEY)
    with serving(
        lambda call, number: chat_server.error(400, f"no, {KEY}") if number == 1 else verdicts(call, number)
    ) as server:
        trainer, seen = run_of(tmp_path / "one", server.url, prompts, MOST_FAILURES=0.3)
        with seen.client:
            slots, numbers = trainer.method.iteration(0)
    assert numbers["invalid_share"] == 0.25
    assert [s.r for own in slots.values() for s in own if not s.valid] == [0.5]
    with serving(lambda *_: chat_server.error(400, f"no such model, {KEY}")) as server:
        trainer, seen = run_of(tmp_path / "all", server.url, prompts)
        with seen.client:
            with pytest.raises(
                Interrupted, match=r"rl: 100% of 4 judgements failed, .*: 4 x .*HTTP 400.*no such model"
            ) as told:
                next(trainer.method.batches())
            with pytest.raises(Interrupted, match="3 of the first 3 judgements, of held-out prompts, failed"):
                trainer.method.validate(0)
    assert KEY not in str(told.value)
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("small-world", "expected WATCH = 'small-world'"),
        ("nobody:secret", "--judge: expected small-world, an address"),
        ("http://user:secret@127.0.0.1/v1", "neither user, password nor query"),
    ],
)
def test_judges_that_there_are_not_are_refused(tmp_path, prompts, where, words):
    with pytest.raises(ValueError, match=words) as told:
        judging(recipe(**SETTINGS), where, tmp_path, ALONE, prompts, "full", [])
    assert ":secret" not in str(told.value)


def test_the_local_judge_refuses_rubrics_of_another_world_before_anything_is_drawn(tmp_path, prompts):
    own = recipe(**SETTINGS | {"WATCH": "small-world"})
    with pytest.raises(
        ValueError, match=r"--judge small-world: .*prompts\.jsonl \(p0\): 'rubric 0', expected a rubric that"
    ):
        judging(own, "small-world", tmp_path, ALONE, prompts, "full", [])


def test_the_frontier_of_two_arms(tmp_path, capsys):
    arms = {"a": [(0, 8.0, 0.5), (5, 6.0, 0.7), (10, 3.0, 0.6)], "b & c": [(0, 8.0, 0.5), (5, 7.0, 0.65)]}
    for name, rows in arms.items():
        (tmp_path / name).mkdir()
        lines = [{"step": s, "held_effective_backdrops": d, "held_score": r} for s, d, r in rows]
        lines.insert(1, {"step": 1, "loss": 2.0})
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folders, out = [str(tmp_path / name) for name in arms], tmp_path / "plots" / "frontier.html"
    assert main(["rl_frontier", *folders, "--out", str(out)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in told[:-1]] == [
        "a, step 5",
        "b & c, step 5",
        "a, step 0",
        "b & c, step 0",
    ]
    text = out.read_text()
    assert text.count("<circle") == 5
    assert text.count('fill="#f6f6f4"') == 1  # step 10 of a is dominated
    assert "b &amp; c, step 5: 7, 0.65" in text
    with pytest.raises(
        ValueError, match=r"no row with held_template and held_effective_backdrops; .*there: held_effective_backdrops"
    ):
        main(["rl_frontier", *folders, "--reward", "held_template"])
    with pytest.raises(FileNotFoundError, match="no log of a training here"):
        main(["rl_frontier", str(tmp_path / "none")])
