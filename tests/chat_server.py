"""A real HTTP server on this machine that answers chat completions as a script says: well, or in every unkind way."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Send = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class Call:
    """One request as it came in."""

    body: dict[str, Any]
    headers: dict[str, str]
    size: int

    @property
    def system(self) -> str:
        return next((m["content"] for m in self.body["messages"] if m["role"] == "system"), "")

    @property
    def user(self) -> str:
        content = self.body["messages"][-1]["content"]
        return content if isinstance(content, str) else content[0]["text"]

    @property
    def images(self) -> list[str]:
        """Data URLs."""
        content = self.body["messages"][-1]["content"]
        return [] if isinstance(content, str) else [part["image_url"]["url"] for part in content[1:]]


@dataclass
class ChatServer:
    """`answer(call, number)` says what each call gets: a text, or one of the ways below. `together`: the most at once."""

    answer: Callable[[Call, int], str | Send]
    url: str = ""
    calls: list[Call] = field(default_factory=list)
    together: int = 0
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)

    def took(self, call: Call) -> int:
        with self._lock:
            self.calls.append(call)
            self._now += 1
            self.together = max(self.together, self._now)
            return len(self.calls) - 1

    def left(self) -> None:
        with self._lock:
            self._now -= 1


@contextmanager
def serving(answer: Callable[[Call, int], str | Send]) -> Iterator[ChatServer]:
    server = ChatServer(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        script = server

        def do_POST(self) -> None:
            size = int(self.headers["Content-Length"])
            call = Call(json.loads(self.rfile.read(size)), {k.lower(): v for k, v in self.headers.items()}, size)
            number = server.took(call)
            try:
                made = server.answer(call, number)
                (text(made) if isinstance(made, str) else made)(self)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                server.left()

        def log_message(self, *_: Any) -> None: ...

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, *_: Any) -> None: ...

    http = Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    try:
        yield server
    finally:
        server.closing.set()
        http.shutdown()
        http.server_close()


# ------------------------------------------------------------------------------------------------ ways to answer


def completion(
    said: str | None, finish: str = "stop", usage: tuple[int, int] | None = (100, 20), **choice: Any
) -> bytes:
    """The body of a whole reply."""
    message = {"role": "assistant", "content": said}
    body: dict[str, Any] = {"choices": [{"index": 0, "message": message, "finish_reason": finish, **choice}]}
    if usage is not None:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return json.dumps({"id": "1", "object": "chat.completion", **body}).encode()


def raw(body: bytes, status: int = 200, length: int | None = None, **headers: str) -> Send:
    """Any bytes; `length` promises another number of them, and the connection ends."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)
        if length is not None:
            handler.close_connection = True

    return send


def text(said: str | None, **more: Any) -> Send:
    return raw(completion(said, **more))


def error(status: int, message: str = "no", **headers: str) -> Send:
    return raw(json.dumps({"error": {"message": message}}).encode(), status, **headers)


def reset(handler: BaseHTTPRequestHandler) -> None:
    """The connection breaks before a byte."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.close()


def hang(handler: Any) -> None:
    """Nothing comes, and the connection stays."""
    handler.script.closing.wait(30)
    handler.close_connection = True


def trickle(handler: Any) -> None:
    """A byte now and then, for ever: no single read is slow."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while not handler.script.closing.wait(0.02):
        handler.wfile.write(b" ")
        handler.wfile.flush()


def endless(handler: Any) -> None:
    """As many bytes as are taken, in chunks, of no announced length."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    block = b"10000\r\n" + b" " * 65536 + b"\r\n"
    while not handler.script.closing.is_set():
        handler.wfile.write(block)
