"""SQLite where nothing can be written: a read-only mount, file or folder."""

import os
import sqlite3
from pathlib import Path

_WAL = b"\x02\x02"
"""Bytes 18 and 19 of a file that is written through a write-ahead log."""


def connect_for_reading(path: Path, timeout_s: float, *, immutable: bool) -> sqlite3.Connection:
    """A connection that can read and nothing else. It respects the locks of writers, unless ``immutable``."""
    how = "mode=ro&immutable=1" if immutable else "mode=ro"
    return sqlite3.connect(f"{path.as_uri()}?{how}", timeout=timeout_s, uri=True, check_same_thread=False)


def is_closed_wal(path: Path) -> bool:
    """Whether a write-ahead log has been written back and the folder is read-only.

    SQLite reads such a file only if it is told that nobody writes: it can make neither log nor shared memory beside it.
    Call it before the file is opened: closing it drops the locks that this process holds on it.
    """
    if os.access(path.parent, os.W_OK):
        return False
    if any(_has_content(path.with_name(f"{path.name}{suffix}")) for suffix in ("-wal", "-journal")):
        return False
    try:
        with path.open("rb") as file:
            return file.read(20)[18:] == _WAL
    except OSError:
        return False  # opening it will say what is wrong


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False
