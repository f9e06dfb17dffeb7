"""A search on the small world alone: its wishes, its local judge, and two scripts where language models would stand.

`LiteralWriter` is the reasoner: it knows the sentences of RULES, looks for their instructions in the system prompt, and does what each
says, word by word; what a system prompt says otherwise it does not understand. `ScriptedRewriter` writes system prompts: it counts
which rubrics failed, and adds the instruction that is known to be about them, or another one when that was tried. Neither is a
language model: what a search with them shows is that the loop finds, from pictures and their judgements, which way of writing
prompts a model draws better.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from lens.chat_client import Chat, Reply
from lens.reasoner import Refined, Refused

from ..data.small_world.backdrops import PLAIN, allowed
from ..data.small_world.kinds import CORE, KINDS, PALETTE
from ..evaluate.detector import Detector
from ..rewards.judge import Scores
from ..rewards.small_world import SmallWorldJudge
from ..rewards.small_world_rubrics import GLOBAL, rubrics_of, sentence
from ..rl_prompts import TASKS, VALIDATION_SEED, scenes
from .loop import GENERATOR_REFUSED, Item

T = TypeVar("T")
FULFILLED = 0.9  # below it a rubric is shown to the rewriter: the judge is soft, and hardly ever says 1
START = "You turn a wish for a picture into a prompt.\n\n- Repeat the wish as it stands."
_NOUN = {word: name for name, kind in KINDS.items() for word in (kind.noun, kind.plural)}


@dataclass(frozen=True)
class Wish:
    """What the script understands of a wish: its objects as (class, colour), as many as are named, and how many there are."""

    text: str
    objects: tuple[tuple[str, str | None], ...]
    several: bool

    @property
    def subject(self) -> str:
        """Without GenEval's opening."""
        return self.text.removeprefix("a photo of ")

    @property
    def under(self) -> str:
        return "each object" if self.several else f"the {KINDS[self.objects[0][0]].noun}"


def understood(text: str) -> Wish:
    """Errors: ValueError for a wish without an object of the world."""
    nouns = "|".join(sorted(map(re.escape, _NOUN), key=len, reverse=True))
    found = re.findall(rf"\b(?:({'|'.join(PALETTE)}) )?({nouns})\b", text)
    if not found:
        raise ValueError(f"{text!r}: expected a wish for objects of the small world")
    objects = tuple((_NOUN[noun], colour or KINDS[_NOUN[noun]].natural) for colour, noun in found)
    several = len(objects) > 1 or re.search(r"\b(two|three|four|five)\b", text) is not None
    return Wish(text, objects, several)


def backdrop(wish: Wish) -> str:
    """The plain colour that all objects stand out from; the first of all where there is none."""
    fits = [name for name in PLAIN if all(name in allowed(kind, colour) for kind, colour in wish.objects)]
    return (fits or list(PLAIN))[0]


@dataclass(frozen=True)
class Rule:
    """An instruction of a system prompt, what is done by it, and words of the rubrics that it is about."""

    instruction: str
    write: Callable[[Wish], str]  # a sentence; for an opening, in place of the wish
    about: tuple[str, ...]
    opens: bool = False


RULES = (
    Rule(
        "Open with a full sentence about what the picture shows.",
        lambda wish: f"The picture shows {wish.subject}.",
        ("exactly", "shows"),
        opens=True,
    ),
    Rule(
        "Name a plain background of a colour that none of the objects has.",
        lambda wish: f"The background is a plain {backdrop(wish)} wall.",
        ("background", "stands out", "outline"),
    ),
    Rule("Say that nothing else is in view.", lambda wish: "Nothing else is in view.", ("no object but",)),
    Rule(
        "Describe the surface and the outline of the objects.",
        lambda wish: " ".join(
            f"The {noun} has clear outlines." for noun in dict.fromkeys(KINDS[kind].noun for kind, _ in wish.objects)
        ),
        ("outline", "torn", "another kind"),
    ),
    Rule(
        "Ask for soft even light and a shadow.",
        lambda wish: f"Soft even light fills the picture. A soft shadow lies below {wish.under}.",
        ("coherent", "torn"),
    ),
    Rule(
        "Name the style of drawing.",
        lambda wish: "The picture is drawn in a smooth 3D icon style.",
        ("outline", "coherent"),
    ),
    Rule(
        "Set the scene at night under many stars.",
        lambda wish: "The background is a dark night sky full of stars.",
        ("stands out", "background"),
    ),
    Rule("Speak of the mood.", lambda wish: "The mood is calm and friendly.", ("coherent",)),
)


