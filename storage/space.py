"""Giving back what deleted rows have left free in a SQLite file.

A new database is made for it (`auto_vacuum = INCREMENTAL`): the free pages at its end are cut off a few at a time. An
older one must be written anew as a whole, once, while nobody else can use it; from then on it is like a new one.
"""

import sqlite3
from dataclasses import dataclass

from sqlalchemy import Connection, exc

from storage.database import Database
from storage.pace import Pace

_INCREMENTAL = 2
_LITTLE_BYTES = 16 << 20
"""A file of this size is written anew in less than a second."""


@dataclass(frozen=True, slots=True)
class Space:
    """A SQLite file, in bytes."""

    size: int
    free: int
    """Bytes of the file in pages that hold nothing."""
    is_incremental: bool
    """The free pages can be cut off a few at a time."""

    @property
    def is_little(self) -> bool:
        """Writing it anew keeps nobody waiting."""
        return self.size - self.free <= _LITTLE_BYTES


def space_of(db: Database) -> Space | None:
    """How the file stands; None for a server, which sees to its files itself."""
    if db.path is None:
        return None
    with db.read() as connection:
        names = ("page_count", "freelist_count", "page_size", "auto_vacuum")
        count, free, page, mode = (int(connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()) for name in names)
    return Space(count * page, free * page, mode == _INCREMENTAL)


def give_back(db: Database, pace: Pace | None = None) -> None:
    """Cut the free pages off a file that is made for it, in transactions of a moment each."""
    space = space_of(db)
    if space is None or not space.is_incremental:
        return
    pace = pace or Pace(500, most=20_000)
    free = space.free
    while free:
        with pace.step() as pages, db.bare() as connection:
            _cut_off(connection, pages)
        with db.read() as connection:
            left = int(connection.exec_driver_sql("PRAGMA freelist_count").scalar_one())
        if not left or left >= free:
            return  # somebody else deletes as fast, or nothing is left
        free = left


def _cut_off(connection: Connection, pages: int) -> None:
    """A transaction of its own. A page goes at each step of the statement, and only a script is stepped to its end."""
    statement = f"PRAGMA incremental_vacuum({pages})"
    cursor = connection.connection.cursor()
    try:
        cursor.executescript(statement)
    except sqlite3.OperationalError as error:
        raise exc.OperationalError(statement, {}, error) from error
    finally:
        cursor.close()


def rewrite(db: Database) -> None:
    """Write the whole file anew, without its free pages and made for `give_back`.

    Others wait meanwhile, and the disk must have room for the file a second time.
    Raises DatabaseLocked, or DatabaseFull.
    """
    if db.path is None:
        return
    with db.bare() as connection:
        connection.exec_driver_sql(f"PRAGMA auto_vacuum = {_INCREMENTAL}")
        connection.exec_driver_sql("VACUUM")
