"""Claims: which worker may write the result of which request.

A claim is (worker id, attempt). The worker id is one process's, never used again; the attempt grows with every claim of
the request. A result is accepted from exactly that pair, so a worker that was thought dead and comes back can neither
write twice nor overwrite. `now` is unix seconds, an argument, by the database's clock (`storage.clock`).

Locks are taken in one order, so that PostgreSQL never sees a deadlock: worker, jobs by number, requests.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Text, insert, or_, select, type_coerce, update

from storage.database import Database
from storage.errors import ClaimLost
from storage.schema import jobs, object_of, requests, workers
from storage.states import OPEN_JOBS, JobState, RequestState, jobs_before, requests_before

_IN_LIST = 500  # SQLite's oldest limit of parameters is 999
_Taken = tuple[int, int, str | None, int, int, int | None]
"""Job, index, payload as text, attempt, crashes, group."""


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
class Doing:
    """What a worker tells people of itself."""

    state: str  # "idle", "loading", ...: free text
    model: str | None = None  # what it holds in memory, or loads
    message: str | None = None  # what it waits for, or leaves alone, and why
    retry_at: float | None = None  # when it tries that again


@dataclass(frozen=True, slots=True)
class ClaimedRequest:
    """One request to run. Its result must name the same job, index and attempt."""

    job_id: int
    index: int
    payload: dict[str, Any] | None  # None: what is stored cannot be read
    attempt: int  # 1 at the first claim
    crashes: int = 0  # processes that died while it was in a pass
    crash_group: int | None = None  # those it was in such a crash with, if any


def register_worker(
    db: Database,
    *,
    hostname: str,
    pid: int,
    queue: str,
    device: str,
    now: float,
    lease_s: float,
    process: str | None = None,
) -> int:
    """Make the row of this process, with a lease from now; its number is what it claims with."""
    values: dict[str, Any] = {"hostname": hostname, "pid": pid, "queue": queue, "device": device}
    values |= {"state": "starting", "process": process}
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


def heartbeat(db: Database, worker_id: int, *, now: float, lease_s: float, doing: Doing | None = None) -> None:
    """Prolong the lease to `now + lease_s`; what people are told stays as it is without `doing`.

    A lease that ran out but that nobody took is taken up again. Raises ClaimLost once somebody did.
    """
    values: dict[str, Any] = {"heartbeat_at": now, "lease_until": now + lease_s}
    values |= {} if doing is None else asdict(doing)
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

    Those that were in a crash are left out (`claim_suspects`). Nothing to take, or a job that was cancelled meanwhile,
    is an empty list. Raises ClaimLost for an expired worker.
    """
    with db.write() as connection:
        hold_worker(connection, worker_id)
        if not _lock_open(connection, [job_id]):
            return []
        free = (requests.c.job_id == job_id, _is_free(), requests.c.crash_group.is_(None))
        # The lock on the job is enough. SKIP LOCKED here would make PostgreSQL run the subquery again for each row,
        # and so claim more than `limit`.
        next_free = select(requests.c.index).where(*free).order_by(requests.c.index).limit(limit)
        taken = _take(connection, worker_id, [*free, requests.c.index.in_(next_free)], now)
    return _claimed(taken)


def claim_suspects(db: Database, worker_id: int, job_ids: Sequence[int], *, now: float) -> list[ClaimedRequest]:
    """Take the pending requests of these jobs that are to run apart from all others: one group of a crash, whole.

    Nothing to take is an empty list. Raises ClaimLost for an expired worker.
    """
    with db.write() as connection:
        hold_worker(connection, worker_id)
        among = (requests.c.job_id.in_(_lock_open(connection, job_ids)), _is_free())
        next_group = (
            select(requests.c.crash_group)
            .where(*among, requests.c.crash_group.is_not(None))
            .order_by(requests.c.crash_group)
            .limit(1)
        )
        group = connection.execute(next_group).scalar_one_or_none()
        taken = [] if group is None else _take(connection, worker_id, [*among, requests.c.crash_group == group], now)
    return _claimed(taken)


def served_jobs(db: Database, *, but: int) -> set[int]:
    """The jobs of which some worker other than `but` holds requests."""
    held = select(requests.c.job_id).where(requests.c.worker_id.is_not(None), requests.c.worker_id != but).distinct()
    with db.read() as connection:
        return set(connection.execute(held).scalars())


def held_claims(db: Database, worker_id: int) -> set[tuple[int, int, int]]:
    """What the database thinks that a worker runs: job, index and attempt of each claimed request."""
    held = select(requests.c.job_id, requests.c.index, requests.c.attempt).where(
        requests.c.worker_id == worker_id, requests.c.state == RequestState.CLAIMED
    )
    with db.read() as connection:
        return {(job_id, index, attempt) for job_id, index, attempt in connection.execute(held)}


