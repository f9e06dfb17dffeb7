"""Images from any server that speaks OpenAI's images API, with the retries, budget and cache of the chat client.

A prompt and its seed are one call. OpenAI's own models take no seed, so there an image is the same only out of the cache; other
servers are sent one. An image must come within the reply (b64_json): an address is not followed.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from lens.chat_client import OPENAI, BadAnswer, Chat, ChatClient, ChatError, Reply

from .data.images import Unusable, decoded

REFUSED = ("content_policy", "moderation", "safety")  # in an error of status 400: this prompt alone is not drawn


class ImageClient(ChatClient):
    """Calls to one image model of one server."""

    def __init__(
        self,
        url: str,
        model: str,
        cache: Path,
        concurrency: int = 8,
        max_calls: int | None = None,
        max_cost: float | None = None,
        price: float | None = None,
    ):
        """url: up to and with "/v1". price: USD an image; max_cost needs it. Errors: ValueError for an address that carries a key."""
        more: dict[str, Any] = {"timeout": 300.0, "max_reply_bytes": 64 << 20, "max_calls": max_calls}
        if price is not None:
            if not price >= 0:  # NaN would be no bound
                raise ValueError(f"ImageClient: price must be at least 0, got {price}")
            more["prices"] = (0.0, 0.0)  # tokens cost nothing beside it
        super().__init__(url, model, cache=cache, concurrency=concurrency, max_cost=max_cost, **more)
        self.price = price or 0.0

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray | None]:
        """uint8 [H, W, 3] of each; None where the server's policy refuses the prompt. Errors: ChatError."""
        chats = [Chat(prompt, seed=seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        images: list[np.ndarray | None] = []
        for answer in self.ask_all(chats, pixels_of):
            error = answer.error
            if error is not None and not (error.kind == "status 400" and any(w in str(error) for w in REFUSED)):
                raise error
            images.append(None if answer.reply is None else pixels_of(answer.reply))
        return images

    def _cost(self, reply: Reply, prices: tuple[float, float]) -> float:
        return self.price

    def _body(self, chat: Chat) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "prompt": chat.user, "n": 1}
        own = urlsplit(self.url or "").hostname == OPENAI
        if not own or self.model.startswith("dall-e"):  # its later models answer so, and refuse the field
            body["response_format"] = "b64_json"
        return body if own else {**body, "extra_body": {"seed": chat.seed}}

    def _request(self, body: dict[str, Any]) -> Any:
        return self._server.images.with_streaming_response.generate(**body)

    def _read(self, raw: bytes) -> Reply:
        try:
            text = json.loads(raw)["data"][0]["b64_json"]
            if not isinstance(text, str):
                raise TypeError(f"b64_json is {type(text).__name__}")
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            said = self._clean(raw[:200].decode("utf-8", "replace"))
            raise ChatError("malformed", f"{self.url}: no image as b64_json ({error!r}): {said!r}") from None
        return Reply(text)


def pixels_of(reply: Reply) -> np.ndarray:
    """uint8 [H, W, 3]. Errors: BadAnswer."""
    try:
        return np.array(decoded(base64.b64decode(reply.text, validate=True)))
    except (Unusable, binascii.Error) as error:
        raise BadAnswer(f"not a picture: {error}") from None
