"""Progress of a job while it runs: a bar on a terminal, a line every few seconds elsewhere; always on stderr."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from cli.display import colour_wanted, format_count, format_rate, format_rows, format_seconds, printable, say
from cli.workers import Attendance, attendance

if TYPE_CHECKING:
    from storage.database import Database
    from storage.jobs import Job

_WINDOW_S = 30.0
_LINE_EVERY_S = 5.0
_POLL_S = 0.25
_SLOWEST_POLL_S = 2.0
_PATIENCE_S = 4 * 3600.0
"""How long a database that is locked or away is waited for; a worker waits as long, unless it is told otherwise."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A job's counters at one moment."""

    now: float
    ended: int
    """Requests that are done or failed."""
    tokens: int
    """Prompt and generated."""


class Pace:
    """Speed over the last half minute, so that a stop or a slow start does not colour it for hours."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque()

    def forget(self) -> None:
        """Forget the speed so far, which tells nothing of what comes: the work stood still."""
        self._samples.clear()

    def add(self, sample: Sample) -> None:
        """Takes the next sample; time must not go backwards."""
        self._samples.append(sample)
        while sample.now - self._samples[0].now > _WINDOW_S and len(self._samples) > 2:
            self._samples.popleft()

    @property
    def tokens_per_s(self) -> float:
        """0 while nothing is known."""
        return self._per_s(lambda sample: sample.tokens)

    @property
    def rows_per_s(self) -> float:
        """0 while nothing is known."""
        return self._per_s(lambda sample: sample.ended)

    def _per_s(self, what: Callable[[Sample], int]) -> float:
        if not self._samples:
            return 0.0
        first, last = self._samples[0], self._samples[-1]
        return (what(last) - what(first)) / (last.now - first.now) if last.now > first.now else 0.0

    def eta_s(self, total: int) -> float | None:
        """Seconds until ``total`` requests have ended; None while nothing ends."""
        if not self._samples:
            return None
        first, last = self._samples[0], self._samples[-1]
        ended = last.ended - first.ended
        return (total - last.ended) * (last.now - first.now) / ended if ended else None


class Progress(Protocol):
    """Shows a job's snapshots as they come."""

    def update(self, snapshot: "Snapshot", now: float) -> None:
        """Shows one snapshot; ``now`` in seconds, of any clock."""

    def note(self, text: str) -> None:
        """Shows a sentence between snapshots."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A job at one moment, and who sees to it."""

    job: "Job"
    attendance: Attendance = field(default_factory=Attendance)

    @property
    def standstill(self) -> str | None:
        """Why no row moves, in a few words; None: they may be moving."""
        return "no worker is running" if self.attendance.hint else self.attendance.doing


class LineProgress:
    """A line every few seconds, for logs."""

    def __init__(self) -> None:
        self._pace = Pace()
        self._next = 0.0
        self._last = ""
        self._stood: str | None = None

    def update(self, snapshot: Snapshot, now: float) -> None:
        """Prints a line when it is time, the job has ended, or it begins or ceases to stand still."""
        job, stands = snapshot.job, snapshot.standstill
        _take(self._pace, snapshot, now)
        if now < self._next and not job.is_finished and stands == self._stood:
            return
        self._next = now + _LINE_EVERY_S
        self._stood = stands
        line = progress_line(snapshot, self._pace)
        if line != self._last:
            say(line)
        self._last = line

    def note(self, text: str) -> None:
        """Prints a sentence."""
        say(text)


def progress_line(snapshot: Snapshot, pace: Pace) -> str:
    """``job 7 running: 42% | 840/2,000 requests | 1,234 tokens/s | 1 min 3 s left``."""
    job = snapshot.job
    ended = job.num_done + job.num_failed
    parts = [
        f"job {job.id} {job.state}: {100 * ended // max(1, job.num_requests)}%",
        f"{format_count(ended)}/{format_count(job.num_requests)} requests",
    ]
    if job.num_failed:
        parts.append(f"{format_count(job.num_failed)} failed")
    parts += _why_it_stands(snapshot) or [*_speed(snapshot, pace), *_left(snapshot, pace)]
    return " | ".join(parts)


