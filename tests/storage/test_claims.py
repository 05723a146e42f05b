"""Claims under a lease: who may write what, and when it is taken away."""

from pathlib import Path

import pytest
from sqlalchemy import Text, type_coerce, update

from storage.claims import (
    Doing,
    Worker,
    claim,
    expire,
    give_back,
    give_back_requests,
    heartbeat,
    held_claims,
    list_workers,
    stop_worker,
)
from storage.database import Database
from storage.errors import ClaimLost
from storage.jobs import JobState, get_job
from storage.results import record, stream_outputs
from storage.schema import requests, workers
from tests.storage.factories import make_job, make_worker, pass_totals, result_of


def test_the_worker_row_and_its_dataclass_agree() -> None:
    assert list(Worker.__dataclass_fields__) == [column.name for column in workers.columns]


def test_claims_are_in_order_disjoint_and_counted(db: Database) -> None:
    job_id, one, two = make_job(db, 5), make_worker(db), make_worker(db)
    assert [c.index for c in claim(db, one, job_id, 2, now=2.0)] == [0, 1]
    assert [c.index for c in claim(db, two, job_id, 9, now=3.0)] == [2, 3, 4]
    assert claim(db, one, job_id, 9, now=4.0) == []
    job = get_job(db, job_id)
    assert (job.state, job.started_at) == (JobState.RUNNING, 2.0)


def test_given_back_requests_are_claimed_again_with_a_higher_attempt(db: Database) -> None:
    job_id, one, two = make_job(db, 3), make_worker(db), make_worker(db)
    claim(db, one, job_id, 2, now=2.0)
    assert give_back(db, one, now=3.0) == 2
    assert give_back(db, one, now=3.0) == 0
    assert [(c.index, c.attempt) for c in claim(db, two, job_id, 9, now=4.0)] == [(0, 2), (1, 2), (2, 1)]


def test_only_what_the_worker_holds_is_given_back(db: Database) -> None:
    job_id, one, two = make_job(db, 4), make_worker(db), make_worker(db)
    mine, others = claim(db, one, job_id, 2, now=2.0), claim(db, two, job_id, 1, now=2.0)
    stale = (job_id, mine[0].index, mine[0].attempt - 1)
    claims = [(c.job_id, c.index, c.attempt) for c in (mine[1], others[0])] + [stale, (job_id, 3, 1), (99, 0, 1)]
    assert held_claims(db, one) == {(c.job_id, c.index, c.attempt) for c in mine}
    assert give_back_requests(db, one, claims) == 1
    assert held_claims(db, one) == {(mine[0].job_id, mine[0].index, mine[0].attempt)}
    assert [c.index for c in claim(db, one, job_id, 9, now=3.0)] == [1, 3]


def test_a_heartbeat_keeps_the_lease(db: Database) -> None:
    job_id, worker = make_job(db), make_worker(db, now=0.0, lease_s=10.0)
    claim(db, worker, job_id, 3, now=1.0)
    heartbeat(db, worker, now=9.0, lease_s=10.0, doing=Doing("draining", "/models/opt", "waits", 99.0))
    assert expire(db, now=15.0) == 0
    (row,) = list_workers(db)
    assert (row.heartbeat_at, row.lease_until, row.model, row.state) == (9.0, 19.0, "/models/opt", "draining")
    assert (row.message, row.retry_at) == ("waits", 99.0)
    heartbeat(db, worker, now=16.0, lease_s=10.0)
    (row,) = list_workers(db)
    assert (row.model, row.state, row.message) == ("/models/opt", "draining", "waits")
    assert expire(db, now=26.0) == 0  # the lease holds up to and at its end
    assert expire(db, now=26.1) == 3


def test_a_model_that_was_unloaded_is_not_shown(db: Database) -> None:
    worker = make_worker(db)
    heartbeat(db, worker, now=2.0, lease_s=10.0, doing=Doing("draining", "/models/opt"))
    heartbeat(db, worker, now=3.0, lease_s=10.0, doing=Doing("idle"))
    (row,) = list_workers(db)
    assert (row.model, row.state, row.message, row.retry_at) == (None, "idle", None, None)


