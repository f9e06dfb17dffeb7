"""How well a reasoner writes: the acceptance measure of the stage "reasoner", on wishes that its training never saw.

    python -m train reasoner --accept mini --json scores.json

Captions of held-out scenes in their brief and GenEval's form, whose answers are read back (data/small_world/dense_reading.py)
and held against the scene; open wishes in phrasings that are held out, whose answer fits where it has the things of the wish's scene;
words without meaning here. What an answer keeps is asked of those alone of which the
reasoner was sure: the user's words stay for the others. Any reasoner that is called as `lens.reasoner` has it can be asked.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lens.reasoner import Reasoner, Refined

from ..data.small_world.dense_reading import Reading, read
from ..data.small_world.kinds import CORE
from ..data.small_world.mentions import said_background
from ..data.small_world.open_wishes import held_out_wish
from ..data.small_world.scene import Scene
from ..data.small_world.wishes import STYLES, open_wish, unknown
from ..data.small_world.world import TASKS, World

FIRST_SEED = 3_000_000_000  # apart from what any stage trains on
WITHOUT_SIGNS = {task: share for task, share in TASKS.items() if task != "text"}
SIGNS = {"text": 1.0}
Thing = tuple[str, str | None]


@dataclass
class Tally:
    """Shares that hold, each of the answers it was asked of."""

    right: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)

    def add(self, **found: bool | None) -> None:
        """None: not asked."""
        for name, value in found.items():
            if value is not None:
                self.right[name] += value
                self.asked[name] += 1

    def shares(self) -> dict[str, Any]:
        return {name: [self.right[name], count] for name, count in self.asked.items()}


def captions(count: int, tasks: dict[str, float]) -> list[Scene]:
    """The first `count` scenes of CORE's classes whose caption, their wish, is held out, as are their facts."""
    world = World("held_out", tasks, CORE, STYLES)
    scenes = (world.scene(seed) for seed in itertools.count(FIRST_SEED))
    return list(itertools.islice((scene for scene in scenes if held_out_wish(scene.caption)), count))


def reading(answer: Refined) -> Reading | None:
    """What an answer says; None where it is no dense caption."""
    try:
        return read(answer.prompt)
    except ValueError:
        return None


def things_of(scene: Scene) -> tuple[Thing, ...]:
    return tuple((thing.kind, thing.colour) for thing in scene.things)


def kept(scene: Scene, said: Reading | None) -> dict[str, bool | None]:
    """What of a wish's scene a caption keeps. Classes, colours and their number are compared as multisets; of two things in a
    "position" task and of three in a row also their order counts; a backdrop where the wish names it."""
    things = things_of(scene)
    found = list(said.things) if said else []
    kinds, wanted = {kind for kind, _ in found}, {kind for kind, _ in things}
    ordered = scene.task in ("position", "row")
    order = said is not None and (said.things, said.relation) == (things, scene.relation)
    backdrop = said_background(scene)
    facts: dict[str, bool | None] = {
        "class": kinds == wanted if things else None,
        "colour": set(found) == set(things) if things else None,
        "count": len(found) == len(things) if scene.task == "counting" else None,
        "relation": order if ordered else None,
        "sign": said is not None and said.sign == scene.sign.text if scene.sign else None,
        "backdrop": said is not None and said.background == backdrop if backdrop else None,
    }
    return {**facts, "everything": all(value for value in facts.values() if value is not None)}


def report(
    reasoner: Reasoner, count: int, signs: int, words: int, tokenizer: Path
) -> tuple[dict[str, Any], list[list[str]]]:
    """Kind of wish -> figure -> [right, asked]; and every wish with its answer and flag."""
    rng = random.Random("unknown wishes")
    groups: dict[str, list[tuple[str, Scene | None]]] = {
        "captions": [(scene.caption, scene) for scene in captions(count, WITHOUT_SIGNS)],
        "signs": [(scene.caption, scene) for scene in captions(signs, SIGNS)],
        "open": [open_wish(rng, True) for _ in range(words)],
        "unknown": [(" ".join(unknown(rng, tokenizer)), None) for _ in range(words)],
    }
    figures, lines = {}, []
    for name, asked in groups.items():
        tally = Tally()
        for (wish, about), answer in zip(asked, reasoner([wish for wish, _ in asked])):
            assert isinstance(answer, Refined), "it cannot refuse"
            tally.add(ended=answer.flag in ("", "unsure"), sure=not answer.flag)
            if not answer.flag:
                said = reading(answer)
                tally.add(valid=said is not None)
                if about is not None and name == "open":
                    tally.add(fits=said is not None and said.things == things_of(about))
                elif about is not None:
                    tally.add(**kept(about, said))
            lines.append([name, wish, f"{answer.flag}: {answer.note}" if answer.flag else answer.prompt])
        figures[name] = tally.shares()
    return figures, lines


def table(figures: dict[str, Any]) -> Sequence[str]:
    """Lines for people."""
    return [
        f"{group:<9} {name:<11} {right:4d} of {count:4d}  {right / max(1, count):6.1%}"
        for group, shares in figures.items()
        for name, (right, count) in shares.items()
    ]
