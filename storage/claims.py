"""Claims: which worker may write the result of which request.

A claim is (worker id, attempt). The worker id is one process's, never used again; the attempt grows with every claim of
the request. A result is accepted from exactly that pair, so a worker that was thought dead and comes back can neither
write twice nor overwrite. `now` is unix seconds, an argument.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, insert, or_, select, update

from storage.database import Database
from storage.errors import ClaimLost
from storage.schema import jobs, requests, workers
from storage.states import OPEN_JOBS, JobState, RequestState, jobs_before, requests_before

_IN_LIST = 500  # SQLite's oldest limit of parameters is 999


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker process. `stopped_at` is set once; after that it can neither claim nor record."""

    id: int
    hostname: str
    pid: int
    queue: str
    device: str
    model: str | None  # what it holds in memory
    started_at: float
    heartbeat_at: float
    lease_until: float
    stopped_at: float | None
    state: str  # free text for people
    process: str | None  # tells this process from a later one of the same number; None: not known
    message: str | None  # what it waits for, or leaves alone, and why
    retry_at: float | None  # when it tries again what it leaves alone

    def is_alive(self, now: float) -> bool:
        """Whether its lease holds."""
        return self.stopped_at is None and self.lease_until >= now


@dataclass(frozen=True, slots=True)
class ClaimedRequest:
    """One request to run. Its result must name the same job, index and attempt."""

    job_id: int
    index: int
    row_id: Any
    payload: dict[str, Any]
    attempt: int  # 1 at the first claim


def register_worker(
    db: Database, *, hostname: str, pid: int, queue: str, device: str, now: float, lease_s: float
) -> int:
    """Make the row of this process, with a lease from now; its number is what it claims with."""
    values = {"hostname": hostname, "pid": pid, "queue": queue, "device": device, "state": "starting"}
    times = {"started_at": now, "heartbeat_at": now, "lease_until": now + lease_s}
    with db.write() as connection:
        key = connection.execute(insert(workers).values(**values, **times)).inserted_primary_key
    assert key is not None
    return int(key[0])


def list_workers(db: Database, now: float | None = None) -> list[Worker]:
    """The workers that have not stopped, oldest first; given `now`, only those whose lease holds."""
    query = select(workers).where(workers.c.stopped_at.is_(None)).order_by(workers.c.id)
    if now is not None:
        query = query.where(workers.c.lease_until >= now)
    with db.read() as connection:
        return [Worker(*row) for row in connection.execute(query)]


def heartbeat(
    db: Database, worker_id: int, *, now: float, lease_s: float, model: str | None = None, state: str | None = None
) -> None:
    """Prolong the lease to `now + lease_s`; model and state are left as they are where None.

    A lease that ran out but that nobody took is taken up again. Raises ClaimLost once somebody did.
    """
    values: dict[str, Any] = {"heartbeat_at": now, "lease_until": now + lease_s}
    values |= {} if model is None else {"model": model}
    values |= {} if state is None else {"state": state}
    with db.write() as connection:
        mine = update(workers).where(workers.c.id == worker_id, workers.c.stopped_at.is_(None)).values(values)
        if connection.execute(mine).rowcount != 1:
            raise ClaimLost(worker_id)


def hold_worker(connection: Connection, worker_id: int) -> None:
    """Within a write transaction: nobody may expire this worker until it ends. Raises ClaimLost if somebody has."""
    mine = select(workers.c.id).where(workers.c.id == worker_id, workers.c.stopped_at.is_(None)).with_for_update()
    if connection.execute(mine).one_or_none() is None:
        raise ClaimLost(worker_id)


