from dataclasses import replace

from sqlalchemy import insert

from storage.database import Database
from storage.lanes import lane_seconds
from storage.results import record
from storage.schema import passes
from tests.storage.factories import make_job, make_worker, pass_totals


def test_the_busy_seconds_of_a_jobs_passes_are_summed_by_lane(db: Database) -> None:
    mine, other = make_job(db), make_job(db)
    worker = make_worker(db)
    for jobs, started_at, seconds in (
        ((mine,), 100.0, {"disk_read": 2.0, "device_compute": 0.5}),
        ((mine, other), 101.0, {"disk_read": 1.0}),
        ((other,), 102.0, {"disk_read": 50.0}),
        ((mine,), 99.0, {"disk_read": 70.0}),
    ):
        record(db, worker, [], replace(pass_totals(*jobs), started_at=started_at, lane_seconds=seconds), now=200.0)
    assert lane_seconds(db, mine, since=100.0) == {"disk_read": 3.0, "device_compute": 0.5}
    assert lane_seconds(db, 77, since=0.0) == {}


def test_more_passes_than_a_page_are_summed(db: Database) -> None:

    mine, worker = make_job(db), make_worker(db)
    totals = {
        "worker_id": worker, "model": "m", "job_ids": [mine], "started_at": 1.0, "num_passes": 1, "seconds": 1.0,
        "prefill_tokens": 0, "decode_tokens": 0, "weight_bytes": 0, "lane_bytes": {},
        "lane_seconds": {"disk_read": 1.0},
    }  # fmt: skip
    with db.write() as connection:
        connection.execute(insert(passes), [totals] * 2001)
    assert lane_seconds(db, mine, since=0.0) == {"disk_read": 2001.0}
