"""A job appears whole or not at all."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import func, select

from storage import loading
from storage.claims import claim
from storage.database import Database
from storage.errors import EmptyJob, JobNotFound, LoadLost
from storage.jobs import JobState, NewRequest, create_job, get_job, list_jobs, runnable_jobs, sweep_invisible
from storage.results import record, stream_outputs
from storage.schema import jobs, outputs, requests
from tests.storage.factories import make_job, make_worker, new_job, result_of, rows

MANY = loading.CHUNK_ROWS * 2 + 5


def count(db: Database) -> tuple[int, int, int]:
    with db.read() as connection:
        tables = (jobs, requests, outputs)
        return tuple(connection.execute(select(func.count()).select_from(t)).scalar_one() for t in tables)  # type: ignore[return-value]


@pytest.mark.parametrize("number", [1, loading.CHUNK_ROWS, loading.CHUNK_ROWS + 1, MANY])
def test_every_row_arrives_as_it_was(db: Database, number: int) -> None:
    job = get_job(db, make_job(db, number, now=5.0))
    assert (job.num_requests, job.num_done, job.num_failed, job.state) == (number, 0, 0, JobState.QUEUED)
    assert (job.created_at, job.started_at, job.finished_at) == (5.0, None, None)
    claimed = claim(db, make_worker(db), job.id, number, now=6.0)
    assert [(c.index, c.payload) for c in claimed] == [(r.index, r.payload) for r in rows(number)]


@pytest.mark.parametrize("row_id", [None, 0, 12345678901234567890123, 1.5, "007", "\ud800 \x00 é", ["a", {"b": None}]])
def test_row_ids_come_back_exactly(db: Database, row_id: object) -> None:
    job_id = create_job(db, new_job(), [NewRequest(0, row_id, {"prompt": "\ud800\x00"})], now=1.0)
    worker = make_worker(db)
    (claimed,) = claim(db, worker, job_id, 1, now=1.0)
    assert claimed.payload == {"prompt": "\ud800\x00"}
    record(db, worker, [result_of(claimed)], None, now=1.0)
    assert [o.row_id for o in stream_outputs(db, job_id)] == [row_id]


def test_refused_rows_are_outputs_at_once(db: Database) -> None:
    job_id = make_job(db, MANY, errors=(0, 4, MANY - 1))
    assert get_job(db, job_id).num_failed == 3
    made = list(stream_outputs(db, job_id))
    assert [(o.index, o.row_id, o.status, o.error_code) for o in made] == [
        (i, f"row-{i}", "error", "missing_field") for i in (0, 4, MANY - 1)
    ]
    assert not {0, 4} & {c.index for c in claim(db, make_worker(db), job_id, 10, now=1.0)}


@pytest.mark.parametrize("number", [2, MANY])
def test_a_job_of_refused_rows_only_is_done(db: Database, number: int) -> None:
    job = get_job(db, make_job(db, number, now=4.0, errors=tuple(range(number))))
    assert (job.state, job.finished_at, job.num_failed) == (JobState.DONE, 4.0, number)
    assert runnable_jobs(db, "default") == []


def test_no_rows_no_job(db: Database) -> None:
    with pytest.raises(EmptyJob):
        create_job(db, new_job(), [], now=1.0)
    assert count(db) == (0, 0, 0)


@pytest.mark.parametrize("after", [0, 10, loading.CHUNK_ROWS, MANY])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_source_leaves_nothing(db: Database, after: int, error: type[BaseException]) -> None:
    def failing() -> Iterator[NewRequest]:
        yield from rows(after, errors=(1,))
        raise error

    with pytest.raises(error):
        create_job(db, new_job(), failing(), now=1.0)
    assert count(db) == (0, 0, 0)


@pytest.mark.parametrize("indexes", [(0, 0), (1, 0), (-1,)])
def test_indexes_must_grow(db: Database, indexes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must grow"):
        create_job(db, new_job(), [NewRequest(i, None, {}) for i in indexes], now=1.0)
    assert count(db) == (0, 0, 0)


def test_a_row_needs_work_or_an_error(db: Database) -> None:
    with pytest.raises(ValueError, match="Request 0 has neither"):
        create_job(db, new_job(), [NewRequest(0, None, None)], now=1.0)


def test_a_job_being_loaded_is_invisible_and_workers_commit_meanwhile(db: Database, path: Path) -> None:
    running = make_job(db, 4)
    worker = make_worker(db)
    seen: list[int] = []

    def watched() -> Iterator[NewRequest]:
        for row in rows(MANY):
            if row.index in (loading.CHUNK_ROWS * 2 + 1, loading.CHUNK_ROWS * 2 + 3):
                with Database.open(str(path), busy_timeout_s=0.0) as other:  # would not wait for the loader
                    claimed = claim(other, worker, running, 2, now=2.0)
                    seen.append(record(other, worker, [result_of(c) for c in claimed], None, now=3.0))
                    assert [job.id for job in list_jobs(other)] == [running]
                    assert claim(other, worker, running + 1, 2, now=2.0) == []
                    with pytest.raises(JobNotFound):
                        get_job(other, running + 1)
            yield row

    assert create_job(db, new_job(), watched(), now=1.0) == running + 1
    assert seen == [2, 2]
    assert get_job(db, running).state is JobState.DONE


CRASH = """
import os, sys
from storage.database import Database
from storage.jobs import create_job
from tests.storage.factories import new_job, rows
def dying():
    yield from rows(int(sys.argv[2]), errors=(3,))
    os._exit(9)
