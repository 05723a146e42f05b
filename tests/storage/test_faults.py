"""How long a machine leaves a model alone, and that its next process knows."""

import threading
from concurrent.futures import ThreadPoolExecutor

from storage.clock import DatabaseClock
from storage.database import Database
from storage.faults import clear_fault, list_faults, note_fault

WAITS = (60.0, 300.0, 1800.0)


def test_each_fault_in_a_row_waits_longer_up_to_the_last(db: Database) -> None:
    waits = [note_fault(db, "box", "opt", "no room", now=100.0, waits_s=WAITS).wait_s for _ in range(5)]
    assert waits == [60.0, 300.0, 1800.0, 1800.0, 1800.0]
    (fault,) = list_faults(db, "box")
    assert (fault.count, fault.message, fault.retry_at) == (5, "no room", 1900.0)


def test_some_faults_are_spared(db: Database) -> None:
    waits = [note_fault(db, "box", "opt", "died", now=0.0, waits_s=WAITS, spared=3).wait_s for _ in range(5)]
    assert waits == [0.0, 0.0, 0.0, 60.0, 300.0]


def test_machines_and_models_are_apart_and_a_success_forgets(db: Database) -> None:
    for machine, model in (("a", "x"), ("a", "y"), ("b", "x")):
        note_fault(db, machine, model, "m", now=0.0, waits_s=WAITS)
    clear_fault(db, "a", "x")
    clear_fault(db, "a", "never noted")
    assert [(fault.machine, fault.model) for fault in list_faults(db)] == [("a", "y"), ("b", "x")]
    assert [fault.model for fault in list_faults(db, "b")] == ["x"]
    assert note_fault(db, "a", "x", "m", now=0.0, waits_s=WAITS).count == 1


def test_the_databases_clock_goes_on_by_the_monotonic_one(db: Database) -> None:
    now = 50.0
    clock = DatabaseClock(db, lambda: now)
    first = clock()
    now = 57.5
    assert clock() == first + 7.5
    clock.sync()
    assert abs(clock() - first) < 7.0, "asked again, it knows that no such time has passed"


def test_workers_that_note_the_same_fault_at_once_are_all_counted(db: Database) -> None:
    together = threading.Barrier(8)

    def note(_: int) -> int:
        together.wait()
        return note_fault(db, "box", "opt", "died", now=0.0, waits_s=WAITS).count

    with ThreadPoolExecutor(8) as pool:
        counts = list(pool.map(note, range(8)))
    assert sorted(counts) == list(range(1, 9))


def test_deaths_of_two_kinds_have_histories_of_their_own(db: Database) -> None:
    for _ in range(4):
        note_fault(db, "box", "opt", "died", now=0.0, waits_s=WAITS, kind="running", spared=8)
    assert note_fault(db, "box", "opt", "died", now=0.0, waits_s=WAITS, kind="loading").wait_s == 60.0
    assert note_fault(db, "box", "opt", "died", now=10.0, waits_s=WAITS, kind="running", spared=8).wait_s == 0.0
    assert max(fault.retry_at for fault in list_faults(db)) == 60.0, "a death that is spared forgives no other"
    clear_fault(db, "box", "opt")
    assert list_faults(db) == []
