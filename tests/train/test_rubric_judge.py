"""The rubric judge over HTTP: what it asks, how it scores, and what it does with answers that are none."""

import json
import math

import numpy as np
import pytest

pytest.importorskip("openai")
pytest.importorskip("tenacity")

from lens.chat_client import ChatClient
from tests import chat_server
from tests.chat_server import serving
from train.rewards.rubric_judge import KINDS, MODEL, JudgeStopped, RubricJudge, global_rubric, instructions

IMAGES = [np.full((8, 8, 3), 10 * k, np.uint8) for k in range(20)]


def judge(server, kind="binary", **kwargs):
    return RubricJudge.at(server.url, kind=kind, wait=(0.001, 0.01), timeout=20, **kwargs)


def answer(*values, **more):
    entries = [{"rubric": n, "reason": f"because {n}", "verdict": v} for n, v in enumerate(values, 1)]
    return chat_server.text(json.dumps({"verdicts": entries}), **more)


def count(call):
    return sum(line[:1].isdigit() for line in call.user.splitlines())


def test_one_call_an_image_with_prompt_and_rubrics():
    with serving(lambda call, _: answer(*[k == 0 for k in range(count(call))])) as server:
        made = judge(server).score(
            ["a fox", "two owls"], [["is a fox", "red\nfur"], ["two", "owls", "sharp"]], IMAGES[:2]
        )
    assert made.score == pytest.approx([1 / 2, 1 / 3])
    assert made.valid.all()
    np.testing.assert_array_equal(made.per_rubric, np.float32([[1, 0, np.nan], [1, 0, 0]]))
    assert made.reasons == [["because 1", "because 2"], ["because 1", "because 2", "because 3"]]
    first = min(server.calls, key=lambda call: count(call))
    assert len(server.calls) == 2
    assert first.user == "Prompt:\na fox\n\nRubrics:\n1. is a fox\n2. red fur"
    assert first.system == instructions("binary")
    assert (first.body["model"], len(first.images)) == (MODEL, 1)
    assert first.body["response_format"]["json_schema"]["strict"] is True


def test_grades_are_tenths():
    with serving(lambda *_: answer(7, 10, 0)) as server:
        made = judge(server, "graded").score(["x"], [["a", "b", "c"]], IMAGES[:1])
    assert made.per_rubric[0].tolist() == pytest.approx([0.7, 1, 0])
    assert made.score[0] == pytest.approx(1.7 / 3)


def token(text, **alternatives):
    best = [{"token": t, "logprob": math.log(p)} for t, p in alternatives.items()]
    return {"token": text, "logprob": math.log(alternatives.get(text, 1)), "top_logprobs": best}


def test_probabilities_are_those_of_the_answers_own_tokens():
    """Hand-made: 0.6 against 0.2; a word in two tokens, whose first decides; one with the blank before it."""
    tokens = [
        token('{"verdicts": ['), token("true", true=0.6, false=0.2, maybe=0.2), token(","),
        token(" fal", **{" fal": 0.5, " true": 0.5}), token("se"),
        token(", false]", **{", false]": 0.9, ", true]": 0.1}), token("}"),
    ]  # fmt: skip
    text = '{"verdicts": [true, false, false]}'
    assert "".join(t["token"] for t in tokens) == text
    with serving(lambda *_: chat_server.text(text, logprobs={"content": tokens})) as server:
        made = judge(server, "probability").score(["x"], [["a", "b", "c"]], IMAGES[:1])
    assert made.per_rubric[0].tolist() == pytest.approx([0.75, 0.5, 0.1])
    assert made.reasons == [["true", "false", "false"]]


@pytest.mark.parametrize("ill", [math.nan, 1e6])
def test_a_logarithm_that_is_none_is_no_probability(ill):
    tokens = [token('{"verdicts": ['), token("true", true=0.6, false=0.2), token("]}")]
    tokens[1]["top_logprobs"][0]["logprob"] = ill
    bad = chat_server.text('{"verdicts": [true]}', logprobs={"content": tokens})
    with serving(lambda *_: bad) as server:
        made = judge(server, "probability", max_failed=1).score(["x"], [["a"]], IMAGES[:1])
    assert not made.valid.any()
    assert "log-probability of 'true' must be at most 0" in made.reasons[0][0]


