"""Chat completions, with images, of any OpenAI-compatible server: reasoner, judges, captions, evaluation, search.

A call is a `Chat`, its answer a `Reply`. Whatever goes wrong on the way is a `ChatError` that says what: calls are tried
again with jitter where that can help, each attempt ends after `timeout` seconds however slowly bytes arrive, and a reply
beyond `max_reply_bytes` is refused unread. Replies are cached by content (model, texts, pixels, options; the server's
address is no part of it) and written to a transcript, from which a whole run can be replayed without a server.

The key comes from the environment alone: OPENAI_API_KEY for api.openai.com, LENS_CHAT_KEY for any other server. It is in
no argument, and taken out of every text that is kept or shown. Calls need the extra `llm` (openai, tenacity); replaying
does not.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import email.utils
import hashlib
import io
import json
import os
import random
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import numpy as np

from .formats.files import write_json

T = TypeVar("T")

OPENAI = "api.openai.com"
PRICES = {"gpt-4.1-mini": (0.40, 1.60), "gpt-4.1": (2.00, 8.00)}  # USD per million tokens read and written, 2026-11
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529)  # statuses that another attempt may not meet
_ERROR_BYTES = 16 << 10  # of an error's body are read at most
_SECRET = 8  # characters from which on a key is one
_LOGPROB = 1e-3  # above 0 by rounding at most
_JITTER = random.SystemRandom()  # waiting times only: no seeded generator is drawn from


class ChatError(Exception):
    """A call that brought nothing. ``kind``: "connection", "timeout", "status 429", "malformed", "too large", "answer"
    (refused by the caller's parser), "budget", "replay"."""

    def __init__(self, kind: str, message: str, again: bool = False, wait: float | None = None):
        super().__init__(message)
        self.kind, self.again, self.wait = kind, again, wait


class BadAnswer(ValueError):
    """What a parser raises for an answer that is not of the form asked for: the call is tried again, and not cached."""


@dataclass(frozen=True)
class Chat:
    """One call: a system prompt, the user's text, images uint8 [H, W, 3] after it, and how to answer."""

    user: str
    system: str = ""
    images: tuple[np.ndarray, ...] = ()
    schema: Mapping[str, Any] | None = None  # a JSON schema the answer must follow, asked for strictly
    temperature: float | None = 0.0  # None: the server's own; some reasoning models refuse the field
    max_tokens: int | None = 1024
    seed: int | None = None
    top_logprobs: int = 0  # alternatives to report beside each token of the answer
    sample: int = 0  # tells repeated draws of one call apart in the cache

    def __post_init__(self) -> None:
        for image in self.images:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(f"Chat: images must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")

    def content(self, model: str) -> dict[str, Any]:
        """What decides the answer, as JSON values; images as the SHA-256 of their shape and pixels."""
        values = {
            name: getattr(self, name) for name in ("system", "user", "temperature", "max_tokens", "seed", "sample")
        }
        digests = [hashlib.sha256(f"{i.shape}".encode() + i.tobytes()).hexdigest() for i in self.images]
        return {"model": model, **values, "schema": self.schema, "top_logprobs": self.top_logprobs, "images": digests}

    def key(self, model: str) -> str:
        """SHA-256 of `content`."""
        return hashlib.sha256(json.dumps(self.content(model), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Reply:
    """An answer. finish: "stop", "length", "content_filter" ...; logprobs: per token its text and the log-probabilities
    of the alternatives, itself among them."""

    text: str
    finish: str = "stop"
    refusal: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    logprobs: tuple[tuple[str, dict[str, float]], ...] = ()

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "completion_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"Reply: {name} must be at least 0, got {getattr(self, name)}")
        for _, best in self.logprobs:
            for token, logprob in best.items():
                if not logprob <= _LOGPROB:  # NaN, too
                    raise ValueError(f"Reply: log-probability of {token!r} must be at most 0, got {logprob}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Reply:
        """From `asdict`, through JSON. Errors: TypeError, KeyError or ValueError."""
        return cls(**{**values, "logprobs": tuple((token, dict(best)) for token, best in values["logprobs"])})


@dataclass(frozen=True)
class Answer(Generic[T]):
    """Of one of many calls: what the parser made of the reply, or the error that is in its place."""

    value: T | None
    error: ChatError | None
    reply: Reply | None = None


@dataclass
class Counters:
    """What was spent. cost: USD by ``prices``, None where the model's are unknown; unmetered: replies that did not say
    their tokens, and are therefore missing from tokens and cost."""

    calls: int = 0  # attempts that reached for the server
    cached: int = 0
    retries: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unmetered: int = 0
    cost: float | None = None


def data_url(image: np.ndarray) -> str:
    """uint8 [H, W, 3] -> a PNG as a data URL."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def same(reply: Reply) -> Reply:
    """The parser that takes any answer."""
    return reply


class ChatClient:
    """Calls to one model of one server, `concurrency` at a time. Threads may share it; close it, or use it in `with`."""

    def __init__(
        self,
        url: str | None,
        model: str,
        *,
        concurrency: int = 8,
        timeout: float = 120.0,
        attempts: int = 5,
        answer_attempts: int = 2,
        wait: tuple[float, float] = (0.5, 30.0),
        max_reply_bytes: int = 8 << 20,
        cache: Path | None = None,
        transcript: Path | None = None,
        replay: Path | None = None,
        prices: tuple[float, float] | None = None,
        max_calls: int | None = None,
        max_cost: float | None = None,
    ):
        """url: up to and with "/v1"; unread where ``replay`` names a transcript, which then answers alone.

        timeout: seconds of one attempt, all in all. attempts: of a call whose transport fails; answer_attempts: of one
        whose answer the parser refuses. wait: seconds, the first and the longest wait between attempts; a server that
        asks (Retry-After) for more than the longest has failed. prices: USD per million tokens (read, written); None:
        those of PRICES. max_calls, max_cost: what the counters may reach before calls are refused. ValueError for an
        address that carries a key.
        """
        for name, value, least in (
            ("concurrency", concurrency, 1),
            ("attempts", attempts, 1),
            ("answer_attempts", answer_attempts, 1),
        ):
            if value < least:
                raise ValueError(f"ChatClient: {name} must be at least {least}, got {value}")
        if url is None and replay is None:
            raise ValueError("ChatClient: give the address of a server, or a transcript to replay")
        self.url, self.model, self.timeout = url, model, timeout
        self.concurrency, self.attempts, self.answer_attempts, self.wait = concurrency, attempts, answer_attempts, wait
        self.max_reply_bytes, self.cache, self.transcript = max_reply_bytes, cache, transcript
        self.max_calls, self.max_cost = max_calls, max_cost
        self.prices = prices or PRICES.get(model)
        if self.prices is not None and not all(price >= 0 for price in self.prices):  # NaN would be no bound
            raise ValueError(f"ChatClient: prices must be at least 0, got {self.prices}")
        if max_cost is not None and self.prices is None:
            raise ValueError(f"ChatClient: max_cost needs prices, and those of {model!r} are not known: give prices")
        self.counters = Counters(cost=None if self.prices is None else 0.0)
        self._recorded = None if replay is None else read_transcript(replay)
        self._replay = replay
        self._secret = "" if url is None or replay is not None else _key(url)
        self._server: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._pending: dict[str, asyncio.Task[Reply]] = {}
        self._not_before = 0.0  # loop time until which a server asked all of us to wait

    def __enter__(self) -> ChatClient:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ChatClient({self.url!r}, {self.model!r})"

    # ------------------------------------------------------------------------------------------------ calls

    def ask(self, chat: Chat, parse: Callable[[Reply], T]) -> T:
        """One call. Errors: ChatError."""
        (answer,) = self.ask_all([chat], parse)
        if answer.error is not None:
            raise answer.error
        assert answer.reply is not None
        return parse(answer.reply)

    def ask_all(
        self, chats: Sequence[Chat], parse: Callable[[Reply], T] | Sequence[Callable[[Reply], T]]
    ) -> list[Answer[T]]:
        """Many calls, in order, with one parser for all or one each; equal ones that are under way together are made once.

        An error takes the place of its own answer alone. Ctrl-C cancels what is under way; what was answered stays in
        cache and transcript.
        """
        if self._recorded is None:
            require_extra()
        parsers = [parse] * len(chats) if callable(parse) else list(parse)
        if len(parsers) != len(chats):
            raise ValueError(f"ask_all: {len(parsers)} parsers for {len(chats)} calls")
        return self._run(self._all(chats, parsers))

    async def _all(self, chats: Sequence[Chat], parsers: Sequence[Callable[[Reply], T]]) -> list[Answer[T]]:
        gate = asyncio.Semaphore(self.concurrency)

        async def one(chat: Chat, parse: Callable[[Reply], T]) -> Answer[T]:
            async with gate:
                try:
                    reply = await self._reply(chat, parse)
                    return Answer(parse(reply), None, reply)
                except ChatError as error:
                    self.counters.failures += 1
                    return Answer(None, error)

        return list(await asyncio.gather(*map(one, chats, parsers)))

    async def _reply(self, chat: Chat, parse: Callable[[Reply], Any]) -> Reply:
        key = chat.key(self.model)
        if self._recorded is not None:
            return self._replayed(key, parse)
        if key in self._pending:
            shared = self._pending[key]
            try:
                reply = await asyncio.shield(shared)
                self.counters.cached += 1
                return reply
            except asyncio.CancelledError:
                if not shared.cancelled():  # we are, not the one that asks for us
                    raise
        self._pending[key] = task = asyncio.ensure_future(self._fresh(key, chat, parse))
        try:
            return await task
        finally:
            if self._pending.get(key) is task:
                del self._pending[key]

    async def _fresh(self, key: str, chat: Chat, parse: Callable[[Reply], Any]) -> Reply:
        """From the cache, else from the server; into cache and transcript."""
        began, path, problems = time.monotonic(), self._cached_at(key), list[str]()
        reply = None if path is None else _read_reply(path)
        found = reply is not None and _fits(reply, parse)
        try:
            if found:
                self.counters.cached += 1
            else:
                reply = await self._called(chat, parse, problems)
                if path is not None:
                    await asyncio.to_thread(write_json, path, {"key": key, "reply": asdict(reply)})
        except ChatError as error:
            self._note(key, chat, began, problems, error=error)
            raise
        assert reply is not None
        self._note(key, chat, began, problems, reply=reply, cached=found)
        return reply

    async def _called(self, chat: Chat, parse: Callable[[Reply], Any], problems: list[str]) -> Reply:
        from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt

        body = await asyncio.to_thread(self._body, chat)
        bad = 0

        def pause(state: RetryCallState) -> float:
            """Exponential, with full jitter; what the server asked for where it did."""
            error = state.outcome.exception() if state.outcome else None
            asked = error.wait if isinstance(error, ChatError) else None
            first, longest = self.wait
            jitter = _JITTER.uniform(0, min(longest, first * 2**state.attempt_number))
            return jitter if asked is None else asked + _JITTER.uniform(0, first)

        def worth(error: BaseException) -> bool:
            return isinstance(error, ChatError) and error.again

        tries = AsyncRetrying(
            retry=retry_if_exception(worth), wait=pause, stop=stop_after_attempt(self.attempts), reraise=True
        )
        async for attempt in tries:
            with attempt:
                if attempt.retry_state.attempt_number > 1:
                    self.counters.retries += 1
                try:
                    reply = await self._attempt(body)
                    try:
                        parse(reply)
                    except BadAnswer as error:
                        bad += 1
                        raise ChatError("answer", self._clean(str(error)), bad < self.answer_attempts) from None
                except ChatError as error:
                    problems.append(f"{error.kind}: {error}")
                    raise
                return reply
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, body: dict[str, Any]) -> Reply:
        loop = asyncio.get_running_loop()
        while (left := self._not_before - loop.time()) > 0:
            await asyncio.sleep(left)
        self._expect_budget()
        self.counters.calls += 1
        try:
            raw = await asyncio.wait_for(self._post(body), self.timeout)
        except asyncio.TimeoutError:
            raise ChatError("timeout", f"{self.url}: no whole reply within {self.timeout:g} s", again=True) from None
        except ChatError as error:
            if error.wait is not None and error.again:
                self._not_before = max(self._not_before, loop.time() + error.wait)
            raise
        reply = self._read(raw)
        self.counters.prompt_tokens += reply.prompt_tokens
        self.counters.completion_tokens += reply.completion_tokens
        self.counters.unmetered += not reply.prompt_tokens
        if self.prices is not None:
            self.counters.cost = (self.counters.cost or 0.0) + self._cost(reply, self.prices)
        return reply

    def _cost(self, reply: Reply, prices: tuple[float, float]) -> float:
        """USD."""
        return (reply.prompt_tokens * prices[0] + reply.completion_tokens * prices[1]) / 1e6

    def _expect_budget(self) -> None:
        spent = self.counters
        if self.max_calls is not None and spent.calls >= self.max_calls:
            raise ChatError("budget", f"{self.model}: all {self.max_calls} calls of the budget are made")
        if self.max_cost is not None and (spent.cost or 0.0) >= self.max_cost:
            raise ChatError("budget", f"{self.model}: {spent.cost:.4f} of {self.max_cost:g} USD are spent")

    # ------------------------------------------------------------------------------------------------ wire

    def _body(self, chat: Chat) -> dict[str, Any]:
        content: Any = chat.user
        if chat.images:
            pictures = [{"type": "image_url", "image_url": {"url": data_url(i)}} for i in chat.images]
            content = [{"type": "text", "text": chat.user}, *pictures]
        messages = [{"role": "system", "content": chat.system}] if chat.system else []
        body: dict[str, Any] = {"model": self.model, "messages": [*messages, {"role": "user", "content": content}]}
        if chat.temperature is not None:
            body["temperature"] = chat.temperature
        if chat.max_tokens is not None:  # the newer name is OpenAI's alone, whose newer models refuse the older
            openai = urlsplit(self.url or "").hostname == OPENAI
            body["max_completion_tokens" if openai else "max_tokens"] = chat.max_tokens
        if chat.seed is not None:
            body["seed"] = chat.seed
        if chat.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": chat.top_logprobs}
        if chat.schema is not None:
            form = {"name": "answer", "strict": True, "schema": chat.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        return body

    async def _post(self, body: dict[str, Any]) -> bytes:
        """The bytes of one reply. Errors: ChatError."""
        import openai

        if self._server is None:
            self._server = openai.AsyncOpenAI(
                api_key=self._secret or "none",
                base_url=self.url,
                organization="",
                project="",
                max_retries=0,
                timeout=self.timeout,
                default_headers={"Accept-Encoding": "identity"},  # nothing may swell while it is read
                http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [self._expect_success]}),
            )
        raw = bytearray()
        try:
            async with self._request(body) as response:
                async for chunk in response.iter_bytes(1 << 16):
                    raw += chunk
                    if len(raw) > self.max_reply_bytes:
                        raise ChatError("too large", f"{self.url}: more than {self.max_reply_bytes} bytes of reply")
        except openai.APITimeoutError:
            raise ChatError("timeout", f"{self.url}: no reply within {self.timeout:g} s", again=True) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__
            if isinstance(cause, ChatError):
                raise cause from None
            raise ChatError("connection", f"{self.url}: {self._clean(repr(cause or error))}", again=True) from None
        except openai.OpenAIError as error:
            raise ChatError("connection", f"{self.url}: {self._clean(repr(error))}") from None
        except Exception as error:  # a connection that breaks in the middle raises the HTTP library's own errors
            if isinstance(error, ChatError):
                raise
            raise ChatError("connection", f"{self.url}: {self._clean(repr(error))}", again=True) from None
        return bytes(raw)

    def _request(self, body: dict[str, Any]) -> Any:
        """What is entered for one response."""
        return self._server.chat.completions.with_streaming_response.create(**body)

    async def _expect_success(self, response: Any) -> None:
        """Called with each response before its body is read."""
        status = response.status_code
        if status < 400:
            return
        raw = bytearray()
        async for chunk in response.aiter_bytes():
            raw += chunk
            if len(raw) > _ERROR_BYTES:
                break
        said = self._clean(" ".join(raw[:_ERROR_BYTES].decode("utf-8", "replace").split())[:500])
        wait = _retry_after(response.headers)
        message, longest = f"{self.url}: HTTP {status}: {said}", max(self.wait)
        again = status in _AGAIN and "insufficient_quota" not in said
        if again and wait is not None and wait > longest:
            message += f" (it asks to wait {wait:g} s, longer than {longest:g} s)"
            again = False
        raise ChatError(f"status {status}", message, again, wait)

    def _read(self, raw: bytes) -> Reply:
        """The body of a reply. Errors: ChatError "malformed"."""
        try:
            body = json.loads(raw)
            choice = body["choices"][0]
            message, usage = choice["message"], body.get("usage") or {}
            listed = (choice.get("logprobs") or {}).get("content") or []
            reply = Reply(
                text=self._clean(_text(message.get("content"))),
                finish=str(choice.get("finish_reason") or "stop"),
                refusal=self._clean(_text(message.get("refusal"))) or None,
                prompt_tokens=int(usage.get("prompt_tokens") or 0),
                completion_tokens=int(usage.get("completion_tokens") or 0),
                logprobs=tuple(
                    (str(t["token"]), {str(a["token"]): float(a["logprob"]) for a in [t, *t.get("top_logprobs", ())]})
                    for t in listed
                ),
            )
            for text in (reply.text, reply.refusal or ""):
                text.encode()  # half of a character cannot be shown, sent or stored
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            said = self._clean(raw[:200].decode("utf-8", "replace"))
            raise ChatError("malformed", f"{self.url}: no chat completion ({error!r}): {said!r}", again=True) from None
        return reply

    def _clean(self, text: str) -> str:
        """Without the key, which a server may repeat. What local servers take as a key ("EMPTY") is no secret, but a word."""
        return text.replace(self._secret, "***") if len(self._secret) >= _SECRET else text

    # ------------------------------------------------------------------------------------------------ what is kept

    def _cached_at(self, key: str) -> Path | None:
        return None if self.cache is None else self.cache / key[:2] / f"{key}.json"

    def _note(
        self,
        key: str,
        chat: Chat,
        began: float,
        problems: list[str],
        reply: Reply | None = None,
        error: ChatError | None = None,
        cached: bool = False,
    ) -> None:
        """One line of the transcript."""
        if self.transcript is None:
            return
        line = {"key": key, "chat": chat.content(self.model), "seconds": round(time.monotonic() - began, 3)}
        line |= {"cached": cached, "problems": problems, "reply": None if reply is None else asdict(reply)}
        line["error"] = None if error is None else {"kind": error.kind, "message": str(error)}
        with self._lock:
            self.transcript.parent.mkdir(parents=True, exist_ok=True)
            with self.transcript.open("a+b") as file:
                if file.tell() and not _ends_a_line(file):  # of a run that was killed while it wrote
                    file.write(b"\n")
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def _replayed(self, key: str, parse: Callable[[Reply], Any]) -> Reply:
        assert self._recorded is not None
        lines = self._recorded.get(key)
        if not lines:
            raise ChatError("replay", f"{self._replay}: no call with the key {key}: this run asks something else")
        line = lines.pop(0) if len(lines) > 1 else lines[0]
        self.counters.cached += 1
        if isinstance(line, ChatError):
            raise line
        if not _fits(line, parse):
            raise ChatError("replay", f"{self._replay}: the answer with the key {key} is not of the form asked for")
        return line

    # ------------------------------------------------------------------------------------------------ loop

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """On a loop in a thread of its own, so that callers may have one themselves (a notebook does)."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_turn, args=(self._loop,), name="lens-chat", daemon=True).start()
        future: concurrent.futures.Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Close connections and end the thread; a later call opens them again."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is None:
            return
        if self._server is not None:
            asyncio.run_coroutine_threadsafe(self._server.close(), loop).result()
            self._server = None
        loop.call_soon_threadsafe(loop.stop)


# ------------------------------------------------------------------------------------------------ files and helpers


def _turn(loop: asyncio.AbstractEventLoop) -> None:
    """A thread's whole work: the loop until it is stopped."""
    loop.run_forever()
    loop.close()


def require_extra() -> None:
    """ImportError that names the extra, where openai or tenacity is missing."""
    try:
        import openai  # noqa: F401
        import tenacity  # noqa: F401
    except ImportError as error:
        raise ImportError(f"calls to a chat server need the extra llm: pip install 'lens-t2i[llm]' ({error})") from None


def read_transcript(path: Path) -> dict[str, list[Reply | ChatError]]:
    """Key -> what its calls brought, in order. A last line that was cut off is left out; ValueError for any other that is
    none of a transcript."""
    found: dict[str, list[Reply | ChatError]] = {}
    raw = path.read_bytes()
    for number, line in enumerate(raw.splitlines(), 1):
        try:
            values = json.loads(line)
            error = values["error"]
            made = Reply.of(values["reply"]) if error is None else ChatError(error["kind"], error["message"])
            found.setdefault(values["key"], []).append(made)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if line and not (number == raw.count(b"\n") + 1 and not raw.endswith(b"\n")):
                raise ValueError(f"{path}, line {number}: not of a transcript: {error!r}") from None
    return found


def _text(value: Any) -> str:
    """A field that may be missing. Errors: TypeError."""
    if not isinstance(value, str | None):
        raise TypeError(f"expected text, got {type(value).__name__}")
    return value or ""


def _ends_a_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


def _read_reply(path: Path) -> Reply | None:
    if not path.exists():
        return None
    try:
        return Reply.of(json.loads(path.read_text(encoding="utf-8"))["reply"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ChatError("replay", f"{path}: not an entry of this cache, delete it: {error!r}") from None


def _fits(reply: Reply, parse: Callable[[Reply], Any]) -> bool:
    try:
        parse(reply)
    except BadAnswer:
        return False
    return True


def _key(url: str) -> str:
    """The key for a server, from the environment; "" where there is none."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("ChatClient: url must be like http://127.0.0.1:8000/v1")  # not repeated: it may hold a key
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            "ChatClient: url must hold neither user, password nor query: a key belongs in the environment variable "
            f"{'OPENAI_API_KEY' if parts.hostname == OPENAI else 'LENS_CHAT_KEY'}"
        )
    return os.environ.get("OPENAI_API_KEY" if parts.hostname == OPENAI else "LENS_CHAT_KEY", "")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait, or None: a number, or an HTTP date."""
    text = headers.get("retry-after")
    if text is None:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
        except (TypeError, ValueError):
            return None
