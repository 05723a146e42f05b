"""When Python looks for garbage: each case in a process of its own, since it is the whole process's."""

import subprocess
import sys

import pytest

from tests.cli.conftest import ROOT

_ASK = """
import atexit, gc, sys, worker.daemon
usual = gc.get_threshold()
worker.daemon.run_worker = lambda settings, options: print(gc.get_threshold() == usual) or 0
from cli import status
status.command.callback = lambda *args, **values: print(gc.get_threshold() == usual)
from cli.main import main
atexit.register(lambda: print(gc.get_freeze_count() == 0))
main(sys.argv[1:])
"""
"""Prints whether Python looks for garbage as usual: in the command, and at its end (the callback first registered is
the last to run)."""


@pytest.mark.parametrize(("command", "is_usual"), [("status", "False"), ("worker", "True")])
def test_short_commands_look_seldom_and_a_worker_as_usual(command: str, is_usual: str) -> None:
    done = subprocess.run([sys.executable, "-c", _ASK, command], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert (done.stdout, done.returncode) == (f"{is_usual}\n{is_usual}\n", 0), done.stderr