def test_a_payload_that_cannot_be_read_costs_only_its_own_row(db: Database) -> None:
    job_id, worker = make_job(db, 3), make_worker(db)
    deep = "[" * 5000 + "]" * 5000
    with db.write() as connection:
        for index, text in ((0, deep), (1, "{")):
            connection.execute(
                update(requests)
                .where(requests.c.job_id == job_id, requests.c.index == index)
                .values(payload=type_coerce(text, Text), row_id=type_coerce(deep, Text))
            )
    claimed = claim(db, worker, job_id, 9, now=2.0)
    assert [c.payload for c in claimed] == [None, None, {"prompt": "prompt 2"}]


def test_a_lease_that_nobody_took_is_taken_up_again(db: Database) -> None:
    worker = make_worker(db, now=0.0, lease_s=10.0)
    heartbeat(db, worker, now=100.0, lease_s=10.0)
    assert expire(db, now=105.0) == 0


def test_an_expired_worker_is_fenced_off(db: Database) -> None:
    job_id, stale = make_job(db), make_worker(db, now=0.0, lease_s=10.0)
    held = claim(db, stale, job_id, 2, now=1.0)
    assert expire(db, now=11.0) == 2
    late = [result_of(c, text="stale") for c in held]
    for verb in (
        lambda: record(db, stale, late, pass_totals(job_id), now=12.0),
        lambda: claim(db, stale, job_id, 1, now=12.0),
        lambda: heartbeat(db, stale, now=12.0, lease_s=10.0),
    ):
        with pytest.raises(ClaimLost, match=f"Worker {stale} lost its lease"):
            verb()
    assert get_job(db, job_id).num_done == 0
    assert list(stream_outputs(db, job_id)) == []
    assert give_back(db, stale, now=12.0) == 0
    fresh = make_worker(db, now=12.0)
    again = claim(db, fresh, job_id, 9, now=13.0)
    assert record(db, fresh, [result_of(c, text="fresh") for c in again], None, now=14.0) == 3
    assert {o.output["text"] for o in stream_outputs(db, job_id) if o.output} == {"fresh"}


def test_a_proven_death_does_not_wait_for_the_lease(db: Database) -> None:
    job_id = make_job(db, 4)
    dead, alive = make_worker(db, pid=10, lease_s=999.0), make_worker(db, pid=11, lease_s=999.0)
    claim(db, dead, job_id, 2, now=1.0)
    claim(db, alive, job_id, 1, now=1.0)
    assert expire(db, now=2.0, is_dead=lambda worker: (worker.hostname, worker.pid) == ("box", 10)) == 2
    assert [worker.id for worker in list_workers(db)] == [alive]
    with pytest.raises(ClaimLost):
        heartbeat(db, dead, now=3.0, lease_s=9.0)


def test_expire_needs_no_write_lock_when_nobody_is_dead(db: Database, path: Path) -> None:
    make_worker(db)
    with Database.open(str(path), busy_timeout_s=0.0) as other, other.write():
        assert expire(db, now=2.0) == 0


def test_a_stopped_worker_holds_nothing_and_is_not_listed(db: Database) -> None:
    job_id, worker = make_job(db), make_worker(db)
    claim(db, worker, job_id, 2, now=2.0)
    for now in (3.0, 4.0):
        stop_worker(db, worker, now=now)
    assert list_workers(db) == []
    assert len(claim(db, make_worker(db), job_id, 9, now=4.0)) == 3
    with pytest.raises(ClaimLost):
        claim(db, worker, job_id, 1, now=5.0)


def test_only_workers_whose_lease_holds_are_alive(db: Database) -> None:
    short, long = make_worker(db, now=0.0, lease_s=5.0), make_worker(db, now=0.0, lease_s=50.0)
    assert [w.id for w in list_workers(db, 10.0)] == [long]
    assert [(w.id, w.is_alive(10.0)) for w in list_workers(db)] == [(short, False), (long, True)]
