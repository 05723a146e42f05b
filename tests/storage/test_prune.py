"""What is old goes, whatever may still be needed stays, and others are never kept waiting."""

import itertools
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import func, insert, select

from storage.claims import claim, register_worker, stop_worker
from storage.database import Database
from storage.errors import JobNotFound
from storage.jobs import cancel_job, get_job, list_jobs, retry_job
from storage.pace import GAP_S, Pace
from storage.prune import look, prune
from storage.results import list_passes, record, stream_outputs
from storage.schema import faults, jobs, outputs, requests, workers
from storage.space import Space, give_back, rewrite, space_of
from tests.storage.factories import make_job, make_worker, pass_totals, result_of


def finish(db: Database, job_id: int, *, now: float, stop: bool = True) -> int:
    """A worker does all of a job and stops; its number."""
    worker = make_worker(db, now=now)
    claimed = claim(db, worker, job_id, 1000, now=now)
    record(db, worker, [result_of(row) for row in claimed], pass_totals(job_id), now=now)
    if stop:
        stop_worker(db, worker, now=now)
    return worker


def counts(db: Database) -> dict[str, int]:
    tables = (jobs, requests, outputs, workers, faults)
    with db.read() as connection:
        return {t.name: connection.execute(select(func.count()).select_from(t)).scalar_one() for t in tables}


def fault(db: Database, model: str, happened_at: float) -> None:
    values = {"machine": "box", "model": model, "kind": "loading", "count": 1, "message": "", "retry_at": happened_at}
    with db.write() as connection:
        connection.execute(insert(faults).values(happened_at=happened_at, **values))


def test_what_is_old_goes_with_all_that_only_it_needed(db: Database) -> None:
    old, young = make_job(db, 4), make_job(db, 3)
    finish(db, old, now=100.0)
    kept = finish(db, young, now=900.0)
    fault(db, "a", 100.0)
    fault(db, "b", 900.0)
    seen = look(db, before=500.0)
    assert prune(db, before=500.0) == seen
    assert (seen.jobs, seen.requests, seen.passes, seen.workers, seen.faults) == ((old,), 4, 1, 1, 1)
    assert counts(db) == {"jobs": 1, "requests": 3, "outputs": 3, "workers": 1, "faults": 1}
    assert [row.worker_id for row in list_passes(db)] == [kept]
    with pytest.raises(JobNotFound):
        get_job(db, old)


def test_what_may_still_run_or_is_young_stays(db: Database) -> None:
    waiting, begun, cancelled, done = (make_job(db, 2) for _ in range(4))
    worker = make_worker(db, now=1.0)
    claim(db, worker, begun, 1, now=1.0)
    cancel_job(db, cancelled, now=500.0)  # exactly as old as the limit
    finish(db, done, now=600.0)
    before = counts(db)
    assert prune(db, before=500.0).jobs == ()
    assert counts(db) == before
    assert {job.id for job in list_jobs(db)} == {waiting, begun, cancelled, done}


def test_a_job_that_is_retried_meanwhile_stays(db: Database) -> None:
    first, second = make_job(db, 2), make_job(db, 2)
    for job_id in (first, second):
        cancel_job(db, job_id, now=1.0)

    # The first transaction of the first job's removal is under way when somebody asks for the second one again.
    class Retrying(Pace):
        def __init__(self) -> None:
            super().__init__(1, sleep=lambda _: None)
            self.asked = False

        def step(self):  # type: ignore[no-untyped-def]
            if not self.asked:
                self.asked = True
                retry_job(db, second, now=2.0)
            return super().step()

    assert prune(db, before=10.0, pace=Retrying()).jobs == (first,)
    assert get_job(db, second).state == "queued"


def test_a_pass_goes_with_the_last_of_its_jobs(db: Database) -> None:
    old, young = make_job(db, 1), make_job(db, 1)
    worker = finish(db, old, now=100.0, stop=False)
    record(db, worker, [], pass_totals(old, young), now=100.0)
    cancel_job(db, young, now=900.0)
    stop_worker(db, worker, now=100.0)
    gone = prune(db, before=500.0)
    assert (gone.jobs, gone.passes, gone.workers) == ((old,), 1, 0)  # the shared pass names the worker
    gone = prune(db, before=1000.0)
    assert (gone.jobs, gone.passes, gone.workers) == ((young,), 1, 1)
    assert counts(db)["workers"] == 0


