"""What the lanes did: bytes and busy seconds of each, and every piece of work for whoever records a trace."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

from engine.memory.lane import Event, LaneName, Reached

Span = tuple[float, float]
"""When work began and ended, on ``time.perf_counter``'s clock."""


class LaneRecorder(Protocol):
    """Who wants to know of every single piece of work."""

    def moved(self, lane: LaneName, what: str, span: Span, num_bytes: int) -> None:
        """One piece of work; those of one lane come in order and never overlap."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What lanes moved over some time."""

    num_bytes: dict[str, int] = field(default_factory=dict)
    """Bytes by lane; lanes that moved nothing are left out."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By lane, how long it was busy."""
    weight_bytes: int = 0

    @property
    def busiest(self) -> str:
        """The lane that was busy for longest."""
        return max(self.seconds, key=lambda lane: self.seconds[lane], default=LaneName.DEVICE_COMPUTE)


@dataclass(frozen=True, slots=True)
class _Work:
    lane: LaneName
    what: str
    num_bytes: int
    is_weights: bool
    span: Callable[[], Span | None]


class Traffic:
    """Gathers what was done since the last ``take``. Work may be told of by any thread; compute has one thread."""

    def __init__(self, mark: Callable[[], Event] = Reached, recorder: LaneRecorder | None = None) -> None:
        """``mark`` is the device's point in compute; CPU devices reach it at once."""
        self._mark = mark
        self._recorder = recorder
        self._lock = threading.Lock()
        self._work: list[_Work] = []
        self._ended: dict[LaneName, float] = {}
        self._computes: tuple[str, Event] | None = None

    def add(self, lane: LaneName, num_bytes: int, span: Span, what: str = "", *, weights: bool = False) -> None:
        """Work that is over."""
        self._append(_Work(lane, what, num_bytes, weights, lambda: span))

    def follow(self, lane: LaneName, event: Event, num_bytes: int, what: str = "", *, weights: bool = False) -> None:
        """Work under way, which ends with ``event``; it counts when it has ended."""
        self._append(_Work(lane, what, num_bytes, weights, event.span))

    @contextmanager
    def moving(self, lane: LaneName, num_bytes: int, what: str = "", *, weights: bool = False) -> Iterator[None]:
        """Work that the calling thread does itself."""
        start = perf_counter()
        yield
        self.add(lane, num_bytes, (start, perf_counter()), what, weights=weights)

    def computes(self, what: str | None) -> None:
        """From here on, compute works on ``what``; ``None``: on nothing."""
        self._computed()
        self._computes = None if what is None else (what, self._mark())

    @contextmanager
    def waiting(self, then: str | None = None) -> Iterator[None]:
        """Compute waits for a lane, and afterwards goes on, with ``then`` or with what it was at."""
        at = then or (self._computes[0] if self._computes is not None else None)
        self.computes(None)
        yield
        self.computes(at)

    def take(self) -> Moved:
        """What has ended since the last call. Work of several threads on one lane is busy time only once."""
        with self._lock:
            work, self._work = self._work, []
        done: list[tuple[Span, _Work]] = []
        under_way: list[_Work] = []
        for each in work:
            span = each.span()
            if span is None:
                under_way.append(each)
            else:
                done.append((span, each))
        with self._lock:
            self._work[:0] = under_way
        num_bytes: defaultdict[str, int] = defaultdict(int)
        seconds: defaultdict[str, float] = defaultdict(float)
        weight_bytes = 0
        for span, each in sorted(done, key=lambda item: item[0]):
            free_from = self._ended.get(each.lane, span[0])
            start, end = max(span[0], free_from), max(span[1], free_from)
            self._ended[each.lane] = end
            seconds[each.lane] += end - start
            if each.num_bytes:
                num_bytes[each.lane] += each.num_bytes
            if each.is_weights:
                weight_bytes += each.num_bytes
            if self._recorder is not None:
                self._recorder.moved(each.lane, each.what, (start, end), each.num_bytes)
        return Moved(dict(num_bytes), dict(seconds), weight_bytes)

    def _append(self, work: _Work) -> None:
        with self._lock:
            self._work.append(work)

    def _computed(self) -> None:
        if self._computes is None:
            return
        what, began = self._computes
        ended = self._mark()

        def span() -> Span | None:
            first, last = began.span(), ended.span()
            return None if first is None or last is None else (first[1], last[1])

        self._append(_Work(LaneName.DEVICE_COMPUTE, what, 0, False, span))
