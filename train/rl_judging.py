"""Who judges a run of stage "rl" and what watches it: the small world's local judge, a server, or the transcript of one.

A server's answers are cached in OUT/judge/cache, so that an iteration that a resume draws again costs nothing, and every call is a
line of OUT/judge/transcript.jsonl (transcript_R.jsonl of rank R), which `--judge FILE` replays without a server. The key comes
from the environment alone (lens/chat_client.py) and is in none of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from lens.arguments import shortened
from lens.chat_client import ChatClient

from .data.prompts import Prompt, read_prompts, write_prompts
from .data.small_world.kinds import CORE
from .evaluate import ocr
from .evaluate.detector import Detector
from .loop.ranks import Ranks
from .rewards.judge import Judge
from .rewards.rubric_judge import RubricJudge, global_rubric
from .rewards.small_world import SmallWorldJudge
from .rewards.small_world_rubrics import GLOBAL, parse, rubrics_of, sentence
from .rewards.small_world_watch import SmallWorldWatch
from .rl_method import Held, Watch
from .rl_prompts import FIRST_SEED, TASKS, VALIDATION_SEED, prompt_of, scenes

LOCAL = "small-world"
OWN_PROMPTS = 600  # of a run that is given none


@dataclass(frozen=True)
class Judging:
    """prompts: what is trained on. client: of a judge over HTTP, whose counters say what was spent."""

    judge: Judge
    global_rubric: str
    prompts: list[Prompt]
    held: Held
    watch: Watch | None
    client: ChatClient | None


def judging(
    recipe: ModuleType, where: str, out: Path, group: Ranks, path: Path | None, subset: str, without: Sequence[str]
) -> Judging:
    """where: "small-world", an address, or a transcript. path: the prompts, None for the small world's, written to OUT once.

    With WATCH "small-world" held-out prompts are scenes of that world. With "none" they are VALIDATION prompts of the whole file,
    chosen by their ids, which no subset trains on. Errors: ValueError naming the option.
    """
    small = recipe.WATCH == "small-world"
    if where == LOCAL and not small:
        raise ValueError(
            f"--judge {LOCAL}: expected WATCH = 'small-world'; give an address such as http://127.0.0.1:8000/v1"
        )
    if path is None and not small:
        raise ValueError("--prompts: expected a file where WATCH is 'none'")
    judge = None if where == LOCAL else rubric_judge(recipe, where, out, group.rank)
    shared = GLOBAL if judge is None else global_rubric()
    if path is None:
        path = out / "prompts.jsonl"
        if group.main and not path.is_file():
            write_prompts(path, [prompt_of(scene) for scene in scenes(OWN_PROMPTS, CORE, TASKS, FIRST_SEED)])
        group.barrier()
    prompts = read_prompts(path, subset, without)
    if judge is None:
        expect_small_world(path, prompts)
    if not small:
        assert judge is not None, "no other judge without the small world"
        own = held_out(read_prompts(path), recipe.VALIDATION)
        kept = {prompt.id for prompt in own}
        prompts = [prompt for prompt in prompts if prompt.id not in kept]
        if not prompts:
            raise ValueError(f"{path}: no prompt is left beside VALIDATION = {recipe.VALIDATION} held-out ones")
        bases = [recipe.BASES[i % len(recipe.BASES)] for i in range(len(own))]
        held = Held([p.prompt for p in own], [(*p.rubrics, shared) for p in own], bases)
        return Judging(judge, shared, prompts, held, None, judge.client)
    detector, count = Detector.load(), recipe.VALIDATION
    own_bases = [recipe.BASES[i % len(recipe.BASES)] for i in range(count)]
    worlds = {base: scenes(count, CORE, TASKS, VALIDATION_SEED, (base, base)) for base in recipe.BASES}
    world = [worlds[base][i] for i, base in enumerate(own_bases)]
    rubrics = [[*map(sentence, rubrics_of(scene)), shared] for scene in world]
    held = Held([scene.caption for scene in world], rubrics, own_bases)
    if judge is not None:
        return Judging(judge, shared, prompts, held, SmallWorldWatch(detector, CORE, world), judge.client)
    local = SmallWorldJudge(detector, CORE, ocr.Reader() if ocr.available() else None)
    return Judging(local, shared, prompts, held, SmallWorldWatch(detector, CORE, world, local), None)


def expect_small_world(path: Path, prompts: Sequence[Prompt]) -> None:
    """Before anything is drawn for the local judge. Errors: ValueError naming the prompt and its rubric that is not of that world."""
    for prompt in prompts:
        for rubric in prompt.rubrics:
            try:
                parse(rubric)
            except ValueError:
                raise ValueError(
                    f"--judge {LOCAL}: {path} ({prompt.id}): {shortened(rubric)}, expected a rubric that `python -m train rl_prompts "
                    "--world mini` writes; a server judges others"
                ) from None


def rubric_judge(recipe: ModuleType, where: str, out: Path, rank: int) -> RubricJudge:
    """By an address or a transcript. It stops nothing by itself: MOST_FAILURES is a share of a whole step, of which it sees a slot.

    Errors: ValueError, which does not repeat an address, since that may hold a key.
    """
    folder = out / "judge"
    if where.startswith(("http://", "https://")):
        name = "transcript.jsonl" if rank == 0 else f"transcript_{rank}.jsonl"
        client = ChatClient(
            where,
            recipe.JUDGE_MODEL,
            concurrency=recipe.JUDGE_CONCURRENCY,
            timeout=recipe.JUDGE_TIMEOUT,
            cache=folder / "cache",
            transcript=folder / name,
        )
    elif Path(where).is_file():
        client = ChatClient(None, recipe.JUDGE_MODEL, replay=Path(where))
    else:
        raise ValueError(f"--judge: expected {LOCAL}, an address such as http://127.0.0.1:8000/v1, or a transcript")
    return RubricJudge(client, recipe.JUDGE_SCORE, max_failed=1.0)


def held_out(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Those with the lowest hash of their ids: the same whatever the order of the file and the subset that is trained on."""
    return sorted(prompts, key=lambda prompt: hashlib.sha256(f"held {prompt.id}".encode()).digest())[:count]


def spent(client: ChatClient) -> str:
    """What this process asked of a server, in a line."""
    own = client.counters
    cost = "cost unknown" if own.cost is None else f"{own.cost:.2f} USD"
    tokens = f"{own.prompt_tokens:,} tokens read and {own.completion_tokens:,} written"
    return f"judge {client.model}: {own.calls:,} calls, {own.cached:,} from the cache, {own.failures:,} failed, {tokens}, {cost}"