def test_a_worker_that_has_not_stopped_stays(db: Database) -> None:
    worker = register_worker(db, hostname="box", pid=1, queue="q", device="cpu", now=1.0, lease_s=1.0)
    assert prune(db, before=500.0).workers == 0
    stop_worker(db, worker, now=2.0)
    assert prune(db, before=500.0).workers == 1


def test_what_a_killed_prune_left_goes_with_the_next(db: Database) -> None:
    job_id = make_job(db, 10)
    finish(db, job_id, now=1.0)

    class Killed(Pace):
        def __init__(self) -> None:
            super().__init__(3, most=3, sleep=lambda _: None)
            self.steps = 0

        def step(self):  # type: ignore[no-untyped-def]
            self.steps += 1
            if self.steps == 3:
                raise KeyboardInterrupt
            return super().step()

    with pytest.raises(KeyboardInterrupt):
        prune(db, before=10.0, pace=Killed())
    assert (counts(db)["requests"], list_jobs(db)) == (4, [])
    prune(db, before=10.0)
    assert counts(db) == {"jobs": 0, "requests": 0, "outputs": 0, "workers": 0, "faults": 0}


def test_the_pace_keeps_transactions_short_and_leaves_gaps() -> None:
    now, slept = 0.0, []
    pace = Pace(1000, most=4000, clock=lambda: now, sleep=slept.append)
    sizes = []
    for seconds in (0.2, 0.2, 0.01, 0.01, 0.01, 0.01, 0.08):
        with pace.step() as size:
            sizes.append(size)
            now += seconds
    assert sizes == [1000, 500, 250, 500, 1000, 2000, 4000]
    assert pace.size == 4000
    assert slept == [GAP_S]  # after the second
    assert GAP_S > 0.1


def test_others_get_the_lock_in_each_gap(path: Path, db: Database) -> None:
    job_id = make_job(db, 5000)
    cancel_job(db, job_id, now=1.0)
    ticks = itertools.count()
    gaps = []
    with Database.open(str(path), busy_timeout_s=0.0) as other:

        def gap(seconds: float) -> None:
            gaps.append(make_job(other, 1))  # it does not wait: a lock that is held would raise DatabaseLocked

        # Each look at this clock is 0.11 s after the last, so each step takes that long, and a gap follows each third.
        prune(db, before=10.0, pace=Pace(500, most=500, clock=lambda: next(ticks) * 0.11, sleep=gap))
        assert len(gaps) == 3  # of ten steps with rows, and one without
        give_back(db, Pace(10, most=10, clock=lambda: next(ticks) * 0.11, sleep=gap))
    assert len(gaps) > 5
    assert {job.id for job in list_jobs(db)} == set(gaps)


def test_the_space_of_a_new_file_comes_back_in_pieces(path: Path, db: Database) -> None:
    job_id = make_job(db, 5000)
    cancel_job(db, job_id, now=1.0)
    full = path.stat().st_size
    prune(db, before=10.0)
    assert path.stat().st_size == full
    pace = Pace(10, most=50, sleep=lambda _: None)
    give_back(db, pace)
    space = space_of(db)
    assert space == Space(path.stat().st_size, 0, is_incremental=True)
    assert path.stat().st_size < full / 3
    assert pace.size == 50


def test_an_old_file_is_written_anew_once(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as old:
        old.execute("CREATE TABLE t (x)")
        old.execute("DROP TABLE t")
    old.close()
    with Database.open(str(path)) as db:
        job_id = make_job(db, 5000)
        cancel_job(db, job_id, now=1.0)
        prune(db, before=10.0)
        full = path.stat().st_size
        give_back(db)
        space = space_of(db)
        assert space is not None
        assert (space.size, space.is_incremental, space.free > full / 2) == (full, False, True)
        rewrite(db)
        assert space_of(db) == Space(path.stat().st_size, 0, is_incremental=True)
        assert path.stat().st_size < full / 3
        make_job(db, 2)  # still of use


def test_outputs_that_are_pruned_while_they_are_read_end_in_an_error(db: Database) -> None:
    job_id = make_job(db, 50)
    finish(db, job_id, now=100.0)
    rows = stream_outputs(db, job_id, page_rows=10)
    next(rows)
    prune(db, before=200.0)
    with pytest.raises(JobNotFound):
        list(rows)
