"""Processes that take turns: real ones, which say when they ran."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.slices import Slices, take_turns

_UNTIL_CONTINUED = """
import signal, sys, time
turns = []
signal.signal(signal.SIGCONT, lambda *_: turns.append(1))
while len(turns) < int(sys.argv[1]):
    print(time.perf_counter(), flush=True)
    time.sleep(0.01)
"""
"""Ends only when it was continued so often, however late that comes on a busy machine."""


def _start(folder: Path, name: str, turns: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", _UNTIL_CONTINUED, str(turns)]
    with (folder / name).open("wb") as out:
        return subprocess.Popen(command, stdout=out, start_new_session=True)


def test_seconds_are_those_of_its_slices() -> None:
    slices = Slices([(0.0, 1.0), (3.0, 4.0), (6.0, 6.5)])
    assert slices.seconds(0.5, 6.25) == pytest.approx(0.5 + 1.0 + 0.25)
    assert slices.seconds(1.5, 2.5) == 0
    assert slices.hold(3.0, 3.5)
    assert not slices.hold(0.5, 3.5)


def test_each_runs_in_its_own_slices_and_in_no_others(tmp_path: Path) -> None:
    processes = [_start(tmp_path, name, 3) for name in "ab"]
    slices = dict(take_turns(processes, timeout_s=60, slice_s=0.1))
    assert [process.returncode for process in processes] == [0, 0]
    assert min(len(each.spans) for each in slices.values()) >= 3
    spans = sorted(span for each in slices.values() for span in each.spans)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    for number, name in enumerate("ab"):
        told = [float(line) for line in (tmp_path / name).read_text().split()]
        # What came before the first turn, while both were started, is nobody's.
        later = [each for each in told if each > spans[0][0]]
        assert later
        # A signal takes a moment to stop a process on another core.
        assert all(any(begin <= each <= end + 0.01 for begin, end in slices[number].spans) for each in later)


def test_what_is_not_done_in_time_is_killed(tmp_path: Path) -> None:
    processes = [_start(tmp_path, "a", 2), _start(tmp_path, "b", 100_000)]
    assert {number for number, _ in take_turns(processes, timeout_s=2, slice_s=0.1)} == {0, 1}
    assert processes[1].returncode < 0


def test_nobody_is_left_behind_when_it_is_given_up(tmp_path: Path) -> None:
    processes = [_start(tmp_path, "a", 1), _start(tmp_path, "b", 100_000)]
    turns = take_turns(processes, timeout_s=60, slice_s=0.1)
    assert next(turns)[0] == 0
    turns.close()
    assert processes[1].returncode is not None
