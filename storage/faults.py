"""Faults of a machine with a model: why it leaves the model alone, and until when. `now` is unix seconds."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import delete, insert, select, update

from storage.database import Database
from storage.schema import faults


@dataclass(frozen=True, slots=True)
class Fault:
    """What went wrong on one machine with one model, and has not gone well since."""

    machine: str
    model: str  # as the job names it
    count: int  # in a row
    message: str
    happened_at: float
    retry_at: float

    @property
    def wait_s(self) -> float:
        """How long the model was to be left alone, in seconds."""
        return self.retry_at - self.happened_at


def note_fault(
    db: Database, machine: str, model: str, message: str, *, now: float, waits_s: Sequence[float], spared: int = 0
) -> Fault:
    """One fault more. The model is left alone for `waits_s[0]` seconds, the next time for `waits_s[1]`, the last again
    and again; the first `spared` faults in a row cost no waiting."""
    key = (faults.c.machine == machine, faults.c.model == model)
    with db.write() as connection:
        before = connection.execute(select(faults.c.count).where(*key).with_for_update()).scalar_one_or_none() or 0
        turn = before - spared
        wait_s = waits_s[min(turn, len(waits_s) - 1)] if turn >= 0 else 0.0
        fault = Fault(machine, model, before + 1, message, now, now + wait_s)
        values = {"count": fault.count, "message": message, "happened_at": now, "retry_at": fault.retry_at}
        if before:
            connection.execute(update(faults).where(*key).values(values))
        else:
            connection.execute(insert(faults).values(machine=machine, model=model, **values))
    return fault


def clear_fault(db: Database, machine: str, model: str) -> None:
    """The model works on this machine."""
    with db.write() as connection:
        connection.execute(delete(faults).where(faults.c.machine == machine, faults.c.model == model))


def list_faults(db: Database, machine: str | None = None) -> list[Fault]:
    """The faults of one machine, or of all."""
    query = select(*(faults.c[name] for name in Fault.__dataclass_fields__)).order_by(faults.c.machine, faults.c.model)
    if machine is not None:
        query = query.where(faults.c.machine == machine)
    with db.read() as connection:
        return [Fault(*row) for row in connection.execute(query)]
