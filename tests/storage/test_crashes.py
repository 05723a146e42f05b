"""Rows that were in a crash run apart, in ever smaller groups, until one stands alone."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.claims import ClaimedRequest, claim, claim_suspects, give_back
from storage.crashes import FOUND_GUILTY, LEAST_CRASHES, count_crash, only_suspects
from storage.database import Database
from storage.jobs import get_job, retry_job
from storage.results import record
from tests.storage.factories import make_job, make_worker, result_of


def running(claimed: list[ClaimedRequest]) -> list[tuple[int, int, int]]:
    return [(one.job_id, one.index, one.attempt) for one in claimed]


def die(db: Database, worker: int, claimed: list[ClaimedRequest]) -> int:
    """As a worker does that is killed: its claims come back, and who finds that out counts the crash."""
    give_back(db, worker, now=2.0)
    return count_crash(db, worker, running(claimed))


def work_until_done(db: Database, job_id: int, culprits: set[int]) -> int:
    """Workers that die of certain rows, one after another; returns how many died."""
    deaths = 0
    while not get_job(db, job_id).is_finished:
        worker = make_worker(db)
        apart = bool(only_suspects(db, [job_id]))
        claimed = claim_suspects(db, worker, [job_id], now=1.0) if apart else claim(db, worker, job_id, 999, now=1.0)
        assert claimed, "nothing can be claimed, and the job is not done"
        guilty = [one for one in claimed if one.crash_group == FOUND_GUILTY]
        if not guilty and culprits & {one.index for one in claimed}:
            die(db, worker, claimed)
            deaths += 1
            continue
        results = [result_of(one, error=("crashed", "x") if one in guilty else None) for one in claimed]
        record(db, worker, results, None, now=3.0)
    return deaths


@pytest.mark.parametrize("number", [1, 2, 3, 8, 100])
def test_one_culprit_among_many_is_found_in_about_log2_crashes(db: Database, number: int) -> None:
    job_id = make_job(db, number)
    deaths = work_until_done(db, job_id, {number // 3})
    assert get_job(db, job_id).num_failed == 1
    assert deaths <= max(LEAST_CRASHES, math.ceil(math.log2(number)) + 1)


@settings(max_examples=10)
@given(number=st.integers(1, 40), culprits=st.sets(st.integers(0, 39), max_size=4))
def test_every_culprit_is_set_aside_and_nobody_else(
    number: int, culprits: set[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    with Database.open(str(tmp_path_factory.mktemp("db") / "overnight.db")) as db:
        job_id = make_job(db, number)
        work_until_done(db, job_id, culprits)
        job = get_job(db, job_id)
        assert job.num_failed == len({each for each in culprits if each < number})
        assert job.num_done == number - job.num_failed


def test_kills_by_somebody_else_blame_nobody(db: Database) -> None:
    job_id = make_job(db, 1)
    for _ in range(LEAST_CRASHES - 1):
        worker = make_worker(db)
        claimed = claim(db, worker, job_id, 9, now=1.0) or claim_suspects(db, worker, [job_id], now=1.0)
        assert die(db, worker, claimed) == 0
    worker = make_worker(db)
    (again,) = claim_suspects(db, worker, [job_id], now=1.0)
    assert (again.crashes, again.crash_group != FOUND_GUILTY) == (LEAST_CRASHES - 1, True)
    assert record(db, worker, [result_of(again)], None, now=2.0) == 1


def test_suspects_are_left_out_of_other_claims_and_run_by_group(db: Database) -> None:
    job_id, other = make_job(db, 4), make_job(db, 3)
    worker = make_worker(db)
    claimed = claim(db, worker, job_id, 2, now=1.0) + claim(db, worker, other, 2, now=1.0)
    die(db, worker, claimed)
    successor = make_worker(db)
    assert [one.index for one in claim(db, successor, job_id, 9, now=2.0)] == [2, 3]
    assert [one.index for one in claim(db, successor, other, 9, now=2.0)] == [2]
    assert only_suspects(db, [job_id, other]) == {job_id, other}
    first = claim_suspects(db, successor, [job_id, other], now=2.0)
    second = claim_suspects(db, successor, [job_id, other], now=2.0)
    assert [(one.job_id, one.index) for one in first] == [(job_id, 0), (job_id, 1)]
    assert [(one.job_id, one.index) for one in second] == [(other, 0), (other, 1)]
    assert claim_suspects(db, successor, [job_id, other], now=2.0) == []


def test_rows_that_others_have_by_now_are_not_blamed(db: Database) -> None:
    job_id = make_job(db, 3)
    dead, alive = make_worker(db), make_worker(db)
    claimed = claim(db, dead, job_id, 3, now=1.0)
    give_back(db, dead, now=1.0)
    taken = claim(db, alive, job_id, 2, now=1.0)
    record(db, alive, [result_of(taken[0])], None, now=2.0)
    count_crash(db, dead, running(claimed))
    assert [(one.index, one.crashes) for one in claim_suspects(db, alive, [job_id], now=3.0)] == [(2, 1)]


def test_a_guilty_row_that_is_retried_runs_alone_and_is_found_again(db: Database) -> None:
    job_id = make_job(db, 4)
    work_until_done(db, job_id, {1, 2})
    assert get_job(db, job_id).num_failed == 2
    retry_job(db, job_id, now=5.0)
    worker = make_worker(db)
    assert claim(db, worker, job_id, 9, now=6.0) == []
    (one,) = claim_suspects(db, worker, [job_id], now=6.0)
    (two,) = claim_suspects(db, worker, [job_id], now=6.0)
    assert {one.index, two.index} == {1, 2}
    give_back(db, worker, now=6.0)
    assert work_until_done(db, job_id, {1}) == 1
    assert get_job(db, job_id).num_failed == 1
