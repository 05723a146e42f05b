"""What a waiting person should know about workers."""

from typing import TYPE_CHECKING

from cli.reports import FINISHED

PRIVATE_QUEUE = "run-"
"""How the queues begin that a worker of our own serves for one job."""
TRACE_VARIABLE = "_OVERNIGHT_TRACE"
"""How `overnight run --trace` tells its worker where the trace goes; a worker of a queue has no such option."""
ALONE_VARIABLE = "_OVERNIGHT_ALONE"
"""How `overnight run` tells its worker that no other serves its queue."""

if TYPE_CHECKING:
    from storage.database import Database
    from storage.jobs import Job


def missing_worker_hint(database: "Database", job: "Job", *, now: float) -> str | None:
    """A sentence when nobody will work on an unfinished job, else None."""
    from storage.claims import list_workers
    from worker.presence import is_dead

    if job.state in FINISHED or any(
        worker.queue == job.queue and not is_dead(worker.hostname, worker.pid, worker.process)
        for worker in list_workers(database, now)
    ):
        return None
    if job.queue.startswith(PRIVATE_QUEUE):
        return f"no worker is at work on job {job.id}; go on with it: overnight run --resume {job.id} -o FILE"
    option = "" if job.queue == "default" else f" --queue {job.queue}"
    return f"no worker is running for the queue {job.queue!r}; start one in another terminal: overnight worker{option}"
