import logging
import threading
from pathlib import Path

import pytest

from storage.claims import expire, list_workers, register_worker
from storage.database import Database
from storage.errors import ClaimLost
from worker.lease import Lease

LEASE_S = 60.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def worker_id(database: Database, clock: Clock) -> int:
    return register_worker(
        database, hostname="here", pid=1, queue="default", device="cpu", now=clock.now, lease_s=LEASE_S
    )


def make_lease(
    database: Database, worker_id: int, clock: Clock, lost: threading.Event, *, lease_s: float = LEASE_S
) -> Lease:
    return Lease(database=database, worker_id=worker_id, lease_s=lease_s, clock=clock, on_lost=lost.set)


def test_a_beat_prolongs_the_lease_and_says_what_the_worker_does(
    database: Database, worker_id: int, clock: Clock
) -> None:
    lease = make_lease(database, worker_id, clock, threading.Event())
    clock.now += 30

    lease.beat(model="opt", state="draining")

    (worker,) = list_workers(database, clock.now)
    assert (worker.heartbeat_at, worker.lease_until) == (1030.0, 1090.0)
    assert (worker.model, worker.state) == ("opt", "draining")


def test_a_lease_that_ran_out_unnoticed_is_taken_up_again(database: Database, worker_id: int, clock: Clock) -> None:
    lease = make_lease(database, worker_id, clock, threading.Event())
    clock.now += 10 * LEASE_S

    lease.beat()

    assert expire(database, now=clock.now) == 0
    assert [worker.id for worker in list_workers(database, clock.now)] == [worker_id]


def test_a_lease_that_another_took_is_lost(database: Database, worker_id: int, clock: Clock) -> None:
    lease = make_lease(database, worker_id, clock, threading.Event())
    clock.now += 2 * LEASE_S
    expire(database, now=clock.now)

    with pytest.raises(ClaimLost):
        lease.beat()


def test_the_thread_beats_by_itself_and_says_once_when_the_lease_is_lost(
    database: Database, worker_id: int, clock: Clock
) -> None:
    lost = threading.Event()
    lease = make_lease(database, worker_id, clock, lost, lease_s=0.1)
    lease.start()
    clock.now += 2 * LEASE_S
    expire(database, now=clock.now, is_dead=lambda worker: True)

    lost.wait()
    assert lease.is_lost
    lease.stop()


class Heard(logging.Handler):
    """Notices the first thing that is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.event = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.event.set()


def test_a_database_that_is_gone_costs_the_lease_only_when_it_is_over(
    tmp_path: Path, worker_id: int, database: Database, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="overnight")
    # A directory in the file's place: SQLite can neither read nor write it.
    lost = threading.Event()
    lease = make_lease(database, worker_id, clock, lost, lease_s=0.1)
    assert database.path is not None
    database.close()
    database.path.rename(tmp_path / "away.db")
    database.path.mkdir()
    heard = Heard()
    logging.getLogger("overnight").addHandler(heard)
    lease.start()
    heard.event.wait()  # a beat has failed
    assert not lost.is_set()
    clock.now += 1.0

    lost.wait()
    assert lease.is_lost
    lease.stop()
    logging.getLogger("overnight").removeHandler(heard)
    database.path.rmdir()
