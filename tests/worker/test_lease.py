import contextlib
import logging
import sqlite3
import threading
import time
from collections.abc import Callable

import pytest

from storage.claims import Doing, expire, list_workers, register_worker
from storage.database import Database
from storage.errors import ClaimLost
from worker.lease import Lease

LEASE_S = 60.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sync(self) -> None:
        """It is the database's already."""


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def worker_id(database: Database, clock: Clock) -> int:
    return register_worker(
        database, hostname="here", pid=1, queue="default", device="cpu", now=clock.now, lease_s=LEASE_S
    )


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.005)


def wait_for_log(caplog: pytest.LogCaptureFixture, words: str, start: Callable[[], None]) -> None:
    with caplog.at_level(logging.WARNING, logger="overnight"):
        start()
        wait_until(lambda: any(words in record.getMessage() for record in list(caplog.records)))


def make_lease(
    database: Database, worker_id: int, clock: Clock, lost: threading.Event, *, lease_s: float = LEASE_S
) -> Lease:
    return Lease(database=database, worker_id=worker_id, lease_s=lease_s, clock=clock, on_lost=lost.set)


def test_a_beat_prolongs_the_lease_and_says_what_the_worker_does(
    database: Database, worker_id: int, clock: Clock
) -> None:
    lease = make_lease(database, worker_id, clock, threading.Event())
    clock.now += 30

    lease.beat(Doing("draining", "opt"))

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


def test_a_database_that_is_locked_costs_no_lease_and_is_asked_again(
    worker_id: int, database: Database, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    lost = threading.Event()
    assert database.path is not None
    with Database.open(str(database.path), busy_timeout_s=0.01) as impatient:
        lease = make_lease(impatient, worker_id, clock, lost, lease_s=0.01)
        clock.now += 10 * LEASE_S
        with contextlib.closing(sqlite3.connect(database.path)) as other:
            other.execute("BEGIN EXCLUSIVE")
            wait_for_log(caplog, "heartbeat failed", lease.start)
        wait_until(lambda: list_workers(database)[0].heartbeat_at == clock.now)
        lease.stop()
    assert not lease.is_lost
    assert not lost.is_set()


def test_no_failure_ends_the_thread_unseen(
    worker_id: int, database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lost = threading.Event()
    lease = make_lease(database, worker_id, clock, lost, lease_s=0.01)

    def broken() -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(clock, "sync", broken)
    wait_for_log(caplog, "a fault of ours", lease.start)
    monkeypatch.undo()
    clock.now += 5.0
    wait_until(lambda: list_workers(database)[0].heartbeat_at == clock.now)
    lease.stop()
    assert not lease.is_lost
