"""Two things timed in turn, each by modules that run in processes of their own."""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class RunFailed(Exception):
    """A process that had to succeed did not; the text says which, for people. What it said is on standard error."""


def positive(text: str) -> int:
    """How often, or how many, as a command line gives it.

    Raises:
        ArgumentTypeError: less than once is no figure.
    """
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def in_turn(sides: Sequence[T], repeat: int) -> Iterator[T]:
    """All sides, ``repeat`` times; every other time backwards, so that no machine that warms up favours one."""
    for turn in range(repeat):
        yield from sides if turn % 2 == 0 else reversed(sides)


def run_module(tree: Path, *words: str) -> str:
    """``python -m`` of a tree's own module, with this interpreter; its standard output.

    Raises:
        RunFailed: it ended with an error.
    """
    # `-m` puts the working directory before everything that is installed, unless it is told not to.
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=tree, env=environ, check=False, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise RunFailed(f"python -m {' '.join(words)} ended with {done.returncode} in {tree}")
    return done.stdout
