"""How long a machine leaves a model alone, and that its next process knows."""

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
