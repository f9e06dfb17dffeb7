"""The search by GEPA (arXiv 2507.19457; package gepa, extra `gepa`) in place of our own loop: a Pareto front over prompts.

GEPA keeps every system prompt that beats its parent on a few of the development prompts and scores it on all of them; the next parent is
drawn from those that are best on some prompt. Writing, drawing, judging and the writer's question are those of the loop. GEPA wants
a number for every prompt: a judgement that failed is 0 in its own comparisons, and left out of ours. What it kept becomes the
archive: a candidate is accepted by the same paired bootstrap over its parent, and the final choice is made on the held-out prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens.chat_client import ChatError

from .loop import Candidate, Item, Outcome, Search, failures_of, mean, rise

if TYPE_CHECKING:
    from gepa import EvaluationBatch

PART = "system_prompt"  # the only text of a candidate
MINIBATCH = 3  # development prompts that a rewrite is tried on first: GEPA's own default


def require_gepa() -> Any:
    """The package. Errors: ImportError naming the extra."""
    try:
        import gepa
    except ImportError:
        raise ImportError("--optimizer gepa: the package gepa is not installed; pip install -e '.[gepa]'") from None
    return gepa


class Adapter:
    """What GEPA calls. known: system prompt -> prompt's id -> outcome, of all that was drawn; parents, diagnoses: of the rewrites."""

    def __init__(self, search: Search, seed_text: str):
        self.search, self.batch_type = search, require_gepa().EvaluationBatch
        self.known: dict[str, dict[str, Outcome]] = {}
        self.parents: dict[str, str | None] = {seed_text: None}
        self.diagnoses: dict[str, str] = {seed_text: ""}
        self.asked = 0  # rewrites, so that a question that is put again is another one
        self.stopped: ChatError | None = None  # GEPA logs what a proposal dies of and goes on

    def evaluate(
        self, batch: list[Item], candidate: dict[str, str], capture_traces: bool = False
    ) -> EvaluationBatch[Outcome, Outcome]:
        """Outcomes of the batch; what was drawn under the same text before is not drawn again."""
        known = self.known.setdefault(candidate[PART], {})
        if todo := [item for item in batch if item.id not in known]:
            known |= zip((item.id for item in todo), self.search.outcomes(candidate[PART], todo))
        found = [known[item.id] for item in batch]
        traces = found if capture_traces else None
        return self.batch_type(outputs=found, scores=[o.score or 0.0 for o in found], trajectories=traces)

    def make_reflective_dataset(
        self, candidate: dict[str, str], eval_batch: EvaluationBatch[Outcome, Outcome], components_to_update: list[str]
    ) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """What the writer is shown: failures under this text of all prompts that were drawn, the worst first."""
        known = self.known[candidate[PART]]
        items = [item for item in self.search.dev if item.id in known]
        return {PART: failures_of(items, [known[item.id] for item in items])}

    def propose_new_texts(
        self,
        candidate: dict[str, str],
        reflective_dataset: Mapping[str, Sequence[Mapping[str, Any]]],
        components_to_update: list[str],
    ) -> dict[str, str]:
        text = candidate[PART]
        self.asked += 1
        scores = [outcome.score for outcome in self.known[text].values()]
        failures = [dict(failure) for failure in reflective_dataset[PART]]
        try:
            values = self.search.proposed(text, mean(scores), failures, self.asked)
        except ChatError as error:
            self.stopped = error
            raise
        self.parents.setdefault(values["prompt"], text)
        self.diagnoses.setdefault(values["prompt"], values["diagnosis"])
        return {PART: values["prompt"]}

    def get_adapter_state(self) -> dict[str, Any]:
        """What GEPA keeps beside its own state, for a run that goes on."""
        known = {
            text: {key: (o.score, o.prompt, o.failed) for key, o in own.items()} for text, own in self.known.items()
        }
        return {"known": known, "parents": dict(self.parents), "diagnoses": dict(self.diagnoses), "asked": self.asked}

    def set_adapter_state(self, state: dict[str, Any]) -> None:
        """Empty where a run begins."""
        if not state:
            return
        self.known = {text: {key: Outcome(*o) for key, o in own.items()} for text, own in state["known"].items()}
        self.parents, self.diagnoses, self.asked = state["parents"], state["diagnoses"], state["asked"]

    def archive(self) -> list[Candidate]:
        """The texts that were scored on every development prompt, in order, each with its rise over its parent."""
        whole = [text for text, own in self.known.items() if all(item.id in own for item in self.search.dev)]
        made: list[Candidate] = []
        for text in whole:
            found = [self.known[text][item.id] for item in self.search.dev]
            before = self.parents[text]
            one = Candidate(text, None if before is None else whole.index(before), self.diagnoses[text], before is None)
            one.dev, one.failures = [o.score for o in found], failures_of(self.search.dev, found)
            if one.parent is not None:
                one.rise, one.error = rise(one.dev, made[one.parent].dev, self.search.seed)
                one.accepted = one.rise > one.error
            made.append(one)
        return made


