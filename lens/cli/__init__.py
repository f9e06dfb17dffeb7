"""The command line, `lens`."""


def main() -> None:
    """Entry point of the `lens` command."""
    from .__main__ import app

    app(prog_name="lens")
