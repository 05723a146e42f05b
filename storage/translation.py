"""What a driver's error means to a person."""

import sqlite3

from sqlalchemy import exc

from storage.errors import (
    DatabaseFull,
    DatabaseLocked,
    DatabaseMisnamed,
    DatabaseReadOnly,
    DatabaseUnreachable,
    NotADatabase,
    StorageError,
    ValueTooBig,
)
from storage.urls import shown_error

_REFUSALS = ("password authentication failed", "no password supplied", '" does not exist')  # PostgreSQL's words
_READ_ONLY = "25006"


def translate(error: exc.DBAPIError, place: str, url: str = "") -> StorageError | None:
    """The failure that a person can act on behind a driver's error; None when it is a fault of ours.

    `place`: what to call the database. `url`: with its password, so that no driver's text shows it.
    """
    code = getattr(error.orig, "sqlite_errorcode", None)
    if code is None:
        said = shown_error(error.orig or error, url)
        # libpq gives no code for a connection that was refused, only a text.
        if any(words in str(error.orig) for words in _REFUSALS):
            return DatabaseMisnamed(f"The database {place} does not let us in: {said}")
        if getattr(error.orig, "sqlstate", None) == _READ_ONLY:  # a fail-over, or a full disk: it may pass
            return DatabaseUnreachable(f"The database {place} takes no writes: {said}")
        if isinstance(error, exc.OperationalError | exc.InterfaceError):
            return DatabaseUnreachable(f"Cannot reach the database {place}: {said}")
        return None
    if code == sqlite3.SQLITE_CANTOPEN:
        return DatabaseUnreachable(f"The database {place} cannot be opened: {error.orig}.")
    if code == sqlite3.SQLITE_READONLY_ROLLBACK:
        return DatabaseReadOnly(
            f"The database {place} was left in the middle of a write, which can be undone only where it can be "
            "written. Run `overnight status` once there, or name a copy of it and of its -journal with --database."
        )
    match code & 0xFF:  # the primary code; the rest says more than a person needs
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return DatabaseLocked(
                f"The database {place} is locked by another process. Try again; if it stays so, look for a program "
                "that keeps it open (`fuser` or `lsof` name it)."
            )
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM:
            return DatabaseReadOnly(f"The database {place} is read-only. Change its permissions, owner or mount.")
        case sqlite3.SQLITE_FULL:
            return DatabaseFull(f"No room left on the disk for the database {place}. Free some space and try again.")
        case sqlite3.SQLITE_TOOBIG:
            return ValueTooBig(
                f"A row is larger than the database {place} can hold ({error.orig}). Shorten the texts, or lower "
                "OVERNIGHT_PROMPT_BYTES and OVERNIGHT_ROW_BYTES, so that such rows become error rows."
            )
        case sqlite3.SQLITE_NOTADB:
            return NotADatabase(f"{place} is not a database. Name another file with --database or OVERNIGHT_DATABASE.")
        case sqlite3.SQLITE_CORRUPT:
            return NotADatabase(f"The database {place} is damaged ({error.orig}). Restore it from a copy.")
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_IOERR | sqlite3.SQLITE_PROTOCOL:
            return DatabaseUnreachable(f"The database {place} cannot be read or written: {error.orig}.")
    return None