class LiteralWriter:
    """`Reasoner` by script: the wish, or what the opening's rule makes of it, and a sentence for each rule of the system prompt."""

    def __init__(self, path: Path):
        """path: a file with a system prompt."""
        told = path.read_text(encoding="utf-8")
        self.rules = [rule for rule in RULES if rule.instruction in told]

    def __call__(self, wishes: Sequence[str]) -> list[Refined | Refused]:
        return [Refined(text, self.written(understood(text)), "script") for text in wishes]

    def written(self, wish: Wish) -> str:
        opening = next((rule.write(wish) for rule in self.rules if rule.opens), wish.text)
        more = [rule.write(wish) for rule in self.rules if not rule.opens]
        return " ".join([opening if opening.endswith(".") or not more else f"{opening}.", *more])


class ScriptedRewriter:
    """`Writer` by script: of the rules that are not in the system prompt the one that most is lost for, and in later attempts the
    ones after it. Lost is 1 - value of every rubric shown that a rule is about."""

    def ask(self, chat: Chat, parse: Callable[[Reply], T]) -> T:
        told = json.loads(chat.user)
        texts = [text for failure in told["failures"] for text in failure["failed"] if text != GENERATOR_REFUSED]
        failed = [text.rpartition(": ") for text in texts]
        absent = [rule for rule in RULES if rule.instruction not in told["system_prompt"]]
        if not absent:
            return parse(Reply(json.dumps({"diagnosis": "no rule is left", "prompt": told["system_prompt"]})))

        def lost(rule: Rule) -> float:
            return sum(1 - float(value) for text, _, value in failed if any(words in text for words in rule.about))

        rule = sorted(absent, key=lost, reverse=True)[(chat.sample - 1) % len(absent)]
        diagnosis = (
            f"{lost(rule):.1f} of {sum(1 - float(v) for *_, v in failed):.1f} lost speak for: {rule.instruction}"
        )
        prompt = f"{told['system_prompt'].rstrip()}\n- {rule.instruction}"
        return parse(Reply(json.dumps({"diagnosis": diagnosis, "prompt": prompt})))


class ReasonedJudge:
    """`Judge`: the small world's, with a reason for every rubric instead of one for those that failed."""

    def __init__(self, judge: SmallWorldJudge):
        self.judge = judge

    def score(self, prompts: Sequence[str], rubrics: Sequence[Sequence[str]], images: Sequence[np.ndarray]) -> Scores:
        found = self.judge.score(prompts, rubrics, images)
        reasons = [[f"{value:.2f}" for value in row[: len(own)]] for row, own in zip(found.per_rubric, rubrics)]
        return Scores(found.score, found.valid, found.per_rubric, reasons)


def local_judge() -> ReasonedJudge:
    return ReasonedJudge(SmallWorldJudge(Detector.load(), CORE))


def wishes(count: int) -> list[Item]:
    """Wishes of the small world with the rubrics of its judge, from the seeds that choose checkpoints and train nothing."""
    made = scenes(count, CORE, TASKS, VALIDATION_SEED, (128, 128))
    return [Item(f"mini-{s.seed}", s.caption, (*map(sentence, rubrics_of(s)), GLOBAL)) for s in made]
