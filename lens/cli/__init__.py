"""The command line, `lens`; `lens.cli.app` is the Typer application, for other tools and tests."""

import sys
from typing import Any, cast

from .unread import unread_output_ends

_OTHER_NAMES = {  # of other programs, for options of `lens generate`
    "--num-inference-steps": "--steps",
    "--num-images-per-prompt": "--images-per-prompt",
    "--negative-prompt": "--negative",
    "--guidance-scale": "--guidance",
    "--cfg-scale": "--guidance",
    "--cfg": "--guidance",
    "--prompt": "a prompt, which needs no option",
    "--num-images": "--images-per-prompt",
    "--resolution": "--size",
}


def main() -> None:
    """Entry point of the `lens` command."""
    sys.exit(unread_output_ends(_command))


def _command() -> int:
    """A mistake in the line is told as every other is, in one line, with exit code 2."""
    from .__main__ import app

    try:
        code = app(prog_name="lens", standalone_mode=False)
    except Exception as error:
        # Typer raises its own copy of click's errors, or click's, by its version: known by what they can do
        if type(error).__name__ == "Abort":  # Ctrl-C before a command had begun
            return 130
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":  # `lens` alone
            cast(Any, error).show()
        else:
            print(f"error: {_told(error)}", file=sys.stderr)
        return int(getattr(error, "exit_code", 2))
    return code if isinstance(code, int) else 0


def _told(error: Any) -> str:
    """A usage error in one line, in plain words, with our name of an option that another program has."""
    text = " ".join(error.format_message().replace("Value error, ", "").split())
    text = text.replace("Input should be", "must be").removesuffix(".")
    if ours := _OTHER_NAMES.get(getattr(error, "option_name", None) or ""):
        text = f"{text}: here it is {ours}"
    return text


def __getattr__(name: str) -> Any:
    """`app` when it is asked for: Typer and rich take their time."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .__main__ import app

    return app