def _detail(snapshot: Snapshot, pace: Pace) -> str:
    """What stands behind a bar: the most telling first, since a narrow terminal cuts the end."""
    job = snapshot.job
    parts = [str(job.state)]
    if job.num_failed:
        parts.append(f"{format_count(job.num_failed)} failed")
    parts += _why_it_stands(snapshot) or [*_left(snapshot, pace), *_speed(snapshot, pace)]
    return printable(" · ".join(parts))


def _why_it_stands(snapshot: Snapshot) -> list[str]:
    return [snapshot.standstill] if snapshot.standstill and not snapshot.job.is_finished else []


def _speed(snapshot: Snapshot, pace: Pace) -> list[str]:
    if snapshot.job.is_finished:
        return []
    parts = []
    if pace.rows_per_s and snapshot.job.task != "generate":
        parts.append(format_rows(pace.rows_per_s))
    if pace.tokens_per_s:
        parts.append(format_rate(pace.tokens_per_s))
    return parts


def _left(snapshot: Snapshot, pace: Pace) -> list[str]:
    eta = None if snapshot.job.is_finished else pace.eta_s(snapshot.job.num_requests)
    return [] if eta is None else [f"{format_seconds(eta)} left"]


def _take(pace: Pace, snapshot: Snapshot, now: float) -> None:
    if snapshot.standstill:
        pace.forget()
    pace.add(_sample(snapshot.job, now))


@contextmanager
def job_progress(title: str) -> "Iterator[Progress]":
    """The kind of progress that stderr can show."""
    if not sys.stderr.isatty():
        yield LineProgress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars
    from rich.table import Column

    console = Console(stderr=True, no_color=not colour_wanted())
    # On a narrow terminal the bar is short, then the detail is cut; the count never is.
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=max(5, min(40, console.width - 100))),
        TextColumn("{task.fields[rows]}", markup=False),
        TextColumn("{task.fields[detail]}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
    )
    with Bars(*columns, console=console, refresh_per_second=4, expand=True) as bars:
        task = bars.add_task(title, total=None, rows="", detail="")
        pace = Pace()

        class BarProgress:
            def update(self, snapshot: Snapshot, now: float) -> None:
                _take(pace, snapshot, now)
                job = snapshot.job
                ended = job.num_done + job.num_failed
                rows = f"{format_count(ended)}/{format_count(job.num_requests)}"
                detail = _detail(snapshot, pace)
                bars.update(task, total=job.num_requests, completed=ended, rows=rows, detail=detail)

            def note(self, text: str) -> None:
                console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

        yield BarProgress()


def follow(database: "Database", job_id: int, *, watch: Callable[[], None] | None = None) -> Iterator[Snapshot]:
    """The job's snapshots until it has ended, the last one included; each is two short reads.

    ``watch`` is called between two looks and may raise to end the waiting. With it the worker is our own: one that is
    not there yet is about to come.
    """
    from storage.clock import time_of
    from storage.jobs import get_job
    from worker.patience import Patience

    def look() -> tuple["Job", Attendance]:
        job = get_job(database, job_id)
        return job, attendance(database, job, now=time_of(database))

    def rest(seconds: float) -> None:
        if watch is not None:
            watch()
        time.sleep(seconds)

    patience = Patience(_PATIENCE_S, rest, say=say)
    pause = _POLL_S
    while True:
        job, attending = patience(look)
        if watch is not None and attending.hint:
            attending = Attendance(doing="its worker is starting")
        yield Snapshot(job, attending)
        if job.is_finished:
            return
        rest(pause)
        pause = min(_SLOWEST_POLL_S if watch is None else 4 * _POLL_S, pause * 1.2)


def _sample(job: "Job", now: float) -> Sample:
    return Sample(now, job.num_done + job.num_failed, job.prompt_tokens + job.generated_tokens)
