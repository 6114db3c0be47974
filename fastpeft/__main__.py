"""``python -m fastpeft``: the command line."""

from fastpeft.cli import main

main()