class Lines:
    """GEPA's log as a file; a line of it is not for the terminal."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def log(self, message: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{message}\n")


def optimise(search: Search, iterations: int, tell: Callable[[str], None] = print) -> Candidate:
    """Up to that many of GEPA's iterations in all, again to resume; returns the final candidate, as `Search.run` does.

    Errors: ImportError without the package; ValueError where the folder is of our own loop, or does not say whose it is.
    """
    gepa, folder = require_gepa(), search.out / "gepa"
    if search.archive and not folder.is_dir():
        raise ValueError(f"{search.file}: of a search by our own loop; give another --out")
    adapter = Adapter(search, search.start)
    state_file = folder / "gepa_state.bin"
    if state_file.is_file() and not search.file.is_file():
        raise ValueError(
            f"{state_file}: expected {search.file.name} beside its folder, which says whose it is; give another --out"
        )
    search.save()  # before the first state, so that another search never goes on from it
    from gepa.core.state import GEPAState as state_type

    if state_file.is_file():  # GEPA scores the first text before it takes up its state: known by then
        adapter.set_adapter_state(state_type.load(str(folder)).adapter_state)

    def over(state: Any) -> bool:
        return adapter.stopped is not None or state.i + 1 >= iterations

    try:
        gepa.optimize(
            seed_candidate={PART: search.start},
            trainset=list(search.dev),
            valset=list(search.dev),
            adapter=adapter,
            reflection_minibatch_size=MINIBATCH,
            stop_callbacks=over,
            logger=Lines(search.out / "gepa.log"),
            run_dir=str(folder),
            seed=search.seed,
            track_best_outputs=False,
        )
    except ChatError as error:
        adapter.stopped = error
        if state_file.is_file():  # GEPA saves between iterations: what this one drew is kept, too
            state = state_type.load(str(folder))
            # its question will be put again, so that it gets the same answer
            state.adapter_state = {**adapter.get_adapter_state(), "asked": state.adapter_state.get("asked", 0)}
            state.save(str(folder))
    found = adapter.archive()
    if adapter.stopped is not None and (adapter.stopped.kind != "budget" or not found):
        raise adapter.stopped
    held = {candidate.text: candidate.held for candidate in search.archive}
    for candidate in found:
        candidate.held = held.get(candidate.text, [])
    search.archive = found
    search.save()
    for number, candidate in enumerate(found):
        tell(f"{number}: {candidate.described}" if number else f"start: dev {mean(candidate.dev):.3f}")
    try:
        if adapter.stopped is None:
            search.judge_held()
    except ChatError as error:
        if error.kind != "budget":
            raise
        adapter.stopped = error
    if adapter.stopped is not None:
        tell(f"stopped: {adapter.stopped}")
    return search.chosen()
