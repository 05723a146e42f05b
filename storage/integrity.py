"""The laws of the tables, checked: called at the end of tests, and by anyone who doubts a database."""

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Column, Connection, and_, func, or_, select

from storage.database import Database
from storage.errors import IntegrityBroken
from storage.schema import jobs, outputs, requests, workers
from storage.states import OPEN_JOBS, JobState, OutputStatus, RequestState

_WITH_OUTPUT = (RequestState.DONE, RequestState.FAILED)


def check_integrity(db: Database) -> None:
    """Raise IntegrityBroken, listing every broken law with both its sides; reads all rows, so it takes a while."""
    with db.read() as connection:
        faults = [*_sqlite_faults(connection), *_sum_faults(connection), *_row_faults(connection)]
    if faults:
        raise IntegrityBroken(faults)


def _sqlite_faults(connection: Connection) -> Iterator[str]:
    if connection.dialect.name != "sqlite":
        return
    for (line,) in connection.exec_driver_sql("PRAGMA integrity_check"):
        if line != "ok":
            yield f"integrity_check: {line}"
    for row in connection.exec_driver_sql("PRAGMA foreign_key_check"):
        yield f"foreign_key_check: {tuple(row)}"


def _sum_faults(connection: Connection) -> Iterator[str]:
    """Each visible job's counters against its rows."""
    states = _by_job(connection, requests.c.job_id, requests.c.state)
    made = _by_job(connection, outputs.c.job_id, outputs.c.status)
    tokens = {
        job_id: (prompt, completion)
        for job_id, prompt, completion in connection.execute(
            select(outputs.c.job_id, func.sum(outputs.c.prompt_tokens), func.sum(outputs.c.completion_tokens)).group_by(
                outputs.c.job_id
            )
        )
    }
    for job in connection.execute(select(jobs).where(jobs.c.visible).order_by(jobs.c.id)):
        count, out = states.get(job.id, {}), made.get(job.id, {})
        sides = [
            ("num_requests", job.num_requests, "its requests", sum(count.values())),
            ("num_done", job.num_done, "its done requests", count.get(RequestState.DONE, 0)),
            ("num_done", job.num_done, "its ok outputs", out.get(OutputStatus.OK, 0)),
            ("num_failed", job.num_failed, "its failed requests", count.get(RequestState.FAILED, 0)),
            ("num_failed", job.num_failed, "its error outputs", out.get(OutputStatus.ERROR, 0)),
            ("tokens", (job.prompt_tokens, job.generated_tokens), "its outputs' sums", tokens.get(job.id, (0, 0))),
        ]
        yield from (f"job {job.id}: {name} {a} != {what} {b}" for name, a, what, b in sides if a != b)
        left = count.get(RequestState.PENDING, 0) + count.get(RequestState.CLAIMED, 0)
        if (job.state in OPEN_JOBS) != (left > 0):
            yield f"job {job.id}: is {job.state}, with {left} requests pending or claimed"
        if job.state == JobState.DONE and job.num_done + job.num_failed != job.num_requests:
            yield f"job {job.id}: is done with {job.num_done} + {job.num_failed} of {job.num_requests} requests"
        if (job.state in OPEN_JOBS) != (job.finished_at is None):
            yield f"job {job.id}: is {job.state}, finished_at {job.finished_at}"


def _row_faults(connection: Connection) -> Iterator[str]:
    """Requests against their outputs, and claims against their workers."""
    joined = requests.outerjoin(
        outputs, (requests.c.job_id == outputs.c.job_id) & (requests.c.index == outputs.c.index)
    )
    has_output = outputs.c.index.is_not(None)
    agrees = or_(
        and_(requests.c.state == RequestState.DONE, has_output, outputs.c.status == OutputStatus.OK),
        and_(requests.c.state == RequestState.FAILED, has_output, outputs.c.status == OutputStatus.ERROR),
        and_(requests.c.state.not_in(_WITH_OUTPUT), outputs.c.index.is_(None)),
    )
    disagree = (
        select(requests.c.job_id, requests.c.index, requests.c.state, outputs.c.status)
        .select_from(joined)
        .where(~agrees)
    )
    for job_id, index, state, status in connection.execute(disagree.limit(20)):
        yield f"request {job_id}/{index}: is {state}, its output is {status}"
    orphans = (
        select(requests.c.job_id, requests.c.index, workers.c.id)
        .join_from(requests, workers, requests.c.worker_id == workers.c.id)
        .where(workers.c.stopped_at.is_not(None))
    )
    for job_id, index, worker_id in connection.execute(orphans.limit(20)):
        yield f"request {job_id}/{index}: claimed by worker {worker_id}, which has stopped"


def _by_job(connection: Connection, job_id: Column[int], kind: Column[Any]) -> dict[int, dict[Any, int]]:
    """How many rows of each kind every job has."""
    counted: dict[int, dict[Any, int]] = {}
    for job, value, number in connection.execute(select(job_id, kind, func.count()).group_by(job_id, kind)):
        counted.setdefault(job, {})[value] = number
    return counted