def _lock_open(connection: Connection, job_ids: Iterable[int]) -> list[int]:
    """Those of the jobs that have work to do; nobody can end them until the transaction does."""
    open_jobs = (jobs.c.id.in_(list(job_ids)), jobs.c.visible, jobs.c.state.in_(OPEN_JOBS))
    return list(connection.execute(select(jobs.c.id).where(*open_jobs).order_by(jobs.c.id).with_for_update()).scalars())


def _is_free() -> ColumnElement[bool]:
    return requests.c.state.in_(requests_before(RequestState.CLAIMED))


def _take(connection: Connection, worker_id: int, which: Sequence[ColumnElement[bool]], now: float) -> list[_Taken]:
    # The payload as text: what cannot be parsed is one row's fault, found outside the transaction.
    wanted = (requests.c.job_id, requests.c.index, type_coerce(requests.c.payload, Text), requests.c.attempt)
    rows = connection.execute(
        update(requests)
        .where(*which)
        .values(state=RequestState.CLAIMED, worker_id=worker_id, attempt=requests.c.attempt + 1)
        .returning(*wanted, requests.c.crashes, requests.c.crash_group)
    ).all()
    taken: list[_Taken] = [(*row,) for row in rows]
    of_these = jobs.c.id.in_({job_id for job_id, *_ in taken})
    if taken:
        begins = (of_these, jobs.c.state.in_(jobs_before(JobState.RUNNING)))
        connection.execute(update(jobs).where(*begins).values(state=JobState.RUNNING))
        connection.execute(update(jobs).where(of_these, jobs.c.started_at.is_(None)).values(started_at=now))
    return taken


def _claimed(taken: Iterable[_Taken]) -> list[ClaimedRequest]:
    return [
        ClaimedRequest(job_id, index, object_of(text), attempt, crashes, group)
        for job_id, index, text, attempt, crashes, group in sorted(taken, key=lambda row: row[:2])
    ]


def give_back(db: Database, worker_id: int, *, now: float) -> int:  # noqa: ARG001  (one signature for all verbs)
    """Make every request that this worker holds pending again; returns how many."""
    with db.write() as connection:
        return _release(connection, worker_id)


def give_back_requests(db: Database, worker_id: int, claims: Iterable[tuple[int, int, int]]) -> int:
    """Make these requests pending again where this worker holds them under that very claim; returns how many.

    A claim is (job id, index, attempt).
    """
    by_epoch: dict[tuple[int, int], list[int]] = {}
    for job_id, index, attempt in sorted(claims):
        by_epoch.setdefault((job_id, attempt), []).append(index)
    returned = 0
    with db.write() as connection:
        lock_jobs(connection, [job_id for job_id, _ in by_epoch])
        for (job_id, attempt), indexes in by_epoch.items():
            for start in range(0, len(indexes), _IN_LIST):
                some = requests.c.index.in_(indexes[start : start + _IN_LIST])
                these = (requests.c.job_id == job_id, requests.c.attempt == attempt, some)
                returned += connection.execute(_release_statement(worker_id).where(*these)).rowcount
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
    for worker_id in suspects:
        with db.write() as connection:
            # A heartbeat may have come since the list was read: only a proven death outweighs it.
            over = or_(workers.c.lease_until < now, workers.c.id.in_(proven))
            ended = update(workers).where(workers.c.id == worker_id, workers.c.stopped_at.is_(None), over)
            if connection.execute(ended.values(stopped_at=now, state="expired")).rowcount == 1:
                returned += _release(connection, worker_id)
    return returned


def stop_worker(db: Database, worker_id: int, *, now: float) -> None:
    """The orderly end of a worker: gives back what it holds and marks it stopped. A second time changes nothing."""
    mine = update(workers).where(workers.c.id == worker_id, workers.c.stopped_at.is_(None))
    with db.write() as connection:
        connection.execute(mine.values(stopped_at=now, state="stopped"))
        _release(connection, worker_id)


def _release_statement(worker_id: int) -> Any:
    held = (requests.c.worker_id == worker_id, requests.c.state == RequestState.CLAIMED)
    return update(requests).where(*held).values(state=RequestState.PENDING, worker_id=None)


def _release(connection: Connection, worker_id: int) -> int:
    held = select(requests.c.job_id).where(requests.c.worker_id == worker_id).distinct()
    lock_jobs(connection, list(connection.execute(held).scalars()))
    return connection.execute(_release_statement(worker_id)).rowcount


def lock_jobs(connection: Connection, job_ids: Iterable[int]) -> None:
    """Within a write transaction: nobody may end these jobs until it ends. To be done before requests are touched."""
    connection.execute(select(jobs.c.id).where(jobs.c.id.in_(set(job_ids))).order_by(jobs.c.id).with_for_update())
