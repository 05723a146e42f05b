"""Results are recorded once, with their passes, and stream out without holding anybody up."""

import dataclasses
from pathlib import Path

import pytest

from storage.claims import claim
from storage.database import Database
from storage.errors import DatabaseLocked
from storage.jobs import JobState, get_job
from storage.results import PassTotals, RequestResult, list_passes, record, stream_outputs
from storage.schema import passes
from tests.storage.factories import make_job, make_worker, pass_totals, result_of


def test_the_pass_row_and_its_dataclass_agree() -> None:
    assert ["id", "worker_id", *PassTotals.__dataclass_fields__] == [column.name for column in passes.columns]


def test_results_counters_and_passes_are_one_commit(db: Database) -> None:
    job_id, worker = make_job(db), make_worker(db)
    claimed = claim(db, worker, job_id, 3, now=2.0)
    results = [result_of(claimed[0]), result_of(claimed[1], error=("too_long", "9 tokens of 8"))]
    assert record(db, worker, results, pass_totals(job_id), now=3.0) == 2
    job = get_job(db, job_id)
    assert (job.state, job.num_done, job.num_failed, job.num_left) == (JobState.RUNNING, 1, 1, 1)
    assert (job.prompt_tokens, job.generated_tokens) == (10, 2)
    ok, error = stream_outputs(db, job_id)
    assert (ok.index, ok.row_id, ok.status, ok.output) == (0, "row-0", "ok", {"text": "out", "finish_reason": "stop"})
    assert (ok.error_code, ok.error_message, ok.prompt_tokens, ok.completion_tokens) == (None, None, 5, 2)
    assert (error.status, error.output, error.error_code, error.finished_at) == ("error", None, "too_long", 3.0)
    (row,) = list_passes(db)
    assert (row.worker_id, row.totals) == (worker, pass_totals(job_id))


def test_an_error_may_quote_what_no_database_stores(db: Database) -> None:
    job_id, worker = make_job(db, 1), make_worker(db)
    (claimed,) = claim(db, worker, job_id, 1, now=2.0)
    record(db, worker, [result_of(claimed, error=("bad_text", "row says \ud800\x00é"))], None, now=3.0)
    assert [o.error_message for o in stream_outputs(db, job_id)] == ["row says \\ud800\\x00é"]


def test_the_last_result_finishes_the_job(db: Database) -> None:
    job_id, worker = make_job(db, 2), make_worker(db)
    one, two = claim(db, worker, job_id, 2, now=2.0)
    record(db, worker, [result_of(one)], None, now=3.0)
    assert get_job(db, job_id).finished_at is None
    record(db, worker, [result_of(two)], None, now=4.0)
    job = get_job(db, job_id)
    assert (job.state, job.finished_at, job.num_left) == (JobState.DONE, 4.0, 0)


def test_recording_twice_changes_nothing(db: Database) -> None:
    job_id, worker = make_job(db, 2), make_worker(db)
    results = [result_of(c) for c in claim(db, worker, job_id, 2, now=2.0)]
    assert record(db, worker, [results[0], results[0]], None, now=3.0) == 1
    assert record(db, worker, results, None, now=4.0) == 1
    assert record(db, worker, results, None, now=5.0) == 0
    assert (get_job(db, job_id).num_done, get_job(db, job_id).finished_at) == (2, 4.0)


def test_results_of_others_and_of_other_attempts_are_discarded(db: Database) -> None:
    job_id, one, two = make_job(db, 2), make_worker(db), make_worker(db)
    (mine,) = claim(db, one, job_id, 1, now=2.0)
    wrong = [
        RequestResult(job_id, 0, mine.attempt + 1, {}, None, 1, 1),
        RequestResult(job_id, 1, 0, {}, None, 1, 1),  # nobody claimed it
        RequestResult(99, 0, 1, {}, None, 1, 1),
    ]
    assert record(db, one, wrong, None, now=3.0) == 0
    assert record(db, two, [result_of(mine)], None, now=3.0) == 0
    assert record(db, one, [result_of(mine)], None, now=3.0) == 1


def test_results_of_several_jobs_go_together(db: Database) -> None:
    first, second, worker = make_job(db, 1), make_job(db, 2), make_worker(db)
    claimed = claim(db, worker, second, 1, now=2.0) + claim(db, worker, first, 1, now=2.0)
    assert record(db, worker, [result_of(c) for c in claimed], pass_totals(first, second), now=3.0) == 2
    assert (get_job(db, first).state, get_job(db, second).state) == (JobState.DONE, JobState.RUNNING)


def test_thousands_of_results_in_one_commit(db: Database) -> None:
    job_id, worker = make_job(db, 3000), make_worker(db)
    claimed = claim(db, worker, job_id, 3000, now=2.0)
    assert record(db, worker, [result_of(c) for c in claimed], None, now=3.0) == 3000
    assert get_job(db, job_id).state is JobState.DONE


def test_passes_without_results_are_recorded(db: Database) -> None:
    worker = make_worker(db)
    record(db, worker, [], pass_totals(1), now=1.0)
    record(db, worker, [], dataclasses.replace(pass_totals(1, 2), seconds=9.0), now=2.0)
    assert [p.totals.seconds for p in list_passes(db)] == [0.5, 9.0]
    assert [p.id for p in list_passes(db, job_id=2)] == [2]
    assert [p.id for p in list_passes(db, after_id=1)] == [2]
    assert [p.id for p in list_passes(db, limit=1)] == [1]


@pytest.mark.parametrize("page_rows", [1, 2, 3, 5, 1000])
def test_pages_join_without_seam(db: Database, page_rows: int) -> None:
    job_id, worker = make_job(db, 6, errors=(2, 5)), make_worker(db)
    claimed = claim(db, worker, job_id, 4, now=2.0)
    record(db, worker, [result_of(c) for c in claimed], None, now=3.0)
    assert [o.index for o in stream_outputs(db, job_id, page_rows=page_rows)] == [0, 1, 2, 3, 4, 5]
    assert [o.index for o in stream_outputs(db, job_id, errors_only=True, page_rows=page_rows)] == [2, 5]


def test_a_slow_reader_does_not_block_a_commit(db: Database, path: Path) -> None:
    job_id, worker = make_job(db, 50), make_worker(db)
    claimed = claim(db, worker, job_id, 50, now=2.0)
    record(db, worker, [result_of(c) for c in claimed[:40]], None, now=3.0)
    reader = stream_outputs(db, job_id, page_rows=10)
    seen = [next(reader).index for _ in range(5)]  # `fetch | less`, left open in the middle of a page
    with Database.open(str(path), busy_timeout_s=0.0) as other:
        assert record(other, worker, [result_of(c) for c in claimed[40:]], None, now=4.0) == 10
    assert seen + [row.index for row in reader] == list(range(50))


def test_an_open_read_transaction_would_block_it(db: Database, path: Path) -> None:
    """The reason for the pages; with write-ahead logging readers block nobody."""
    if db.journal_mode == "wal":
        pytest.skip("this SQLite is new enough for write-ahead logging")
    make_job(db)
    with Database.open(str(path), busy_timeout_s=0.05) as other:
        with db.read() as connection:
            connection.exec_driver_sql("SELECT count(*) FROM jobs").all()
            with pytest.raises(DatabaseLocked):
                make_worker(other)
        make_worker(other)
