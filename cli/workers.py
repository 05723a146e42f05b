"""What a waiting person should know about workers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

PRIVATE_QUEUE = "run-"
"""How the queues begin that a worker of our own serves for one job."""
TRACE_VARIABLE = "_OVERNIGHT_TRACE"
"""How `overnight run --trace` tells its worker where the trace goes; a worker of a queue has no such option."""
ALONE_VARIABLE = "_OVERNIGHT_ALONE"
"""How `overnight run` tells its worker that no other serves its queue."""
_DOING = {
    "starting": "its worker is starting",
    "loading": "loading the model",
    "measuring": "measuring this machine, once",
}
"""What a worker does before rows move, by its state."""

if TYPE_CHECKING:
    from storage.claims import Worker
    from storage.database import Database
    from storage.jobs import Job


@dataclass(frozen=True, slots=True)
class Attendance:
    """Who sees to a job."""

    hint: str | None = None
    """A sentence where nobody will work on it, though it is not finished."""
    doing: str | None = None
    """A few words while no row moves: loading, measuring, waiting."""


def living_workers(database: "Database", now: float) -> "list[Worker]":
    """The workers whose lease holds and whose process, where that can be told, is there."""
    from storage.claims import list_workers
    from worker.presence import is_dead

    return [
        worker for worker in list_workers(database, now) if not is_dead(worker.hostname, worker.pid, worker.process)
    ]


def attendance(database: "Database", job: "Job", *, now: float) -> Attendance:
    """Whether anybody works on a job, and what the worker of its queue does; one short read."""
    if job.is_finished:
        return Attendance()
    workers = [worker for worker in living_workers(database, now) if worker.queue == job.queue]
    if not workers:
        return Attendance(hint=_missing(job))
    return Attendance(doing=_doing(workers, job))


def missing_worker_hint(database: "Database", job: "Job", *, now: float) -> str | None:
    """A sentence when nobody will work on an unfinished job, else None."""
    return attendance(database, job, now=now).hint


def _missing(job: "Job") -> str:
    if job.queue.startswith(PRIVATE_QUEUE):
        return f"no worker is at work on job {job.id}; go on with it: overnight run --resume {job.id} -o FILE"
    option = "" if job.queue == "default" else f" --queue {job.queue}"
    return f"no worker is running for the queue {job.queue!r}; start one in another terminal: overnight worker{option}"


def _doing(workers: "list[Worker]", job: "Job") -> str | None:
    """What the worker does that is nearest to this job's rows; None while they move."""
    states = {worker.state for worker in workers}
    if "draining" in states:
        return "waiting for its turn" if job.state == "queued" else None
    for state, words in _DOING.items():
        if state in states:
            return words
    return next((worker.message for worker in workers if worker.message), None)
