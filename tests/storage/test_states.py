"""The table of transitions, and that the verbs obey it."""

import pytest

from storage.claims import claim, expire, give_back
from storage.database import Database
from storage.errors import InvalidTransition
from storage.jobs import cancel_job, fail_job, get_job, retry_job
from storage.results import record
from storage.states import JOB_STEPS, REQUEST_STEPS, JobState, RequestState, jobs_before, requests_before
from tests.storage.factories import make_job, make_worker, result_of

J, R = JobState, RequestState


def test_every_state_has_its_row() -> None:
    assert set(JOB_STEPS) == set(JobState)
    assert set(REQUEST_STEPS) == set(RequestState)


@pytest.mark.parametrize(
    ("state", "before"),
    [
        (J.QUEUED, {J.DONE, J.FAILED, J.CANCELLED}),
        (J.RUNNING, {J.QUEUED}),
        (J.DONE, {J.RUNNING}),
        (J.FAILED, {J.QUEUED, J.RUNNING}),
        (J.CANCELLED, {J.QUEUED, J.RUNNING}),
    ],
)
def test_before_a_job_state(state: JobState, before: set[JobState]) -> None:
    assert set(jobs_before(state)) == before


@pytest.mark.parametrize(
    ("state", "before"),
    [
        (R.PENDING, {R.CLAIMED, R.FAILED, R.CANCELLED}),
        (R.CLAIMED, {R.PENDING}),
        (R.DONE, {R.CLAIMED}),
        (R.FAILED, {R.CLAIMED}),
        (R.CANCELLED, {R.PENDING, R.CLAIMED}),
    ],
)
def test_before_a_request_state(state: RequestState, before: set[RequestState]) -> None:
    assert set(requests_before(state)) == before


def job_in(db: Database, state: JobState) -> int:
    """A job of three requests in this state; a done one has a failed request."""
    job_id = make_job(db)
    if state is J.CANCELLED:
        cancel_job(db, job_id, now=2.0)
    if state is J.FAILED:
        fail_job(db, job_id, "no such model", now=2.0)
    if state in (J.RUNNING, J.DONE):
        worker = make_worker(db)
        claimed = claim(db, worker, job_id, 3 if state is J.DONE else 1, now=2.0)
        if state is J.DONE:
            record(db, worker, [result_of(c, error=("e", "m") if c.index else None) for c in claimed], None, now=3.0)
    assert get_job(db, job_id).state is state
    return job_id


@pytest.mark.parametrize("state", list(JobState))
def test_cancel_obeys_the_table(db: Database, state: JobState) -> None:
    job_id = job_in(db, state)
    if J.CANCELLED in JOB_STEPS[state]:
        assert cancel_job(db, job_id, now=9.0).state is J.CANCELLED
    else:
        with pytest.raises(InvalidTransition, match=f"Job {job_id} is already {state}"):
            cancel_job(db, job_id, now=9.0)
        assert get_job(db, job_id).state is state


@pytest.mark.parametrize("state", list(JobState))
def test_fail_obeys_the_table(db: Database, state: JobState) -> None:
    failed = fail_job(db, job_in(db, state), "cannot load the model", now=9.0)
    allowed = J.FAILED in JOB_STEPS[state]
    assert (failed.state is J.FAILED and failed.finished_at == 9.0) == allowed or state is J.FAILED
    assert (failed.message == "cannot load the model") == allowed


@pytest.mark.parametrize("state", [J.DONE, J.FAILED, J.CANCELLED])
def test_retry_obeys_the_table(db: Database, state: JobState) -> None:
    assert J.QUEUED in JOB_STEPS[state]
    job = retry_job(db, job_in(db, state), now=9.0)
    assert (job.state, job.finished_at, job.message, job.num_failed) == (J.QUEUED, None, None, 0)


@pytest.mark.parametrize("state", list(JobState))
def test_claim_obeys_the_table(db: Database, state: JobState) -> None:
    job_id = job_in(db, state)
    claimed = claim(db, make_worker(db), job_id, 10, now=9.0)
    assert bool(claimed) == (state in (J.QUEUED, J.RUNNING))
    assert get_job(db, job_id).state is (J.RUNNING if claimed else state)


def test_giving_back_and_expiring_leave_a_running_job_running(db: Database) -> None:
    job_id = job_in(db, J.RUNNING)
    worker = make_worker(db, lease_s=1.0)
    assert len(claim(db, worker, job_id, 1, now=1.0)) == 1
    assert give_back(db, worker, now=1.0) == 1
    assert len(claim(db, worker, job_id, 1, now=1.0)) == 1
    assert expire(db, now=5.0) == 1
    assert get_job(db, job_id).state is J.RUNNING
