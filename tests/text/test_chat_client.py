"""The chat client against a real server: what it asks, what it bears, what it keeps, and what it never tells."""

import json
import logging
import math

import numpy as np
import pytest

pytest.importorskip("openai")
pytest.importorskip("tenacity")

from lens.chat_client import BadAnswer, Chat, ChatClient, ChatError, read_transcript, same
from tests import chat_server
from tests.chat_server import serving

SECRET = "sk-secret-0123456789"
PICTURE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


def client(server, **kwargs):
    kwargs = {"wait": (0.01, 0.05), "timeout": 20, **kwargs}
    return ChatClient(server.url, "gpt-4.1-mini", **kwargs)


def scripted(*answers):
    """A server that gives these one after another, and the last again and again."""
    return serving(lambda _, n: answers[min(n, len(answers) - 1)])


def said(reply):
    return reply.text


# ------------------------------------------------------------------------------------------------ what is asked


def test_a_call_carries_text_pixels_and_form(monkeypatch):
    monkeypatch.setenv("LENS_CHAT_KEY", SECRET)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-for-openai-alone")
    form = {"type": "object", "properties": {}, "additionalProperties": False}
    with scripted("yes") as server, client(server) as ours:
        chat = Chat(
            "what is it?", "be brief", (PICTURE,), schema=form, temperature=0.5, max_tokens=7, seed=3, top_logprobs=2
        )
        assert ours.ask(chat, said) == "yes"
    (call,) = server.calls
    assert (call.system, call.user) == ("be brief", "what is it?")
    assert {k: call.body[k] for k in ("model", "temperature", "max_tokens", "seed", "logprobs", "top_logprobs")} == {
        "model": "gpt-4.1-mini", "temperature": 0.5, "max_tokens": 7, "seed": 3, "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    assert call.body["response_format"]["json_schema"] == {"name": "answer", "strict": True, "schema": form}
    assert call.headers["authorization"] == f"Bearer {SECRET}"
    assert pixels_of(call.images[0]).tolist() == PICTURE.tolist()


def pixels_of(url):
    import base64
    import io

    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))))


def test_calls_run_together_but_not_more_than_allowed():
    import time

    with serving(lambda call, _: time.sleep(0.05) or call.user) as server, client(server, concurrency=3) as ours:
        answers = ours.ask_all([Chat(str(k)) for k in range(12)], said)
    assert [a.value for a in answers] == [str(k) for k in range(12)]
    assert server.together == 3


def test_a_large_request_and_a_large_reply_arrive():
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    with scripted("x" * 2_000_000) as server, client(server) as ours:
        assert len(ours.ask(Chat("?", images=(noise,)), said)) == 2_000_000
    assert server.calls[0].size > 1_500_000


def test_an_address_must_be_one_and_hold_no_key():
    for url in ("http://user:pass@127.0.0.1/v1", f"http://127.0.0.1/v1?api-key={SECRET}", "127.0.0.1:80"):
        with pytest.raises(ValueError, match="url must") as raised:
            ChatClient(url, "m")
        assert SECRET not in str(raised.value)
        assert "pass@" not in str(raised.value)


# ------------------------------------------------------------------------------------------------ what is borne

BAD = {
    "429": chat_server.error(429, "slow down", Retry_After="0.02"),
    "503": chat_server.error(503),
    "not JSON": chat_server.raw(b"<html>busy</html>"),
    "JSON, but no completion": chat_server.raw(b'{"choices": []}'),
    "text that is no text": chat_server.raw(b'{"choices": [{"message": {"content": 3}}]}'),
    "a count that is none": chat_server.raw(
        b'{"choices": [{"message": {"content": "yes"}}], "usage": {"prompt_tokens": 1e999}}'
    ),
    "a count below 0": chat_server.text("no", usage=(100, -1)),
    "a log-probability above 0": chat_server.text(
        "no",
        logprobs={"content": [{"token": "no", "logprob": -1.0, "top_logprobs": [{"token": "yes", "logprob": 1e6}]}]},
    ),
    "a log-probability that is none": chat_server.text(
        "no", logprobs={"content": [{"token": "no", "logprob": math.nan}]}
    ),
    "half of a character": chat_server.raw(b'{"choices": [{"message": {"content": "\\ud800"}}]}'),
    "half a reply": chat_server.raw(chat_server.completion("yes")[:40], length=2000),
    "cut JSON": chat_server.raw(chat_server.completion("yes")[:-9]),
    "reset": chat_server.reset,
}


@pytest.mark.parametrize("bad", BAD)
def test_what_passes_is_tried_again(bad):
    with scripted(BAD[bad], BAD[bad], "yes") as server, client(server) as ours:
        assert ours.ask(Chat("?"), said) == "yes"
    assert len(server.calls) == 3
    assert (ours.counters.calls, ours.counters.retries, ours.counters.failures) == (3, 2, 0)


def test_a_token_that_is_never_said_has_a_log_probability():
    told = {"content": [{"token": "yes", "logprob": 1e-6, "top_logprobs": [{"token": "no", "logprob": -math.inf}]}]}
    with scripted(chat_server.text("yes", logprobs=told)) as server, client(server) as ours:
        assert ours.ask(Chat("?"), same).logprobs == (("yes", {"yes": 1e-6, "no": -math.inf}),)


