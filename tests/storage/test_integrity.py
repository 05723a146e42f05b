"""check_integrity can fail: each broken law is found and named."""

import pytest

from storage.claims import claim
from storage.database import Database
from storage.errors import IntegrityBroken
from storage.integrity import check_integrity
from storage.results import record
from tests.storage.factories import make_job, make_worker, result_of


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("UPDATE jobs SET num_requests = 9", "job 1: num_requests 9 != its requests 3"),
        ("UPDATE jobs SET num_done = 2", "job 1: num_done 2 != its done requests 1"),
        ("UPDATE jobs SET num_failed = 1", "job 1: num_failed 1 != its error outputs 0"),
        ("UPDATE jobs SET generated_tokens = 0", r"job 1: tokens \(5, 0\) != its outputs' sums \(5, 2\)"),
        ("DELETE FROM outputs", "request 1/0: is done, its output is None"),
        ('UPDATE outputs SET "index" = 2', "request 1/2: is pending, its output is ok"),
        ("UPDATE jobs SET state = 'done'", "job 1: is done, with 2 requests pending or claimed"),
        ("UPDATE jobs SET finished_at = 1.0", "job 1: is running, finished_at 1.0"),
        ("UPDATE workers SET stopped_at = 1.0", "request 1/1: claimed by worker 1, which has stopped"),
    ],
)
def test_a_broken_law_is_named(tmp_path: object, damage: str, named: str) -> None:
    with Database.open(f"{tmp_path}/overnight.db") as db:
        job_id, worker = make_job(db), make_worker(db)
        first, _ = claim(db, worker, job_id, 2, now=2.0)
        record(db, worker, [result_of(first)], None, now=3.0)
        check_integrity(db)
        with db.write() as connection:
            connection.exec_driver_sql(damage)
        with pytest.raises(IntegrityBroken, match=named):
            check_integrity(db)
