"""Jobs: looked up, cancelled, retried and failed. (`create_job` lives in storage.loading.)"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, Text, and_, delete, func, select, type_coerce, update

from storage.crashes import FOUND_GUILTY, new_group
from storage.database import Database
from storage.errors import InvalidTransition, JobNotFound, NothingToRetry
from storage.loading import NewJob, NewRequest, create_job, sweep_invisible
from storage.schema import jobs, object_of, outputs, requests
from storage.states import OPEN_JOBS, JobState, OutputStatus, RequestState, jobs_before, requests_before

__all__ = [
    "Job",
    "JobState",
    "NewJob",
    "NewRequest",
    "cancel_job",
    "cancelled_among",
    "create_job",
    "fail_job",
    "get_job",
    "list_jobs",
    "note_plan",
    "peek_requests",
    "retry_job",
    "runnable_jobs",
    "sweep_invisible",
]


@dataclass(frozen=True, slots=True)
class Job:
    """One job as it stood when it was read. Times are unix seconds."""

    id: int
    created_at: float
    started_at: float | None  # the first claim
    finished_at: float | None
    state: JobState
    model: str
    task: str
    params: dict[str, Any]
    seed: int
    priority: int  # higher first
    queue: str
    num_requests: int
    num_done: int  # requests whose output is a result
    num_failed: int  # requests whose output is an error
    prompt_tokens: int  # sums over the outputs
    generated_tokens: int
    message: str | None  # why the whole job failed
    plan: dict[str, Any] | None  # placement and batches that its rows were last computed under
    name: str | None  # what its owner calls it
    origin: dict[str, Any] | None  # for people: "dataset" (absolute path, or null), "prompt" (template), "choices"
    exact: bool = False  # only for workers that round nothing to four bits

    @property
    def is_finished(self) -> bool:
        """Done, failed or cancelled: nothing of it will run unless it is retried."""
        return self.state not in OPEN_JOBS

    @property
    def num_left(self) -> int:
        """Requests without an output."""
        return self.num_requests - self.num_done - self.num_failed


def _select_jobs() -> Select[*tuple[Any, ...]]:
    return select(*(jobs.c[name] for name in Job.__dataclass_fields__)).where(jobs.c.visible)


def _job(connection: Connection, job_id: int, *, lock: bool = False) -> Job:
    query = _select_jobs().where(jobs.c.id == job_id)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise JobNotFound(job_id)
    return Job(*row)


def get_job(db: Database, job_id: int) -> Job:
    """The job with this number. Raises JobNotFound."""
    with db.read() as connection:
        return _job(connection, job_id)


def list_jobs(db: Database, limit: int | None = None) -> list[Job]:
    """The newest jobs first; all of them without a limit."""
    with db.read() as connection:
        return [Job(*row) for row in connection.execute(_select_jobs().order_by(jobs.c.id.desc()).limit(limit))]


def runnable_jobs(db: Database, queue: str) -> list[Job]:
    """The jobs of a queue with requests to claim: highest priority first, then oldest, then lowest number."""
    waiting = select(requests.c.index).where(requests.c.job_id == jobs.c.id, requests.c.state == RequestState.PENDING)
    query = (
        _select_jobs()
        .where(jobs.c.queue == queue, jobs.c.state.in_(OPEN_JOBS), waiting.exists())
        .order_by(jobs.c.priority.desc(), jobs.c.created_at, jobs.c.id)
    )
    with db.read() as connection:
        return [Job(*row) for row in connection.execute(query)]


def peek_requests(db: Database, job_id: int, limit: int) -> list[tuple[int, int, dict[str, Any] | None]]:
    """Index, attempt and payload of the first pending requests, claimed by nobody: to see what they are like.

    Those that were in a crash are left out.
    """
    query = (
        select(requests.c.index, requests.c.attempt, type_coerce(requests.c.payload, Text))
        .where(
            requests.c.job_id == job_id,
            requests.c.state == RequestState.PENDING,
            requests.c.crash_group.is_(None),
        )
        .order_by(requests.c.index)
        .limit(limit)
    )
    with db.read() as connection:
        return [(index, attempt, object_of(text)) for index, attempt, text in connection.execute(query)]


def note_plan(db: Database, job_id: int, plan: dict[str, Any]) -> None:
    """Remember under which plan a job's rows are computed; a job that is gone stays gone."""
    with db.write() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(plan=plan))