def test_what_stays_bad_ends_after_the_attempts():
    with (
        scripted(BAD["503"]) as server,
        client(server, attempts=3) as ours,
        pytest.raises(ChatError, match="HTTP 503: ") as raised,
    ):
        ours.ask(Chat("?"), said)
    assert (raised.value.kind, len(server.calls), ours.counters.failures) == ("status 503", 3, 1)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (chat_server.error(400, "bad field"), "status 400"),
        (chat_server.error(401, f"Incorrect API key provided: {SECRET}"), "status 401"),
        (chat_server.error(429, "insufficient_quota"), "status 429"),
        (chat_server.error(429, "come back tomorrow", Retry_After="86400"), "status 429"),
        (chat_server.endless, "too large"),
        (chat_server.raw(b"x" * 3_000_000, 400), "status 400"),
    ],
)
def test_what_would_stay_bad_is_not_tried_again(answer, kind, monkeypatch):
    monkeypatch.setenv("LENS_CHAT_KEY", SECRET)
    with (
        scripted(answer) as server,
        client(server, max_reply_bytes=1 << 20) as ours,
        pytest.raises(ChatError) as raised,
    ):
        ours.ask(Chat("?"), said)
    assert (raised.value.kind, len(server.calls)) == (kind, 1)
    assert SECRET not in str(raised.value)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("slow", [chat_server.hang, chat_server.trickle])
def test_an_attempt_ends_at_its_time_however_bytes_arrive(slow):
    with scripted(slow, "yes") as server, client(server, timeout=0.6) as ours:
        assert ours.ask(Chat("?"), said) == "yes"
    assert [ours.counters.calls, ours.counters.retries] == [2, 1]


def test_a_server_that_is_not_there():
    with scripted("yes") as server:
        url = server.url
    with ChatClient(url, "m", attempts=2, wait=(0.01, 0.01)) as ours, pytest.raises(ChatError) as raised:
        ours.ask(Chat("?"), said)
    assert raised.value.kind == "connection"
    assert url in str(raised.value)


def test_retry_after_holds_back_the_other_calls_too():
    import time

    times = []

    def answer(_, number):
        times.append(time.monotonic())
        return chat_server.error(429, Retry_After="0.4") if number == 0 else "yes"

    with serving(answer) as server, client(server, concurrency=1, wait=(0.001, 1.0)) as ours:
        ours.ask_all([Chat("a"), Chat("b")], said)
    assert times[1] - times[0] >= 0.4


def test_an_error_takes_its_own_place_alone():
    bad = chat_server.error(400)
    with serving(lambda call, _: bad if call.user == "1" else call.user) as server, client(server) as ours:
        answers = ours.ask_all([Chat(str(k)) for k in range(4)], said)
    assert [a.value for a in answers] == ["0", None, "2", "3"]
    assert [a.error is None for a in answers] == [True, False, True, True]


# ------------------------------------------------------------------------------------------------ what is kept


def whole(reply):
    try:
        return json.loads(reply.text)
    except ValueError:
        raise BadAnswer("not JSON") from None


def test_an_answer_of_the_wrong_form_is_asked_for_again_and_never_cached(tmp_path):
    with scripted("oh", "[1]") as server, client(server, cache=tmp_path) as ours:
        assert ours.ask(Chat("?"), whole) == [1]
        assert ours.ask(Chat("?"), whole) == [1]
        assert len(server.calls) == 2
    with (
        scripted("oh") as server,
        client(server, cache=tmp_path / "b") as ours,
        pytest.raises(ChatError, match="not JSON") as raised,
    ):
        ours.ask(Chat("?"), whole)
    assert raised.value.kind == "answer"
    assert len(server.calls) == 2
    assert not list((tmp_path / "b").rglob("*.json"))


def test_the_cache_goes_by_content(tmp_path):
    other = PICTURE.copy()
    other[0, 0, 0] += 1
    chats = [
        Chat("?", images=(PICTURE,)), Chat("?", images=(other,)), Chat("?", images=(PICTURE.reshape(2, 8, 3),)), Chat("?"),
        Chat("?", "s"), Chat("?", temperature=1.0), Chat("?", sample=1), Chat("?", max_tokens=3),
    ]  # fmt: skip
    with serving(lambda _, n: str(n)) as server, client(server, cache=tmp_path) as ours:
        first = [a.value for a in ours.ask_all(chats, said)]
    assert len(set(first)) == len(server.calls) == len(chats)
    with serving(lambda _, n: "new") as server, client(server, cache=tmp_path) as ours:
        assert [a.value for a in ours.ask_all(chats, said)] == first
        assert ours.ask(Chat("? "), said) == "new"
    assert len(server.calls) == 1
    assert ours.counters.cached == len(chats)


def test_equal_calls_under_way_are_one():
    with serving(lambda _, n: str(n)) as server, client(server) as ours:
        assert [a.value for a in ours.ask_all([Chat("?")] * 5, said)] == ["0"] * 5
    assert len(server.calls) == 1


