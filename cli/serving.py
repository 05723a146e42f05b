"""A Redis and a worker of our own for one job: they start with us, serve its queue only, and end when we do."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from cli.display import say
from cli.errors import WorkerDied
from cli.placement import placement_arguments
from cli.plans import model_name, plan_in_words
from cli.progress import Progress, Snapshot, follow, job_progress
from cli.reports import outcome_of
from cli.workers import ALONE_VARIABLE, TRACE_VARIABLE

if TYPE_CHECKING:
    from engine.planner.plan import PlanOptions
    from storage.database import Database
    from storage.jobs import Job
    from worker.settings import Settings

_GRACE_S = 30.0
"""How long a worker may take to finish a pass and give back what it holds."""
_LAST_LINES = 5
_DEATHS = 12
"""Deaths of the worker without a row that ended in between, after which nobody starts it again."""


class OwnWorker:
    """A worker process on a private Redis. Use as a context manager; start it from the main thread.

    It is its own supervisor: a worker that was killed is started again, and finds the row that killed it.
    """

    def __init__(self, settings: "Settings", queue: str, placement: "PlanOptions", trace: Path | None = None) -> None:
        self._settings = settings
        self._queue = queue
        self._placement = placement
        self._trace = trace
        self._stack = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._log = Path()
        self._redis_url = ""
        self._deaths = 0
        self._ended = 0

    def __enter__(self) -> "OwnWorker":
        from worker.private_redis import PrivateRedis
        from worker.scratch import scratch_folder, sweep

        sweep()
        with self._stack as stack:
            self._redis_url = stack.enter_context(PrivateRedis()).url
            folder = stack.enter_context(scratch_folder("log-"))
            self._log = folder / "worker.log"
            self._process = self._start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        from worker.children import stop

        assert self._process is not None
        try:
            stop(self._process, grace_s=_GRACE_S)
        except KeyboardInterrupt:  # the second Ctrl-C: what it holds is claimed again when its lease ends
            stop(self._process, grace_s=0)
            raise
        finally:
            self._stack.close()

    @property
    def pid(self) -> int:
        """The worker's process id."""
        assert self._process is not None
        return self._process.pid

    def check(self, ended: int) -> str | None:
        """Returns while the worker lives. One that was killed is started again, and a sentence about it returned.

        ``ended``: how many rows have an outcome by now.

        Raises:
            WorkerDied: with its last error, and its own exit code where that says more than "it failed".
        """
        assert self._process is not None
        if ended > self._ended:
            self._ended, self._deaths = ended, 0
        code = self._process.poll()
        if code is None:
            return None
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        self._deaths += 1
        if code >= 0 or self._deaths >= _DEATHS:
            raise WorkerDied(f"the worker {how}: {self.last_words()}", code)
        self._process = self._start()
        return f"the worker {how}; it is started again, and runs the rows that it had in hand apart from others"

    def last_words(self) -> str:
        """Its last error sentence, or else its last lines."""
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return errors[-1] if errors else "\n".join(lines[-_LAST_LINES:]) or "it said nothing"

    def _start(self) -> "subprocess.Popen[bytes]":
        from worker.children import spawn

        with self._log.open("ab") as output:
            return spawn(
                self._command(self._redis_url), environ=self._environment(), stdout=output, stderr=subprocess.STDOUT
            )

    def _command(self, redis_url: str) -> list[str]:
        # -P: a folder named `cli` where the user happens to be must not be taken for ours.
        words = [sys.executable, "-P", "-m", "cli", "worker", "--queue", self._queue, "--redis", redis_url]
        return words + placement_arguments(self._placement)

    def _environment(self) -> dict[str, str]:
        packages = str(Path(__file__).resolve().parent.parent)
        path = os.environ.get("PYTHONPATH")
        environ = {**os.environ, TRACE_VARIABLE: str(self._trace.absolute())} if self._trace else os.environ
        return {
            **environ,
            "PYTHONPATH": os.pathsep.join([packages, path] if path else [packages]),
            ALONE_VARIABLE: "1",
            # Not on its command line: the URL may hold a password, which `ps` would show to everybody.
            "OVERNIGHT_DATABASE": self._settings.database_url,
        }


def work_off(
    database: "Database",
    settings: "Settings",
    job: "Job",
    placement: "PlanOptions",
    *,
    resume: str,
    trace: Path | None = None,
) -> "Job":
    """Runs a job with a worker of our own, shows its progress, and returns it as it ended.

    ``resume``: the command that goes on with the job, shown when it is interrupted. ``trace``: what the worker's lanes
    did, as a file.

    A job that has ended already starts nothing.

    Raises:
        WorkerDied, RedisUnavailable: the job stays as far as it has come.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP; the worker has given back what it held.
    """
    from storage.errors import DatabaseUnreachable
    from storage.jobs import get_job

    if job.is_finished:
        return job
    try:
        with _signals_interrupt(), OwnWorker(settings, job.queue, placement, trace) as worker:
            try:
                with job_progress(f"job {job.id}") as progress:
                    snapshot = _watched(database, job, worker, progress)
            except KeyboardInterrupt:
                say("stopping: the worker ends its pass and gives back the rest (Ctrl-C again: at once)")
                raise
    except DatabaseUnreachable:
        say(f"job {job.id} keeps the outputs it has; go on with: {resume}")
        raise
    except (KeyboardInterrupt, WorkerDied):
        left = get_job(database, job.id)
        ended = outcome_of(left) if left.is_finished else None
        if ended is None and left.message:
            say(f"job {job.id}: {left.message}")
        say(ended or f"job {job.id} keeps the outputs it has; go on with: {resume}")
        raise
    return snapshot.job


def _watched(database: "Database", job: "Job", worker: OwnWorker, progress: Progress) -> Snapshot:
    """Shows a job until it has ended, and each plan that its rows are computed under."""
    shown: dict[str, Any] | None = None
    ended = 0

    def tend() -> None:
        if (sentence := worker.check(ended)) is not None:
            progress.note(sentence)

    for snapshot in follow(database, job.id, watch=tend):
        ended = snapshot.job.num_done + snapshot.job.num_failed
        plan = snapshot.job.plan
        if plan is not None and plan != shown and snapshot.standstill is None:
            progress.note(f"{model_name(job.model)}: {plan_in_words(plan)}")
            shown = plan
        progress.update(snapshot, time.monotonic())
    return snapshot


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """A closed terminal and a polite kill end us as Ctrl-C does: in order. What nohup had ignored stays so."""
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, _interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
    raise KeyboardInterrupt