create_job(Database.open(sys.argv[1]), new_job(), dying(), now=100.0)
"""


def test_a_killed_enqueue_is_swept_once_it_is_old(db: Database, path: Path) -> None:
    kept = make_job(db)
    number = loading.CHUNK_ROWS * 4
    assert subprocess.run([sys.executable, "-c", CRASH, str(path), str(number)]).returncode == 9
    assert count(db)[1] > 3 + loading.CHUNK_ROWS
    assert [job.id for job in list_jobs(db)] == [kept]
    assert sweep_invisible(db, now=110.0, older_than_s=60.0) == 0
    assert sweep_invisible(db, now=200.0, older_than_s=60.0) == 1
    assert count(db) == (1, 3, 0)


def test_a_loader_that_was_swept_is_told(db: Database, path: Path) -> None:
    def swept() -> Iterator[NewRequest]:
        for row in rows(MANY * 2):
            if row.index == loading.CHUNK_ROWS * 3 + 1:
                assert sweep_invisible(db, now=1e6, older_than_s=1.0) == 1
            yield row

    with pytest.raises(LoadLost, match="Enqueue the dataset again"):
        create_job(db, new_job(), swept(), now=1.0)
    assert count(db) == (0, 0, 0)


def test_long_rows_make_small_chunks(db: Database) -> None:
    prompt = "x" * (1 << 20)
    chunks = list(loading._chunks((NewRequest(i, None, {"prompt": prompt}) for i in range(20)), 1.0))
    assert [len(c.requests) for c in chunks] == [8, 8, 4]


def test_numbers_are_not_used_twice(db: Database) -> None:
    def failing() -> Iterator[NewRequest]:
        yield from rows(MANY)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        create_job(db, new_job(), failing(), now=1.0)
    assert make_job(db) == 2


MEMORY = """
import sys
from storage.database import Database
from storage.jobs import create_job
from storage.results import stream_outputs
from tests.storage.factories import new_job, rows
db = Database.open(sys.argv[1])
number = int(sys.argv[2])
job_id = create_job(db, new_job(), rows(number, errors=range(number)), now=1.0)
assert sum(1 for _ in stream_outputs(db, job_id)) == number
# Not getrusage's peak, which begins with that of the process that started this one.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    def peak(number: int) -> int:  # KiB
        command = [sys.executable, "-c", MEMORY, str(tmp_path / f"{number}.db"), str(number)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert peak(40_000) - peak(4_000) < 4 << 10
