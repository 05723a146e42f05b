"""``python -m cli`` is ``overnight``."""

from cli.main import main

main()
