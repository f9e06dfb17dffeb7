"""One image from the web, within limits: bytes, seconds, redirects, and addresses that are public."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

REDIRECTS = 5
AGENT = "lens-curate/1"


class Unreachable(ValueError):
    """A URL that gave no image; the message says why."""


@dataclass(frozen=True)
class FetchLimits:
    """seconds: for the whole of one URL, redirects included. allow_private: also private, loopback and link-local addresses."""

    bytes: int = 64 << 20
    seconds: float = 30.0
    allow_private: bool = False


def fetch(url: str, limits: FetchLimits) -> bytes:
    """The body that an http(s) URL answers with, over at most 5 redirects. Errors: Unreachable.

    A host is resolved once and connected to by the address that was checked, at every redirect anew, so a name cannot lead
    elsewhere between check and use. No proxy is used, no cookie and no credential sent.
    """
    deadline = time.monotonic() + limits.seconds
    for _ in range(REDIRECTS + 1):
        answer = _ask(url, limits, deadline)
        if isinstance(answer, bytes):
            return answer
        url = urljoin(url, answer)
    raise Unreachable(f"more than {REDIRECTS} redirects")


def public_address(host: str, port: int, allow_private: bool) -> str:
    """An address of a host. Errors: Unreachable where it has none, or one that is not public."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise Unreachable(f"no address of {host!r}: {error}") from None
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    for address in addresses if not allow_private else ():
        ip = ipaddress.ip_address(address)
        own = getattr(ip, "ipv4_mapped", None) or ip
        if not own.is_global or own.is_multicast:
            raise Unreachable(f"{host!r} is at {address}, which is not public (--allow-private)")
    return addresses[0]


def _ask(url: str, limits: FetchLimits, deadline: float) -> bytes | str:
    """The body, or where a redirect leads."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
    except ValueError as error:
        raise Unreachable(f"not a URL: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Unreachable(f"expected http or https and a host, got {parts.scheme or 'no scheme'!r}")
    if parts.username or parts.password:
        raise Unreachable("a URL with a user name is not asked")
    address = public_address(parts.hostname, port, limits.allow_private)
    left = deadline - time.monotonic()
    over = Unreachable(f"took longer than {limits.seconds:g} s")
    if left <= 0:
        raise over
    connection = http.client.HTTPConnection(parts.hostname, port, timeout=left)
    stopped = threading.Event()
    try:
        stream = socket.create_connection((address, port), timeout=left)
        if parts.scheme == "https":
            stream = ssl.create_default_context().wrap_socket(stream, server_hostname=parts.hostname)
        connection.sock = stream

        def stop() -> None:  # a server that sends a byte now and then never meets the socket's own timeout
            stopped.set()
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)

        clock = threading.Timer(max(0.0, deadline - time.monotonic()), stop)
        clock.daemon = True
        clock.start()
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            safe = "".join(c if 32 < ord(c) < 127 else _escaped(c) for c in target)
            connection.request(
                "GET", safe, headers={"User-Agent": AGENT, "Accept": "image/*", "Accept-Encoding": "identity"}
            )
            answer = connection.getresponse()
            if answer.status in (301, 302, 303, 307, 308) and (place := answer.getheader("Location")):
                return place
            if answer.status != 200:
                raise Unreachable(f"HTTP {answer.status}")
            body = answer.read(limits.bytes + 1)
            if len(body) > limits.bytes:
                raise Unreachable(f"more than {limits.bytes} bytes")
            expected = answer.getheader("Content-Length")
            if expected and expected.isdigit() and len(body) < int(expected):
                raise over if stopped.is_set() else Unreachable(f"ended after {len(body)} of {expected} bytes")
            if stopped.is_set():
                raise over
            return body
        finally:
            clock.cancel()
    except TimeoutError:
        raise over from None
    except (OSError, http.client.HTTPException, ssl.CertificateError) as error:
        raise over if stopped.is_set() else Unreachable(str(error) or type(error).__name__) from None
    finally:
        connection.close()


def _escaped(letter: str) -> str:
    return "".join(f"%{byte:02X}" for byte in letter.encode("utf-8", "surrogatepass"))
