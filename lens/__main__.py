"""`python -m lens`, the same as the `lens` command."""

from lens.cli import main

main()
