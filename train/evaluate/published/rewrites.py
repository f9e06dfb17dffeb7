"""Prompts rewritten by a reasoner before they are drawn: made once, kept in OUT/rewrites_*.jsonl, judged by the original words.

Every answer goes to that file as soon as its batch is there, with the reasoner's name and versions; a later run reads it and
asks for what is missing. The file's name ends in a hash of what the reasoner is told and, of the model's own encoder, of its
weights, so that another prompt file of the same name begins a file of its own. A refusal draws nothing, and its images are
missing judgements. Where a server's answer was broken the words stay as they were, but until something is drawn of them it is asked
again by the next run; where more than MAX_MISSING are, there is no column.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from lens.chat_client import ChatClient
from lens.formats.fingerprint import fingerprint
from lens.formats.gpt_oss import REASONER
from lens.formats.hub import resolve
from lens.formats.safetensors import open_shards, stored_as
from lens.reasoner import SYSTEMS, EmbeddedReasoner, Reasoner, Refused, ServerReasoner, system_prompt

from ...loop.checkpoints import write_text
from ...loop.clock import Interrupted
from .drawing import REFUSED, Ask, Calls
from .judging import MAX_MISSING

BATCH = 32  # prompts that are asked for together
BROKEN = "broken"  # flag of an answer that is none: no completion, no JSON object, cut off
WORD_TOKENS, ANSWER_TOKENS = (
    40,
    300,
)  # of a wish and of an answer, assumed by the estimate; 4 letters of a system prompt are a token
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


def serves(options: argparse.Namespace) -> bool:
    return options.reasoner.startswith(("http://", "https://"))


def expect_used(options: argparse.Namespace) -> None:
    """Errors: ValueError naming an option that this reasoner does not read, or a reasoner there is not."""
    kind = options.reasoner
    if kind not in ("none", "gpt-oss", "mini") and not serves(options):
        raise ValueError(f"--reasoner {kind!r}: expected none, gpt-oss, mini or the address of a server")
    if options.reasoner_model and not serves(options):
        raise ValueError(f"--reasoner-model is of a server: --reasoner {kind} does not read it; give --reasoner URL")
    if options.reasoner_prompt and kind in ("none", "mini"):
        raise ValueError(f"--reasoner-prompt: --reasoner {kind} reads no system prompt; give gpt-oss or URL")
    if serves(options) and not options.reasoner_model:
        raise ValueError("--reasoner URL needs --reasoner-model")


def calls(options: argparse.Namespace, benchmark: str, every: Collection[Sequence[Ask]]) -> list[Calls]:
    """What the estimate says of the reasoner. every: the prompts of each language."""
    number = sum(len({ask.drawn for ask in asks}) for asks in every)
    read = len(system_prompt(options.reasoner_prompt or OWN[benchmark]).text) // 4 + WORD_TOKENS
    return [Calls("reasoner", number, (read, ANSWER_TOKENS) if serves(options) else None, "rewrites")]


def told_to(options: argparse.Namespace, system: str) -> str:
    """A hash of what decides an answer and is in no name: the system prompt, and the weights of the model's own encoder."""
    text = system_prompt(system).text
    if not serves(options):
        root = resolve("mini" if options.reasoner == "mini" else options.model)
        folders = [folder for name in ("text_encoder", REASONER) if (folder := root / name).is_dir()]
        text += fingerprint({folder.name: stored_as(open_shards(folder)) for folder in folders})
    return hashlib.sha256(text.encode()).hexdigest()[:12]


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
    expect_used(options)
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
    options: argparse.Namespace,
    benchmark: str,
    asks: Sequence[Ask],
    out: Path,
    reasoner: Reasoner | None = None,
    begun: bool = False,
) -> list[Ask]:
    """The asks with what is to be drawn; those that were refused are not drawn. reasoner: in place of the options' (tests).

    begun: images of these rewrites are there, so that none is asked for again. Errors: Interrupted where too many answers of a
    server were broken.
    """
    system = options.reasoner_prompt or OWN[benchmark]
    name = f"{options.reasoner} {options.reasoner_model or ''} {system_prompt(system).name}"
    path = (
        out / f"rewrites_{''.join(c if c.isalnum() else '_' for c in name).strip('_')}_{told_to(options, system)}.jsonl"
    )
    known = read(path)
    if serves(options) and not begun:
        known = {wish: line for wish, line in known.items() if line.get("flag") != BROKEN}
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
    broken = sum(t.get("flag") == BROKEN for t in told) if serves(options) else 0
    if broken > MAX_MISSING * len(told):
        raise Interrupted(
            f"{path}: {broken} of {len(told)} answers of {options.reasoner} were broken, at most {MAX_MISSING:.0%} may be; "
            "the same command asks for them again"
        )
    fallen, refused = sum(bool(t.get("flag")) for t in told), sum(t["prompt"] is None for t in told)
    print(
        f"{path}: {len(told)} prompts, {fallen} as they were because the answer was no use, {refused} refused",
        flush=True,
    )
    return [replace(ask, drawn=t["prompt"] or REFUSED) for ask, t in zip(asks, told)]