def test_a_broken_cache_entry_is_named(tmp_path):
    with scripted("yes") as server, client(server, cache=tmp_path) as ours:
        ours.ask(Chat("?"), said)
        (entry,) = tmp_path.rglob("*.json")
        entry.write_text("{")
        with pytest.raises(ChatError, match=entry.name):
            ours.ask(Chat("?"), said)


def test_a_transcript_replays_the_run_failures_and_all(tmp_path):
    path = tmp_path / "log" / "calls.jsonl"
    answers = {"a": "A", "b": chat_server.error(400, "refused"), "c": "C"}
    chats = [Chat(name, images=(PICTURE,)) for name in "abc"]
    with serving(lambda call, _: answers[call.user]) as server, client(server, transcript=path) as ours:
        first = ours.ask_all(chats, said)
    with path.open("ab") as file:
        file.write(b'{"key": "cut o')  # a run that was killed
    again = ChatClient(None, "gpt-4.1-mini", replay=path).ask_all(chats, said)
    assert [a.value for a in again] == [a.value for a in first] == ["A", None, "C"]
    assert (again[1].error.kind, str(again[1].error)) == ("status 400", str(first[1].error))
    with pytest.raises(ChatError, match=r"calls.jsonl: no call"):
        ChatClient(None, "gpt-4.1-mini", replay=path).ask(Chat("d"), said)
    with scripted("D") as server, client(server, transcript=path) as ours:  # appends behind the torn line
        ours.ask(Chat("d"), said)
    assert path.read_bytes().splitlines()[-1].startswith(b"{")
    with pytest.raises(ValueError, match="line 4"):
        read_transcript(path)


def test_tokens_cost_and_budgets():
    with scripted("yes") as server, client(server, max_calls=3) as ours:
        answers = ours.ask_all([Chat(str(k)) for k in range(5)], said)
        assert sorted(a.error.kind if a.error else "" for a in answers) == ["", "", "", "budget", "budget"]
    assert (ours.counters.prompt_tokens, ours.counters.completion_tokens, len(server.calls)) == (300, 60, 3)
    assert ours.counters.cost == pytest.approx((300 * 0.40 + 60 * 1.60) / 1e6)
    with scripted("yes") as server, client(server, prices=(1e4, 0.0), max_cost=1.5, concurrency=1) as ours:
        kinds = [a.error.kind if a.error else "" for a in ours.ask_all([Chat(str(k)) for k in range(3)], said)]
    assert kinds == ["", "", "budget"]  # one USD a call: the second starts below the limit, the third does not
    with scripted(chat_server.text("yes", usage=None)) as server, client(server) as ours:
        ours.ask(Chat("?"), said)
    assert ours.counters.unmetered == 1
    with pytest.raises(ValueError, match="max_cost needs prices"):
        ChatClient("http://127.0.0.1:1/v1", "unknown", max_cost=1.0)


def test_the_key_is_nowhere(tmp_path, monkeypatch, caplog):
    """A server that repeats the key in answers and errors; every file, log line and text is searched."""
    monkeypatch.setenv("LENS_CHAT_KEY", SECRET)
    caplog.set_level(logging.DEBUG)
    bad = chat_server.error(401, f"who is {SECRET}?")
    parts = {"cache": tmp_path / "c", "transcript": tmp_path / "t.jsonl"}
    with (
        serving(lambda call, _: bad if call.user == "b" else f"you are {SECRET}") as server,
        client(server, **parts) as ours,
    ):
        good, ill = ours.ask_all([Chat("a"), Chat("b")], said)
    kept = "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())
    assert len(kept) > 500
    assert good.value == "you are ***"
    for place in (kept, caplog.text, repr(ours), str(ill.error), repr(good)):
        assert SECRET not in place
    monkeypatch.setenv("LENS_CHAT_KEY", "EMPTY")  # what local servers take is no secret, and a word
    with scripted("an EMPTY room") as server, client(server) as ours:
        assert ours.ask(Chat("?"), said) == "an EMPTY room"


def test_an_interrupt_cancels_what_is_under_way_and_the_client_goes_on(tmp_path):
    """Ctrl-C while one call hangs: the answered one is kept, the other is asked for again."""
    import signal
    import threading

    main = threading.main_thread().ident

    def answer(call, number):
        if call.user == "slow" and number < 2:
            threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT)).start()
            return chat_server.hang
        return call.user

    with serving(answer) as server, client(server, cache=tmp_path) as ours:
        with pytest.raises(KeyboardInterrupt):
            ours.ask_all([Chat("quick"), Chat("slow")], said)
        assert [a.value for a in ours.ask_all([Chat("quick"), Chat("slow")], said)] == ["quick", "slow"]
    assert ours.counters.cached == 1


def test_works_where_a_loop_is_running_already():
    import asyncio

    async def notebook():
        with scripted("yes") as server, client(server) as ours:
            return ours.ask(Chat("?"), same).text

    assert asyncio.run(notebook()) == "yes"
