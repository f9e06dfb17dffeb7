"""Which reader and answerer a command's options name: a server's model, Qwen2.5-VL in a folder, or RapidOCR."""

from __future__ import annotations

import argparse
from pathlib import Path

from lens.chat_client import ChatClient

from .chat_judges import MODEL, ChatJudge, RapidReader, Reader
from .qwen_judge import QwenJudge


def add_arguments(parser: argparse.ArgumentParser, reads: bool = True, soft: bool = True) -> None:
    """reads, soft: whether the benchmark has texts to read, and questions to answer with Yes or No."""
    parser.add_argument("--judge-url", metavar="URL", help="OpenAI-compatible server with a vision model, up to /v1")
    parser.add_argument(
        "--judge-model",
        default=MODEL,
        metavar="NAME|DIR",
        help=f"at that server; without --judge-url, a folder with Qwen2.5-VL's released weights (default: {MODEL})",
    )
    parser.add_argument(
        "--judge-dtype",
        choices=("bfloat16", "float32"),
        help="of a judge in a folder (default: bfloat16 on cuda, as published, else float32)",
    )
    if soft:
        parser.add_argument("--soft", action="store_true", help="the probability of Yes beside each answer")
    else:
        parser.set_defaults(soft=False)
    parser.add_argument("--concurrency", type=int, default=8, help="calls at once (default: 8)")
    parser.add_argument("--max-calls", type=int, help="calls of this run (default: no bound)")
    if reads:
        parser.add_argument(
            "--rapidocr", action="store_true", help="read with RapidOCR instead: a variant, labelled as such"
        )


def judge_of(options: argparse.Namespace, out: Path) -> ChatJudge | QwenJudge:
    """Errors: ValueError without an address or a folder, or where the folder is not Qwen2.5-VL's."""
    if not options.judge_url:
        if not Path(options.judge_model).is_dir():
            raise ValueError(
                "no judge: give --judge-url, the address of a server with a vision model, up to /v1, or --judge-model DIR, "
                f"a folder with Qwen2.5-VL's released weights, got {options.judge_model}"
            )
        if options.max_calls is not None:
            raise ValueError("--max-calls bounds calls to a server: without --judge-url there are none")
        return QwenJudge(
            Path(options.judge_model), options.device, options.judge_dtype, options.soft, out / "judge_cache"
        )
    client = ChatClient(
        options.judge_url,
        options.judge_model,
        concurrency=options.concurrency,
        cache=out / "judge_cache",
        transcript=out / "judge_calls.jsonl",
        max_calls=options.max_calls,
    )
    return ChatJudge(client, options.soft)


def reader_of(options: argparse.Namespace, out: Path, alone: bool = True) -> Reader:
    """alone: nothing but reading is asked of a judge. Errors: as `judge_of`."""
    if not options.rapidocr:
        return judge_of(options, out)
    if alone and options.max_calls is not None:
        raise ValueError("--max-calls bounds calls to a server: with --rapidocr there are none")
    return RapidReader()
