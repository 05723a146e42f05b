"""The database's clock: leases of several machines are compared by one clock, and not by each machine's own."""

import time
from collections.abc import Callable

from sqlalchemy import Double, cast, extract, func, select

from storage.database import Database


class DatabaseClock:
    """Unix seconds by the database; between two looks (`sync`) told by this machine's monotonic clock.

    For SQLite, which lies on this machine, that is this machine's own clock. Threads may share it.
    """

    def __init__(self, db: Database, monotonic: Callable[[], float] = time.monotonic) -> None:
        """Raises DatabaseUnreachable."""
        self._db = db
        self._monotonic = monotonic
        self._offset_s = 0.0
        self.sync()

    def __call__(self) -> float:
        """The time now, without asking anybody."""
        return self._monotonic() + self._offset_s

    def sync(self) -> None:
        """Ask the database. Raises DatabaseUnreachable."""
        before = self._monotonic()
        there = time_of(self._db)
        self._offset_s = there - (before + self._monotonic()) / 2


def time_of(db: Database) -> float:
    """Unix seconds by the database, for one look at leases. Raises DatabaseUnreachable."""
    if db.dialect != "postgresql":
        return time.time()
    with db.read() as connection:
        return float(connection.execute(select(cast(extract("epoch", func.clock_timestamp()), Double))).scalar_one())