BROKEN = {
    "prose": chat_server.text("I would say yes."),
    "too few": answer(True),
    "too many": answer(True, True, True),
    "another order": chat_server.text('{"verdicts": [{"rubric": 2, "reason": "", "verdict": true}] }'),
    "a word for a verdict": answer("yes", "no"),
    "a number for a verdict": answer(1, 0),
    "a verdict twice": chat_server.text(
        '{"verdicts": [{"rubric": 1, "reason": "", "verdict": false, "verdict": true}, {"rubric": 2, "reason": "", "verdict": true}]}'
    ),
    "verdicts twice": chat_server.text(
        '{"verdicts": [], "verdicts": [{"rubric": 1, "reason": "", "verdict": true}, {"rubric": 2, "reason": "", "verdict": true}]}'
    ),
    "true for a rubric": chat_server.text(
        '{"verdicts": [{"rubric": true, "reason": "", "verdict": true}, {"rubric": 2, "reason": "", "verdict": true}]}'
    ),
    "cut off": chat_server.text('{"verdicts": [{"rub', finish="length"),
    "filtered": chat_server.text(None, finish="content_filter"),
    "refused by the server": chat_server.error(400, "unsafe image"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_failed_judgement_is_masked_never_zero(broken):
    def script(call, _):
        return BROKEN[broken] if "prompt 7\n" in call.user else answer(False, True)

    prompts = [f"prompt {k}" for k in range(20)]
    with serving(script) as server:
        made = judge(server).score(prompts, [["a", "b"]] * 20, IMAGES)
    assert np.flatnonzero(~made.valid).tolist() == [7]
    assert np.isnan(made.score[7])
    assert np.isnan(made.per_rubric[7]).all()
    assert made.score[made.valid].tolist() == [0.5] * 19
    assert made.reasons[7][0].startswith("not judged: ")


def test_more_than_a_twentieth_of_failures_stops_the_step():
    def script(call, _):
        ill = any(f"prompt {k}\n" in call.user for k in (3, 7))
        return chat_server.error(400, "no such image") if ill else answer(True)

    prompts = [f"prompt {k}" for k in range(20)]
    with serving(script) as server:
        with pytest.raises(JudgeStopped, match=r"2 of 20 judgements failed, more than 5%: 2 x .*no such image"):
            judge(server).score(prompts, [["a"]] * 20, IMAGES)
        assert judge(server, max_failed=0.1).score(prompts, [["a"]] * 20, IMAGES).valid.sum() == 18


def test_a_transcript_scores_again_without_a_server(tmp_path):
    path = tmp_path / "judge.jsonl"
    with serving(lambda call, n: answer(n % 2 == 0, True)) as server:
        first = judge(server, transcript=path).score(["x"] * 20, [["a", "b"]] * 20, IMAGES)
    again = RubricJudge(ChatClient(None, MODEL, replay=path)).score(["x"] * 20, [["a", "b"]] * 20, IMAGES)
    np.testing.assert_array_equal(again.score, first.score)
    assert len(set(first.score)) == 2
    assert again.reasons == first.reasons


def test_every_kind_has_its_instructions_and_mistakes_are_named():
    assert len({instructions(kind) for kind in KINDS}) == len(KINDS)
    assert global_rubric() == "Verify that the entire image is structurally coherent and physically plausible"
    with pytest.raises(ValueError, match="kind must be one of"):
        RubricJudge.at("http://127.0.0.1:1/v1", kind="soft")
    ours = RubricJudge.at("http://127.0.0.1:1/v1")
    with pytest.raises(ValueError, match="2 prompts, 1 lists of rubrics, 1 images"):
        ours.score(["a", "b"], [["c"]], IMAGES[:1])
    with pytest.raises(ValueError, match="image 0 has no rubric"):
        ours.score(["a"], [[]], IMAGES[:1])
