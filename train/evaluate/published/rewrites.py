"""Prompts rewritten by a reasoner before they are drawn: made once, kept in OUT/rewrites_*.jsonl, judged by the original words.

Every answer goes to that file as soon as its batch is there, with the reasoner's name and versions; a later run reads it and
asks for what is missing. A refusal draws nothing, and its images are missing judgements.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lens.chat_client import ChatClient
from lens.reasoner import SYSTEMS, EmbeddedReasoner, Reasoner, Refused, ServerReasoner, system_prompt

from ...loop.checkpoints import write_text
from .drawing import REFUSED, Ask

BATCH = 32  # prompts that are asked for together
OWN = {
    "geneval": "geneval",
    "oneig": "oneig",
    "longtext": "text",
    "cvtg": "text",
}  # the system prompt made for a benchmark


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reasoner",
        default="none",
        metavar="none|gpt-oss|mini|URL",
        help="rewrites prompts: the model's own GPT-OSS encoder, Lens-Mini's encoder, or an OpenAI-compatible server (default: none)",
    )
    parser.add_argument("--reasoner-model", metavar="NAME", help="at the server of --reasoner URL")
    parser.add_argument(
        "--reasoner-prompt", metavar="NAME", help=f"{', '.join(SYSTEMS)}, or a file (default: the benchmark's own)"
    )


def reasoner_of(options: argparse.Namespace, system: str, out: Path) -> Reasoner:
    """Errors: ValueError for a reasoner there is not, or a model whose encoder is not GPT-OSS."""
    from lens import LensPipeline

    kind = options.reasoner
    if kind == "mini":
        return EmbeddedReasoner(LensPipeline.from_pretrained("mini"), system)
    if kind == "gpt-oss":
        made = EmbeddedReasoner(LensPipeline.from_pretrained(options.model, device=options.device), system)
        if not made.instructed:
            raise ValueError(
                f"--reasoner gpt-oss: {options.model} has another text encoder; a released checkpoint has GPT-OSS"
            )
        return made
    if not kind.startswith(("http://", "https://")):
        raise ValueError(f"--reasoner {kind!r}: expected none, gpt-oss, mini or the address of a server")
    if not options.reasoner_model:
        raise ValueError("--reasoner URL needs --reasoner-model")
    client = ChatClient(kind, options.reasoner_model, cache=out / "chat_cache", transcript=out / "reasoner_calls.jsonl")
    return ServerReasoner(client, system)


def read(path: Path) -> dict[str, dict]:
    """Wish -> line of a file of before; a last line that was cut off is left out."""
    found: dict[str, dict] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            values = json.loads(line)
            found[values["wish"]] = values
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return found


def rewritten(
    options: argparse.Namespace, benchmark: str, asks: Sequence[Ask], out: Path, reasoner: Reasoner | None = None
) -> list[Ask]:
    """The asks with what is to be drawn; those that were refused are not drawn. reasoner: in place of the options' (tests)."""
    system = options.reasoner_prompt or OWN[benchmark]
    name = f"{options.reasoner} {options.reasoner_model or ''} {system_prompt(system).name}"
    path = out / f"rewrites_{''.join(c if c.isalnum() else '_' for c in name).strip('_')}.jsonl"
    known = read(path)
    todo = [wish for wish in dict.fromkeys(ask.drawn for ask in asks) if wish not in known]
    for k in range(0, len(todo), BATCH):
        reasoner = reasoner or reasoner_of(options, system, out)
        part = todo[k : k + BATCH]
        for wish, answer in zip(part, reasoner(part), strict=True):
            line: dict[str, str | None] = {"wish": wish}
            if isinstance(answer, Refused):
                line |= {"prompt": None, "refused": f"{answer.category}: {answer.reason}"}
            else:
                line |= {"prompt": answer.prompt, "source": answer.described, "flag": answer.flag}
            known[wish] = line
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in known.values()))
        print(f"rewritten {k + len(part)} of {len(todo)} prompts", flush=True)
    told = [known[ask.drawn] for ask in asks]
    fallen, refused = sum(bool(t.get("flag")) for t in told), sum(t["prompt"] is None for t in told)
    print(
        f"{path}: {len(told)} prompts, {fallen} as they were because the answer was no use, {refused} refused",
        flush=True,
    )
    return [replace(ask, drawn=t["prompt"] or REFUSED) for ask, t in zip(asks, told)]
