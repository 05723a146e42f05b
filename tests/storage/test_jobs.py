"""Listing, choosing, cancelling, retrying and failing jobs."""

import pytest

from storage.claims import claim
from storage.database import Database
from storage.errors import JobNotFound, NothingToRetry
from storage.jobs import (
    JobState,
    cancel_job,
    cancelled_among,
    fail_job,
    get_job,
    list_jobs,
    retry_job,
    runnable_jobs,
)
from storage.prune import prune
from storage.results import record, stream_outputs
from tests.storage.factories import make_job, make_worker, result_of


@pytest.mark.parametrize("verb", ["get", "cancel", "retry", "fail", "stream"])
def test_an_unknown_job_is_named(db: Database, verb: str) -> None:
    verbs = {
        "get": lambda: get_job(db, 77),
        "cancel": lambda: cancel_job(db, 77, now=1.0),
        "retry": lambda: retry_job(db, 77, now=1.0),
        "fail": lambda: fail_job(db, 77, "x", now=1.0),
        "stream": lambda: stream_outputs(db, 77),  # at once, not at the first row
    }
    with pytest.raises(JobNotFound, match="no job 77"):
        verbs[verb]()


def test_the_newest_job_is_listed_first(db: Database) -> None:
    ids = [make_job(db, 1) for _ in range(3)]
    assert [job.id for job in list_jobs(db)] == ids[::-1]
    assert [job.id for job in list_jobs(db, limit=2)] == [ids[2], ids[1]]


def test_runnable_is_by_priority_then_age(db: Database) -> None:
    young = make_job(db, now=9.0)
    old = make_job(db, now=1.0)
    urgent = make_job(db, now=20.0, priority=5)
    make_job(db, queue="other")
    make_job(db, 1, errors=(0,))
    make_job_taken = make_job(db, 1)
    claim(db, make_worker(db), make_job_taken, 1, now=1.0)
    cancel_job(db, make_job(db), now=2.0)
    assert [job.id for job in runnable_jobs(db, "default")] == [urgent, old, young]


def test_cancel_keeps_outputs_and_stops_the_rest(db: Database) -> None:
    job_id, worker = make_job(db, 5), make_worker(db)
    first, second = claim(db, worker, job_id, 2, now=2.0)
    record(db, worker, [result_of(first)], None, now=3.0)
    job = cancel_job(db, job_id, now=4.0)
    assert (job.state, job.finished_at, job.num_done) == (JobState.CANCELLED, 4.0, 1)
    assert record(db, worker, [result_of(second)], None, now=5.0) == 0  # too late, discarded quietly
    assert [o.index for o in stream_outputs(db, job_id)] == [0]
    assert claim(db, worker, job_id, 5, now=5.0) == []


def test_cancelled_among_names_what_is_not_wanted(db: Database) -> None:
    running, cancelled, failed, pruned = (make_job(db) for _ in range(4))
    cancel_job(db, pruned, now=2.0)
    prune(db, before=3.0)
    cancel_job(db, cancelled, now=3.0)
    fail_job(db, failed, "no model", now=3.0)
    assert cancelled_among(db, [running, cancelled, failed, pruned]) == {cancelled, failed, pruned}
    assert cancelled_among(db, []) == set()


def test_retry_runs_failed_rows_again_and_only_those(db: Database) -> None:
    job_id, worker = make_job(db, 4, errors=(3,)), make_worker(db)
    claimed = claim(db, worker, job_id, 4, now=2.0)
    record(
        db, worker, [result_of(c, error=("oom", "too long") if c.index == 1 else None) for c in claimed], None, now=3.0
    )
    done = get_job(db, job_id)
    assert (done.state, done.num_done, done.num_failed) == (JobState.DONE, 2, 2)

    job = retry_job(db, job_id, now=4.0)
    assert (job.state, job.num_done, job.num_failed, job.finished_at) == (JobState.QUEUED, 2, 1, None)
    assert (job.prompt_tokens, job.generated_tokens) == (10, 4)  # the error's tokens went with it
    (again,) = claim(db, worker, job_id, 4, now=5.0)
    assert (again.index, again.attempt) == (1, 2)
    assert record(db, worker, [result_of(claimed[1])], None, now=6.0) == 0  # the first attempt's, late
    assert record(db, worker, [result_of(again)], None, now=6.0) == 1
    finished = get_job(db, job_id)
    assert (finished.state, finished.num_done, finished.num_failed) == (JobState.DONE, 3, 1)
    assert [o.status for o in stream_outputs(db, job_id)] == ["ok", "ok", "ok", "error"]


def test_retry_of_a_cancelled_job_goes_on_where_it_stopped(db: Database) -> None:
    job_id, worker = make_job(db, 3), make_worker(db)
    first, stale = claim(db, worker, job_id, 2, now=2.0)
    record(db, worker, [result_of(first)], None, now=3.0)
    cancel_job(db, job_id, now=4.0)
    assert retry_job(db, job_id, now=5.0).state is JobState.QUEUED
    again = claim(db, worker, job_id, 9, now=6.0)
    assert [(c.index, c.attempt) for c in again] == [(1, 2), (2, 1)]
    assert record(db, worker, [result_of(stale, text="stale")], None, now=7.0) == 0
    assert record(db, worker, [result_of(c, text="fresh") for c in again], None, now=7.0) == 2
    assert [o.output["text"] for o in stream_outputs(db, job_id) if o.output] == ["out", "fresh", "fresh"]


def test_retry_of_a_running_job_queues_its_failed_rows(db: Database) -> None:
    job_id, worker = make_job(db, 3), make_worker(db)
    bad, _ = claim(db, worker, job_id, 2, now=2.0)
    record(db, worker, [result_of(bad, error=("e", "m"))], None, now=3.0)
    job = retry_job(db, job_id, now=4.0)
    assert (job.state, job.num_failed) == (JobState.RUNNING, 0)
    assert [c.index for c in claim(db, worker, job_id, 9, now=5.0)] == [0, 2]


def test_nothing_to_retry_says_why(db: Database) -> None:
    untouched = make_job(db)
    with pytest.raises(NothingToRetry, match="no request of it failed or was cancelled"):
        retry_job(db, untouched, now=2.0)
    refused = make_job(db, 2, errors=(0, 1))
    with pytest.raises(NothingToRetry, match="2 failed rows were refused when it was enqueued"):
        retry_job(db, refused, now=2.0)
    assert get_job(db, refused).num_failed == 2
    assert len(list(stream_outputs(db, refused))) == 2
