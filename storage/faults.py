"""Faults of a machine with a model: why it leaves the model alone, and until when. `now` is unix seconds."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import delete, select, update

from storage.database import Database
from storage.dialects import insert_once
from storage.schema import faults


@dataclass(frozen=True, slots=True)
class Fault:
    """What went wrong on one machine with one model, and has not gone well since."""

    machine: str
    model: str  # as the job names it
    kind: str  # what was done when it went wrong
    count: int  # in a row
    message: str
    happened_at: float
    retry_at: float

    @property
    def wait_s(self) -> float:
        """How long the model was to be left alone, in seconds."""
        return self.retry_at - self.happened_at


def wait_after(count: int, waits_s: Sequence[float], spared: int = 0) -> float:
    """Seconds to leave a model alone after `count` faults in a row: none after the first `spared`, then `waits_s` one
    after the other, the last again and again."""
    turn = count - 1 - spared
    return waits_s[min(turn, len(waits_s) - 1)] if turn >= 0 else 0.0


def note_fault(
    db: Database,
    machine: str,
    model: str,
    message: str,
    *,
    now: float,
    waits_s: Sequence[float],
    kind: str = "loading",
    spared: int = 0,
) -> Fault:
    """One fault more; see `wait_after` for how long the model is left alone."""
    key = (faults.c.machine == machine, faults.c.model == model, faults.c.kind == kind)
    first = {"machine": machine, "model": model, "kind": kind, "count": 0, "message": message}
    with db.write() as connection:
        # There before it is counted: a row that is not there cannot be locked, and another may be as quick.
        connection.execute(insert_once(connection, faults).values(**first, happened_at=now, retry_at=now))
        count = connection.execute(select(faults.c.count).where(*key).with_for_update()).scalar_one() + 1
        wait_s = wait_after(count, waits_s, spared)
        values = {"count": count, "message": message, "happened_at": now, "retry_at": now + wait_s}
        connection.execute(update(faults).where(*key).values(values))
    return Fault(machine, model, kind, count, message, now, now + wait_s)


def clear_fault(db: Database, machine: str, model: str) -> None:
    """The model works on this machine."""
    with db.write() as connection:
        connection.execute(delete(faults).where(faults.c.machine == machine, faults.c.model == model))


def list_faults(db: Database, machine: str | None = None) -> list[Fault]:
    """The faults of one machine, or of all."""
    query = select(*(faults.c[name] for name in Fault.__dataclass_fields__)).order_by(
        faults.c.machine, faults.c.model, faults.c.kind
    )
    if machine is not None:
        query = query.where(faults.c.machine == machine)
    with db.read() as connection:
        return [Fault(*row) for row in connection.execute(query)]
