"""Tests in a process of their own."""

import functools
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_CHILD = """
import pickle, sys
from importlib import import_module
module, name, values = pickle.load(sys.stdin.buffer)
getattr(import_module(module), name).__wrapped__(**values)
"""


def alone(test: Callable[..., None]) -> Callable[..., None]:
    """Runs a test where no other has run: for what a process remembers, such as memory that was freed and kept.

    Its arguments are parameters that can be pickled, no fixtures.
    """

    @functools.wraps(test)
    def in_a_child(**values: object) -> None:
        call = pickle.dumps((test.__module__, test.__name__, values))
        done = subprocess.run([sys.executable, "-c", _CHILD], input=call, cwd=ROOT, capture_output=True, timeout=240)
        assert done.returncode == 0, done.stderr.decode(errors="replace")

    return in_a_child