def claim(db: Database, worker_id: int, job_id: int, limit: int, *, now: float) -> list[ClaimedRequest]:
    """Take up to `limit` pending requests of a job, lowest index first; the job is running from the first claim on.

    Nothing to take, or a job that was cancelled meanwhile, is an empty list. Raises ClaimLost for an expired worker.
    """
    with db.write() as connection:
        hold_worker(connection, worker_id)
        state = connection.execute(
            select(jobs.c.state).where(jobs.c.id == job_id, jobs.c.visible).with_for_update()
        ).scalar_one_or_none()
        if state not in OPEN_JOBS:
            return []
        free = requests.c.state.in_(requests_before(RequestState.CLAIMED))
        # The lock on the job is enough. SKIP LOCKED here would make PostgreSQL run the subquery again for each row,
        # and so claim more than `limit`.
        next_free = (
            select(requests.c.index).where(requests.c.job_id == job_id, free).order_by(requests.c.index).limit(limit)
        )
        taken = connection.execute(
            update(requests)
            .where(requests.c.job_id == job_id, requests.c.index.in_(next_free), free)
            .values(state=RequestState.CLAIMED, worker_id=worker_id, attempt=requests.c.attempt + 1)
            .returning(requests.c.index, requests.c.row_id, requests.c.payload, requests.c.attempt)
        ).all()
        if taken:
            connection.execute(
                update(jobs)
                .where(jobs.c.id == job_id, jobs.c.state.in_(jobs_before(JobState.RUNNING)))
                .values(state=JobState.RUNNING)
            )
            connection.execute(
                update(jobs).where(jobs.c.id == job_id, jobs.c.started_at.is_(None)).values(started_at=now)
            )
    claimed = [
        ClaimedRequest(job_id, index, row_id, payload or {}, attempt) for index, row_id, payload, attempt in taken
    ]
    return sorted(claimed, key=lambda request: request.index)


def give_back(db: Database, worker_id: int, *, now: float) -> int:  # noqa: ARG001  (one signature for all verbs)
    """Make every request that this worker holds pending again; returns how many."""
    with db.write() as connection:
        return _release(connection, worker_id)


def give_back_requests(db: Database, worker_id: int, keys: Iterable[tuple[int, int]]) -> int:
    """Make these requests, (job id, index) each, pending again where this worker holds them; returns how many."""
    by_job: dict[int, list[int]] = {}
    for job_id, index in keys:
        by_job.setdefault(job_id, []).append(index)
    returned = 0
    with db.write() as connection:
        for job_id, indexes in by_job.items():
            for start in range(0, len(indexes), _IN_LIST):
                some = requests.c.index.in_(indexes[start : start + _IN_LIST])
                statement = _release_statement(worker_id).where(requests.c.job_id == job_id, some)
                returned += connection.execute(statement).rowcount
    return returned


def expire(db: Database, *, now: float, is_dead: Callable[[Worker], bool] | None = None) -> int:
    """Make the requests of dead workers pending again; returns how many.

    Dead is a worker whose lease is over, or of which `is_dead` knows that its process is gone (it is asked outside any
    transaction). Its row is marked expired, so that whatever it still writes is refused.
    """
    listed = list_workers(db)
    proven = [] if is_dead is None else [worker.id for worker in listed if is_dead(worker)]
    suspects = [worker.id for worker in listed if worker.lease_until < now or worker.id in proven]
    if not suspects:
        return 0  # the usual case takes no write lock
    returned = 0
    with db.write() as connection:
        for worker_id in suspects:
            # A heartbeat may have come since the list was read: only a proven death outweighs it.
            over = or_(workers.c.lease_until < now, workers.c.id.in_(proven))
            ended = update(workers).where(workers.c.id == worker_id, workers.c.stopped_at.is_(None), over)
            if connection.execute(ended.values(stopped_at=now, state="expired")).rowcount == 1:
                returned += _release(connection, worker_id)
    return returned


def stop_worker(db: Database, worker_id: int, *, now: float) -> None:
    """The orderly end of a worker: gives back what it holds and marks it stopped. A second time changes nothing."""
    with db.write() as connection:
        _release(connection, worker_id)
        connection.execute(
            update(workers)
            .where(workers.c.id == worker_id, workers.c.stopped_at.is_(None))
            .values(stopped_at=now, state="stopped")
        )


def _release_statement(worker_id: int) -> Any:
    held = (requests.c.worker_id == worker_id, requests.c.state == RequestState.CLAIMED)
    return update(requests).where(*held).values(state=RequestState.PENDING, worker_id=None)


def _release(connection: Connection, worker_id: int) -> int:
    return connection.execute(_release_statement(worker_id)).rowcount
