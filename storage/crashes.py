"""Crashes: which rows were in a pass when their process died, and how the one that killed it is found.

Rows that were in a crash together are divided into two groups, and each group runs apart from everything else. A group
that ends its process again is divided again, so that one row among n stands alone after about log2 n crashes. A process
may also be killed by somebody else, so a row is found guilty only when it stood alone, and in its third crash.
"""

from collections.abc import Collection, Iterable, Iterator

from sqlalchemy import Connection, and_, func, or_, select, update

from storage.claims import lock_jobs
from storage.database import Database
from storage.dialects import one_at_a_time
from storage.schema import requests
from storage.states import RequestState

FOUND_GUILTY = 0
"""The group of rows that run no more; every other group is above."""
LEAST_CRASHES = 3
"""Before that, a crash may well have been somebody's kill -9."""
_NUMBERING = 0x6F766E67  # PostgreSQL's name for "one transaction makes groups"
_IN_LIST = 500  # SQLite's oldest limit of parameters is 999


def count_crash(db: Database, worker_id: int, rows: Iterable[tuple[int, int, int]]) -> int:
    """The process of a worker died while these rows, (job id, index, attempt) each, were in a pass.

    Returns how many of them are found guilty by now: one or none. Rows that ended meanwhile or were claimed again are
    left alone. Each counted row begins a new attempt, so the same death is never counted twice.
    """
    running = sorted(rows)
    with db.write() as connection:
        lock_jobs(connection, {job_id for job_id, _, _ in running})
        found = [
            (job_id, index, crashes)
            for job_id in sorted({job_id for job_id, _, _ in running})
            for index, crashes in _blamable(connection, worker_id, job_id, [row for row in running if row[0] == job_id])
        ]
        guilty = len(running) == 1 and len(found) == 1 and found[0][2] + 1 >= LEAST_CRASHES
        group = new_group(connection)
        groups = (group, group + 1)
        middle = (len(found) + 1) // 2
        for number, (job_id, index, _) in enumerate(sorted(found)):
            row = (requests.c.job_id == job_id, requests.c.index == index)
            values = {
                "attempt": requests.c.attempt + 1,
                "crashes": requests.c.crashes + 1,
                "crash_group": FOUND_GUILTY if guilty else groups[number >= middle],
            }
            connection.execute(update(requests).where(*row).values(values))
    return int(guilty)


def _blamable(
    connection: Connection, worker_id: int, job_id: int, rows: list[tuple[int, int, int]]
) -> Iterator[tuple[int, int]]:
    """Index and crashes of the rows of one job that are as the dead worker left them, or were given back since."""
    attempts = {index: attempt for _, index, attempt in rows}
    indexes = list(attempts)
    is_held = and_(requests.c.state == RequestState.CLAIMED, requests.c.worker_id == worker_id)
    for start in range(0, len(indexes), _IN_LIST):
        some = requests.c.index.in_(indexes[start : start + _IN_LIST])
        query = (
            select(requests.c.index, requests.c.attempt, requests.c.crashes)
            .where(requests.c.job_id == job_id, some, or_(requests.c.state == RequestState.PENDING, is_held))
            .with_for_update()
        )
        for index, attempt, crashes in connection.execute(query).all():
            if attempts[index] == attempt:
                yield index, crashes


def new_group(connection: Connection) -> int:
    """Within a write transaction: a number from which on no group has been made."""
    one_at_a_time(connection, _NUMBERING)
    # Named for the index of the few rows that have a group: without the condition all rows would be looked at.
    last = select(func.max(requests.c.crash_group)).where(requests.c.crash_group.is_not(None))
    return max(connection.execute(last).scalar_one() or FOUND_GUILTY, FOUND_GUILTY) + 1


def only_suspects(db: Database, job_ids: Collection[int]) -> set[int]:
    """Those of these jobs whose every pending row was in a crash, so that it must run apart."""
    pending = requests.c.state == RequestState.PENDING
    suspects = select(requests.c.job_id).where(requests.c.crash_group.is_not(None), pending).distinct()
    with db.read() as connection:
        found = set(connection.execute(suspects).scalars()) & set(job_ids)
        for job_id in sorted(found):  # nearly always none, found by one look into a small index
            plain = (requests.c.job_id == job_id, pending, requests.c.crash_group.is_(None))
            if connection.execute(select(requests.c.index).where(*plain).limit(1)).first() is not None:
                found.discard(job_id)
    return found
