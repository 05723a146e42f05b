"""Pruning: finished jobs that are old enough go, with everything that only they needed, while others go on working.

No transaction takes longer than a moment (`storage.pace`). One that is killed leaves jobs that nobody sees with some of
their rows, and the next one ends what it began.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, delete, func, select, update

from storage.database import Database
from storage.loading import remove_rows
from storage.pace import Pace
from storage.schema import faults, jobs, passes, requests, workers
from storage.states import OPEN_JOBS

_PASSES_PAGE = 1000
_IN_LIST = 500  # SQLite's oldest limit of parameters is 999


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was deleted, or would be."""

    jobs: tuple[int, ...]
    """Their numbers, in order."""
    requests: int
    """Requests of these jobs; their outputs are not counted."""
    passes: int
    workers: int
    faults: int


def look(db: Database, *, before: float) -> Pruned:
    """What `prune` would take now; nothing is changed. `before`: unix seconds."""
    with db.read() as connection:
        rows = connection.execute(select(jobs.c.id, jobs.c.num_requests).where(_old(before)).order_by(jobs.c.id)).all()
        old_faults = connection.execute(select(func.count()).where(faults.c.happened_at < before)).scalar_one()
    gone = {job_id for job_id, _ in rows}
    useless = {pass_id for page in _useless_passes(db, before, gone) for pass_id in page}
    return Pruned(
        jobs=tuple(sorted(gone)),
        requests=sum(number for _, number in rows),
        passes=len(useless),
        workers=len(_useless_workers(db, before, useless)),
        faults=int(old_faults),
    )


def prune(db: Database, *, before: float, pace: Pace | None = None) -> Pruned:
    """Delete what finished before `before` (unix seconds): jobs with requests and outputs, passes of jobs that are all
    gone, workers that stopped before it and that nothing refers to, faults. Jobs that may still run stay.

    The file keeps its size: see `storage.space`.
    """
    pace = pace or Pace(1000)
    with db.read() as connection:
        old = connection.execute(select(jobs.c.id).where(_old(before)).order_by(jobs.c.id)).scalars().all()
        # What an earlier one left when it was killed.
        is_begun = and_(jobs.c.visible.is_(False), jobs.c.state.not_in(OPEN_JOBS))
        left = list(connection.execute(select(jobs.c.id).where(is_begun)).scalars())
    gone, num_requests = [], 0
    for job_id in old:
        # Looked at again: somebody may have retried it since.
        mine = and_(jobs.c.id == job_id, _old(before))
        with db.write() as connection:
            row = connection.execute(select(jobs.c.num_requests).where(mine)).one_or_none()
            if row is not None:
                # Its age begins anew, so that no worker's sweep deletes it, too, while this goes on.
                connection.execute(update(jobs).where(mine).values(visible=False, loaded_at=time.time()))
        if row is not None:
            remove_rows(db, job_id, pace)
            gone.append(job_id)
            num_requests += row.num_requests
    for job_id in left:
        remove_rows(db, job_id, pace)
    num_passes = 0
    for page in _useless_passes(db, before, set()):
        num_passes += len(page)
        for start in range(0, len(page), _IN_LIST):
            with pace.step(), db.write() as connection:
                connection.execute(delete(passes).where(passes.c.id.in_(page[start : start + _IN_LIST])))
    useless = _useless_workers(db, before, set())
    for worker_id in useless:
        with pace.step(), db.write() as connection:
            connection.execute(delete(workers).where(workers.c.id == worker_id))
    with db.write() as connection:
        num_faults = connection.execute(delete(faults).where(faults.c.happened_at < before)).rowcount
    return Pruned(tuple(gone), num_requests, num_passes, len(useless), num_faults)


def _old(before: float) -> ColumnElement[bool]:
    return and_(jobs.c.visible, jobs.c.state.not_in(OPEN_JOBS), jobs.c.finished_at < before)


def _useless_passes(db: Database, before: float, gone: set[int]) -> Iterator[list[int]]:
    """Pages of the passes whose jobs are all away, or in `gone`; of those without a job, the ones before `before`."""
    last = 0
    while True:
        query = select(passes.c.id, passes.c.job_ids, passes.c.started_at).where(passes.c.id > last)
        with db.read() as connection:
            # In one transaction: a job that a pass of this page names cannot be newer than the page.
            page = connection.execute(query.order_by(passes.c.id).limit(_PASSES_PAGE)).all()
            there = set(connection.execute(select(jobs.c.id)).scalars()) - gone
        useless = [
            pass_id
            for pass_id, job_ids, started_at in page
            if (there.isdisjoint(job_ids) if job_ids else started_at < before)
        ]
        if useless:
            yield useless
        if len(page) < _PASSES_PAGE:
            return
        last = page[-1][0]


def _useless_workers(db: Database, before: float, without: set[int]) -> list[int]:
    """The workers that stopped before `before` and that nothing refers to, the passes in `without` left aside.

    A worker that has stopped is never referred to again.
    """
    with db.read() as connection:
        stopped = set(connection.execute(select(workers.c.id).where(workers.c.stopped_at < before)).scalars())
        if not stopped:
            return []
        kept: set[int] = set()
        if without:
            rows = connection.execute(select(passes.c.id, passes.c.worker_id))
            kept |= {worker_id for pass_id, worker_id in rows if pass_id not in without}
        else:
            kept |= set(connection.execute(select(passes.c.worker_id).distinct()).scalars())
        holds = select(requests.c.worker_id).where(requests.c.worker_id.is_not(None)).distinct()
        kept |= {worker_id for (worker_id,) in connection.execute(holds) if worker_id is not None}
    return sorted(stopped - kept)
