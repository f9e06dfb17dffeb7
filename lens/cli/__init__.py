"""The command line, `lens`; `lens.cli.app` is the Typer application, for other tools and tests."""

from typing import Any


def main() -> None:
    """Entry point of the `lens` command."""
    from .__main__ import app

    app(prog_name="lens")


def __getattr__(name: str) -> Any:
    """`app` when it is asked for: it brings torch's import with it."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .__main__ import app

    return app
