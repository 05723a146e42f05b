"""What waits for a model, from a few of its rows: what a plan is made for."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.request import Request
from storage.database import Database
from storage.jobs import Job, peek_requests
from worker.rows import RowKey, to_request

if TYPE_CHECKING:
    from engine.planner.workload import Workload

ROWS = 256
"""Rows to look at, in all jobs together: the first of each job, since datasets are rarely sorted."""


def sample_workload(
    database: Database, model_dir: Path, jobs: Sequence[Job], begins: Callable[[RowKey], None]
) -> "Workload | None":
    """Lengths of what the jobs still want, as far as their first rows tell; ``None``: nothing can be computed.

    ``begins`` is told of each row just before it is looked into: so that one which kills the process is found.

    Raises:
        DatabaseUnreachable: nothing can be read.
        CheckpointError: the model directory is absent or damaged.
    """
    from engine.lengths import workload_of

    left = sum(job.num_left for job in jobs)
    if not left:
        return None
    rows = list(_requests(database, jobs))
    workload = workload_of(model_dir, _told(rows, begins))
    return None if workload is None else workload.times(max(1.0, left / len(rows)))


def _told(rows: Sequence[Request], begins: Callable[[RowKey], None]) -> Iterator[Request]:
    for row in rows:
        assert isinstance(row.key, RowKey)
        begins(row.key)
        yield row


def requests_of(
    job_id: int,
    task: str,
    params: Mapping[str, Any],
    seed: int,
    rows: Iterable[tuple[int, int, Mapping[str, Any] | None]],
) -> Iterator[Request]:
    """Rows (index, attempt and payload each) as the engine takes them, without those that it cannot take."""
    for index, attempt, payload in rows:
        # What is left out will be an error row.
        with suppress(ValueError):
            yield to_request(RowKey(job_id, index, attempt), task, payload, params, seed)


def _requests(database: Database, jobs: Sequence[Job]) -> Iterator[Request]:
    each = max(1, ROWS // len(jobs))
    for job in jobs:
        yield from requests_of(job.id, job.task, job.params, job.seed, peek_requests(database, job.id, each))
