"""Who watches the engine, and one who writes what it sees to a file: a trace for Perfetto or chrome://tracing.

The engine reports to a ``Recorder`` and knows nothing more of it; without one, nothing is reported.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Protocol

from engine.memory.lane import LaneName
from engine.memory.traffic import LaneRecorder, Span
from engine.schedule.passes import PassStats

_PROCESS = 1
_THREADS = ("passes", *LaneName)
_END = b"\n]\n"


class Recorder(LaneRecorder, Protocol):
    """What the engine tells of itself, on its own thread."""

    def loaded(self, span: Span) -> None:
        """A model was loaded; the work of its lanes was told of before."""

    def passed(self, span: Span, stats: PassStats) -> None:
        """A pass has ended; what its lanes did and ``stats`` counts was told of since the last one."""


class TraceFile:
    """Writes the trace event format: one thread a lane, and one for the passes. Implements ``Recorder``.

    The file is an array in whole after each pass, so that it can be read whenever the process ends, and however. What
    is kept in memory is one pass. Close it when done.
    """

    def __init__(self, path: Path, on_error: Callable[[OSError], None]) -> None:
        """Begin a new file.

        Args:
            path: replaced if it exists.
            on_error: called once if the file cannot be written later on; the trace ends there, the work goes on.

        Raises:
            OSError: it cannot be written at all.
        """
        self._on_error = on_error
        self._zero = perf_counter()
        self._num_passes = 0
        self._events: list[bytes] = []
        self._file = path.open("wb", buffering=0)
        self._length = 0
        self._broken = False
        self._name("process_name", 0, "overnight")
        for index, name in enumerate(_THREADS):
            self._name("thread_name", index, name)
            self._add({"ph": "M", "name": "thread_sort_index", "tid": index, "args": {"sort_index": index}})
        self._write()

    def moved(self, lane: LaneName, what: str, span: Span, num_bytes: int) -> None:
        """One slice of a lane."""
        self._slice(lane, what, span, {"bytes": num_bytes} if num_bytes else {})

    def loaded(self, span: Span) -> None:
        """A slice beside the passes."""
        self._slice("passes", "load", span, {})
        self._write()

    def passed(self, span: Span, stats: PassStats) -> None:
        """A slice with the pass's figures."""
        self._num_passes += 1
        figures = asdict(stats)
        del figures["expected"]
        if stats.expected is not None:
            figures["expected_seconds"] = stats.expected.seconds
        for name in ("seconds", "lane_bytes", "lane_seconds"):  # the slices of the lanes say it better
            del figures[name]
        self._slice("passes", f"pass {self._num_passes}", span, figures)
        self._write()

    def close(self) -> None:
        """End the file."""
        self._write()
        self._file.close()

    def _slice(self, thread: str, name: str, span: Span, args: dict[str, object]) -> None:
        start, end = (round((at - self._zero) * 1e6, 3) for at in span)
        event = {"ph": "X", "name": name, "tid": _THREADS.index(thread), "ts": start, "dur": round(end - start, 3)}
        self._add({**event, "args": args} if args else event)

    def _name(self, kind: str, thread: int, name: str) -> None:
        self._add({"ph": "M", "name": kind, "tid": thread, "args": {"name": name}})

    def _add(self, event: dict[str, object]) -> None:
        if not self._broken:
            self._events.append(json.dumps({"pid": _PROCESS, **event}, separators=(",", ":")).encode())

    def _write(self) -> None:
        """Put what has gathered over the array's end, and a new end behind it, in one write."""
        if not self._events:
            return
        piece = (b",\n" if self._length else b"[\n") + b",\n".join(self._events)
        self._events.clear()
        try:
            self._file.seek(self._length)
            _write_whole(self._file.write, piece + _END)
        except OSError as error:
            self._broken = True
            with suppress(OSError):  # as it was: a file that cannot grow can shrink
                self._file.truncate(self._length)
                self._file.seek(self._length)
                _write_whole(self._file.write, _END)
            self._on_error(error)
            return
        self._length += len(piece)


def _write_whole(write: Callable[[bytes], int | None], data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[write(rest) or 0 :]  # type: ignore[arg-type]
