"""`lens generate --reason`: which reasoner the options name, and what it makes of the pictures to draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.markup import escape

from ..reasoner import EmbeddedReasoner, Reasoner, Refined, Refused, ServerReasoner, system_prompt
from .request import UsageError
from .terminal import console, nothing

if TYPE_CHECKING:
    from ..pipeline import LensPipeline


@dataclass(frozen=True)
class Asked:
    """The options of --reason."""

    url: str | None
    model: str | None
    prompt: str

    def reasoner(self, pipe: LensPipeline) -> Reasoner:
        if self.url is None:
            return EmbeddedReasoner(pipe, self.prompt)
        from ..chat_client import ChatClient, require_extra

        require_extra()
        assert self.model is not None, "of options that were not checked"
        return ServerReasoner(ChatClient(self.url, self.model), self.prompt)


def asked(reason: bool, url: str | None, model: str | None, prompt: str | None) -> Asked | None:
    """The options, checked; None where no reasoner is wanted. UsageError for those that do not go together."""
    given = {"--reasoner": url, "--reasoner-model": model, "--reasoner-prompt": prompt}
    if not reason:
        if unused := [name for name, value in given.items() if value is not None]:
            raise UsageError(f"{unused[0]} needs --reason")
        return None
    if (url is None) != (model is None):
        raise UsageError("--reasoner and --reasoner-model go together: an address, and the name of its model")
    try:
        system_prompt(prompt or "general")
    except ValueError as error:
        raise UsageError(f"--reasoner-prompt: {error}") from None
    return Asked(url, model, prompt or "general")


def reasoned(asked: Asked, pipe: LensPipeline, wishes: Sequence[str], quiet: bool) -> list[Refined | Refused]:
    """An answer for each wish, equal ones asked once. Refusals are always shown, prompts unless quiet."""
    once = list(dict.fromkeys(wishes))
    with console.status("reasoning") if not quiet else nothing():
        answers = dict(zip(once, asked.reasoner(pipe)(once)))
    for wish, answer in answers.items():
        if isinstance(answer, Refused):
            console.print(f"[bold red]refused:[/bold red] {escape(f'{wish!r}: {answer.category}: {answer.reason}')}")
        elif not quiet:
            kept = f" (the words as given: {answer.flag}, {answer.note})" if answer.flag else ""
            console.print(f"[bold]{escape(wish)}[/bold] -> {escape(answer.prompt + kept)}")
    return [answers[wish] for wish in wishes]