def cancelled_among(db: Database, job_ids: Iterable[int]) -> set[int]:
    """Those of these jobs whose claimed requests are no longer wanted: cancelled, failed as a whole, or pruned."""
    wanted = set(job_ids)
    if not wanted:
        return set()
    unwanted = (JobState.CANCELLED, JobState.FAILED)
    query = select(jobs.c.id).where(jobs.c.id.in_(wanted), jobs.c.visible, jobs.c.state.not_in(unwanted))
    with db.read() as connection:
        return wanted - set(connection.execute(query).scalars())


def cancel_job(db: Database, job_id: int, *, now: float) -> Job:
    """Stop a job: outputs already made stay, everything else is cancelled; results that still arrive are discarded.

    Raises JobNotFound, or InvalidTransition when it has finished already.
    """
    with db.write() as connection:
        job = _job(connection, job_id, lock=True)
        if job.state not in jobs_before(JobState.CANCELLED):
            raise InvalidTransition(f"Job {job_id} is already {job.state}; there is nothing to cancel.")
        return _end(connection, job_id, JobState.CANCELLED, None, now)


def fail_job(db: Database, job_id: int, message: str, *, now: float) -> Job:
    """End a job for a reason that is not one row's: `message` tells people which. A finished job is left as it is.

    Raises JobNotFound.
    """
    with db.write() as connection:
        job = _job(connection, job_id, lock=True)
        if job.state not in jobs_before(JobState.FAILED):
            return job
        return _end(connection, job_id, JobState.FAILED, message, now)


def _end(connection: Connection, job_id: int, state: JobState, message: str | None, now: float) -> Job:
    connection.execute(
        update(requests)
        .where(requests.c.job_id == job_id, requests.c.state.in_(requests_before(RequestState.CANCELLED)))
        .values(state=RequestState.CANCELLED, worker_id=None)
    )
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(state=state, message=message, finished_at=now))
    return _job(connection, job_id)


def retry_job(db: Database, job_id: int, *, now: float) -> Job:  # noqa: ARG001  (one signature for all verbs)
    """Queue again every failed request (its error output is removed) and every cancelled one; results stay.

    Rows that were refused at enqueue have nothing to run and stay failed. A job that has not finished goes on, with
    its failed requests queued again. Raises JobNotFound, or NothingToRetry.
    """
    of_job = requests.c.job_id == job_id
    again = and_(of_job, requests.c.state.in_(requests_before_retry()), requests.c.payload.is_not(None))
    with db.write() as connection:
        job = _job(connection, job_id, lock=True)
        errors = and_(
            outputs.c.job_id == job_id,
            outputs.c.status == OutputStatus.ERROR,
            select(requests.c.index).where(again, requests.c.index == outputs.c.index).exists(),
        )
        failed, prompt_tokens, generated_tokens = connection.execute(
            select(
                func.count(),
                func.coalesce(func.sum(outputs.c.prompt_tokens), 0),
                func.coalesce(func.sum(outputs.c.completion_tokens), 0),
            ).where(errors)
        ).one()
        connection.execute(delete(outputs).where(errors))
        guilty = select(requests.c.index).where(again, requests.c.crash_group == FOUND_GUILTY)
        for index in connection.execute(guilty.order_by(requests.c.index)).scalars().all():
            # One that was found to end its worker gets another chance, apart from all others.
            alone = update(requests).where(requests.c.job_id == job_id, requests.c.index == index)
            connection.execute(alone.values(crash_group=new_group(connection)))
        queued = connection.execute(update(requests).where(again).values(state=RequestState.PENDING)).rowcount
        if queued == 0:
            raise NothingToRetry(_why_nothing(job))
        connection.execute(
            update(jobs)
            .where(jobs.c.id == job_id)
            .values(
                state=JobState.QUEUED if job.is_finished else job.state,
                finished_at=None,
                message=None,
                num_failed=jobs.c.num_failed - failed,
                prompt_tokens=jobs.c.prompt_tokens - prompt_tokens,
                generated_tokens=jobs.c.generated_tokens - generated_tokens,
            )
        )
        return _job(connection, job_id)


def requests_before_retry() -> tuple[RequestState, ...]:
    """The request states that a retry makes pending: those that may become so, but for a live claim."""
    return tuple(s for s in requests_before(RequestState.PENDING) if s is not RequestState.CLAIMED)


def _why_nothing(job: Job) -> str:
    if job.num_failed:
        return f"Job {job.id} has nothing to retry: its {job.num_failed} failed rows were refused when it was enqueued."
    return f"Job {job.id} has nothing to retry: no request of it failed or was cancelled."
