"""Whether a job began with nothing but errors of one kind."""

from collections.abc import Sequence

import pytest

from storage.beginning import begins_with_errors
from storage.claims import claim, claim_suspects, expire
from storage.crashes import count_crash
from storage.database import Database
from storage.jobs import cancel_job, retry_job
from storage.results import record
from tests.storage.factories import make_job, make_worker, result_of

CODE = "not_finite"
BAD = (CODE, "no numbers")
OTHER = ("too_long", "200 tokens, 128 fit")
GOOD = None


def record_first(db: Database, job_id: int, errors: Sequence[tuple[str, str] | None], *, skip: int = 0) -> int:
    """The worker that claims as many rows and ``skip`` before them, and records these errors (none: a result)."""
    worker = make_worker(db)
    claimed = claim(db, worker, job_id, skip + len(errors), now=2.0)[skip:]
    results = [result_of(each, error=error) for each, error in zip(claimed, errors, strict=True)]
    record(db, worker, results, None, now=3.0)
    return worker


@pytest.mark.parametrize(
    ("errors", "skip", "answer"),
    [
        ([BAD] * 4, 0, True),
        ([BAD] * 5, 0, True),
        ([BAD] * 3, 0, False),
        ([BAD, BAD, GOOD, BAD, BAD], 0, False),
        ([BAD, BAD, BAD, BAD, GOOD], 0, False),
        ([BAD, OTHER, BAD, BAD, BAD], 0, True),
        ([BAD, OTHER, BAD, BAD], 0, False),
        ([OTHER] * 5, 0, False),
        ([BAD] * 5, 1, False),
    ],
)
def test_the_first_rows_decide(db: Database, errors: Sequence[tuple[str, str] | None], skip: int, answer: bool) -> None:
    """``skip``: a row before them is still at work."""
    job_id = make_job(db, 20)
    others = make_job(db, 20)
    record_first(db, others, [BAD] * 3)
    record_first(db, job_id, errors, skip=skip)
    assert begins_with_errors(db, job_id, CODE, 4) is answer


def test_rows_that_were_refused_at_once_do_not_count(db: Database) -> None:
    job_id = make_job(db, 20, errors=(0, 2, 3))
    record_first(db, job_id, [BAD] * 3)
    assert not begins_with_errors(db, job_id, CODE, 4)
    record_first(db, job_id, [BAD])
    assert begins_with_errors(db, job_id, CODE, 4)


def test_a_row_that_runs_last_after_a_crash_is_not_waited_for_until_it_runs(db: Database) -> None:
    job_id = make_job(db, 20)
    dying = make_worker(db)
    (suspect,) = claim(db, dying, job_id, 1, now=2.0)
    record_first(db, job_id, [BAD] * 4)
    assert not begins_with_errors(db, job_id, CODE, 4)
    count_crash(db, dying, [(job_id, suspect.index, suspect.attempt)])
    expire(db, now=2.0, is_dead=lambda worker: worker.id == dying)
    assert begins_with_errors(db, job_id, CODE, 4)
    assert claim_suspects(db, make_worker(db), [job_id], now=4.0)
    assert not begins_with_errors(db, job_id, CODE, 4)


@pytest.mark.parametrize("end", ["done", "cancelled"])
def test_a_job_that_has_ended_is_left_as_it_is(db: Database, end: str) -> None:
    job_id = make_job(db, 4 if end == "done" else 5)
    record_first(db, job_id, [BAD] * 4)
    if end == "cancelled":
        cancel_job(db, job_id, now=4.0)
    assert not begins_with_errors(db, job_id, CODE, 4)


def test_a_retry_begins_anew(db: Database) -> None:
    job_id = make_job(db, 20)
    record_first(db, job_id, [BAD] * 4)
    retry_job(db, job_id, now=4.0)
    assert not begins_with_errors(db, job_id, CODE, 4)
