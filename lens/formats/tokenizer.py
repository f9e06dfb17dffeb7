"""``tokenizer/`` -> two tokenizers, special tokens and the chat template: everything that can be wrong is found here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lens.formats import safetensors
from lens.formats.chat_template import MOST_CHARACTERS
from lens.formats.files import CheckpointError, is_there, parse_json, read_bytes, read_json, read_text
from lens.formats.text_encoder import TOKENIZER_KEY

_TOKENIZER_BYTES = 1 << 27
_LONGEST_TOKEN = 1000  # characters of an added token
_MOST_GROWTH = 16  # times that a normalizer may lengthen a text
# What a tokenizer must be able to encode: letters, digits, signs, scripts, a character of four bytes, a control character.
_PROBES = (
    "a red apple, 3 + 4 = 7!\n\t",
    "".join(map(chr, range(32, 127))),
    "é ß 文字 Привет \u0e20\u0e32 \U0001f34e",
    "\x07",
    "",
)


@dataclass(frozen=True)
class TokenizerFiles:
    """``with_markers`` reads control markers in a text as such, ``plain`` as ordinary text; ``template``: the chat template
    and its name, None where the checkpoint has none."""

    with_markers: Any
    plain: Any
    special: dict[str, str]
    template: tuple[str, str] | None


def read_tokenizer(source: Path, vocab_size: int | None = None) -> TokenizerFiles:
    """A tokenizer/ folder, a tokenizer.json, or a text encoder's file that holds one. ``vocab_size``: ids that the text
    encoder has. CheckpointError, here and not at the first prompt, for one that cannot encode or gives other ids."""
    text, path = _text(source)
    _check(parse_json(text, str(path)), path)
    # Two instances, because whether markers in a text count as control tokens is a state of the tokenizer.
    found = [_built(text, path) for _ in range(2)]
    for tokenizer in found:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):  # of BPE: for trainings, it draws other ids every time
            tokenizer.model.dropout = None
    found[1].encode_special_tokens = True
    _probe(found, path)
    largest = max(found[0].get_vocab(with_added_tokens=True).values(), default=-1)
    if vocab_size is not None and largest >= vocab_size:
        raise CheckpointError(
            f"{path}: ids must lie below the text encoder's vocab_size = {vocab_size}, got {largest}: the tokenizer of "
            "another model"
        )
    folder = path.parent
    special = _special(folder / "tokenizer_config.json") if path.suffix == ".json" else {}
    template = folder / "chat_template.jinja"
    if path.suffix != ".json" or not is_there(template):
        return TokenizerFiles(found[0], found[1], special, None)
    return TokenizerFiles(found[0], found[1], special, (read_text(template, 4 * MOST_CHARACTERS), str(template)))


def _text(source: Path) -> tuple[bytes, Path]:
    """The JSON of a tokenizer and the file it is from."""
    if source.is_dir() and is_there(source / "tokenizer.json"):
        source = source / "tokenizer.json"
    if source.suffix == ".json":
        return read_bytes(source, _TOKENIZER_BYTES), source
    if source.is_dir() and not any(source.glob("*.safetensors")):
        return read_bytes(source / "tokenizer.json", _TOKENIZER_BYTES), source
    shards = safetensors.open_shards(source)
    if TOKENIZER_KEY not in shards:
        raise CheckpointError(f"{source}: no tokenizer in it: name a folder with a tokenizer.json with --tokenizer")
    kept: list[torch.Tensor] = []
    shards[TOKENIZER_KEY].read(TOKENIZER_KEY, lambda value: kept.append(value.clone()))
    if kept[0].dtype != torch.uint8:
        raise CheckpointError(f"{source}: {TOKENIZER_KEY} must be bytes, U8, got {kept[0].dtype}")
    return kept[0].numpy().tobytes(), shards[TOKENIZER_KEY].path


def _check(value: dict[str, Any], path: Path) -> None:
    """What would fill the memory before tokenizers refuses it."""
    for token in value.get("added_tokens") or []:
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str) or len(content) > _LONGEST_TOKEN:
            shown = str(content if isinstance(token, dict) else token)[:40]
            raise CheckpointError(
                f"{path}: content of an added token must be a string of at most {_LONGEST_TOKEN} characters, got {shown!r}"
            )
    growth, steps = 1.0, [value.get("normalizer")]
    while steps:
        step = steps.pop()
        if not isinstance(step, dict):
            continue
        if isinstance(step.get("normalizers"), list):
            steps += step["normalizers"]
        if step.get("type") == "Precompiled":
            raise CheckpointError(f"{path}: normalizer: Precompiled, of SentencePiece, is not read")
        pattern = step.get("pattern")
        if step.get("type") == "Replace" and "" in (pattern.values() if isinstance(pattern, dict) else [pattern]):
            raise CheckpointError(f"{path}: normalizer: Replace of an empty pattern")
        if step.get("type") == "Replace":
            growth *= max(1, len(str(step.get("content", ""))))
        if step.get("type") == "Prepend":
            growth += len(str(step.get("prepend", "")))
    if growth > _MOST_GROWTH:
        raise CheckpointError(f"{path}: normalizer: a text may grow {_MOST_GROWTH}-fold, got {growth:g}")


def _panics(error: BaseException) -> bool:
    """tokenizers' own panics are no Exception, so that they pass most handlers."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _built(text: bytes, path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_buffer(text)
    except BaseException as error:
        if not _panics(error):
            raise
        raise CheckpointError(f"{path}: not a tokenizers file: {error}") from None


def _probe(found: list[Any], path: Path) -> None:
    for text in _PROBES:
        try:
            for tokenizer in found:
                tokenizer.encode(text, add_special_tokens=False)
        except BaseException as error:
            if not _panics(error):
                raise
            raise CheckpointError(f"{path}: cannot encode {text!r}: {error}") from None


def _special(path: Path) -> dict[str, str]:
    """Special tokens by name ("pad_token"), of a tokenizer_config.json, which may be missing."""
    config = read_json(path) if is_there(path) else {}
    special: dict[str, str] = {}
    for key, value in config.items():
        if key.endswith("_token") and isinstance(value, str | dict):
            content = value.get("content") if isinstance(value, dict) else value
            if not isinstance(content, str):
                raise CheckpointError(f"{path}: content of {key} must be a string, got {json.dumps(content)[:80]}")
            special[key] = content
    return special
