"""What SQLite needs that a database server does not: a private file, a safe disk, pragmas, and locks taken at once."""

import os
import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, event

from storage.errors import (
    DatabaseMisnamed,
    DatabaseReadOnly,
    DatabaseUnreachable,
    NotADatabase,
    UnsafeFilesystem,
)

#: Write-ahead logging can corrupt the file in every release from 3.7.0 up to this one (the "WAL reset" bug).
WAL_IS_SAFE_FROM = (3, 51, 3)
#: UPDATE .. RETURNING, which claims are made of.
OLDEST_SQLITE = (3, 35, 0)

NETWORK_FILESYSTEMS = frozenset(
    {"nfs", "nfs3", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "afs", "coda", "ncpfs", "ceph", "glusterfs"}
    | {"beegfs", "lustre", "davfs", "davfs2", "sshfs", "s3fs", "rclone", "gcsfuse"}
)


def journal_mode_for(version: tuple[int, int, int]) -> str:
    """The fastest journal mode that is safe with this version of the SQLite library."""
    return "wal" if version >= WAL_IS_SAFE_FROM else "truncate"


def unescape_mount(field: str) -> str:
    """A path as /proc/mounts writes it: blanks and backslashes are octal there."""
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, char)
    return field


def network_filesystem(directory: Path, mounts: str) -> str | None:
    """The type of the network file system that holds `directory`, or None; `mounts` is the text of /proc/mounts."""
    longest, found = -1, ""
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = Path(unescape_mount(fields[1]))
        if directory.is_relative_to(point) and len(point.parts) >= longest:
            longest, found = len(point.parts), fields[2]
    return found if found.removeprefix("fuse.") in NETWORK_FILESYSTEMS else None


def prepare_file(path: Path, mounts_file: Path = Path("/proc/mounts")) -> None:
    """Make the directory (0700) and an empty file (0600) before SQLite sees them; refuse what cannot be trusted.

    Raises DatabaseUnreachable, DatabaseReadOnly or UnsafeFilesystem.
    """
    _make_directory(path.parent)
    if mounts_file.exists():
        kind = network_filesystem(path.parent, mounts_file.read_text(errors="replace"))
        if kind is not None:
            raise UnsafeFilesystem(
                f"{path} is on a network file system ({kind}), where SQLite's locks cannot be trusted. "
                "Put it on a local disk (--database or OVERNIGHT_DATABASE), or use a PostgreSQL URL."
            )
    try:
        # SQLite gives its journal the mode of the database file, so this keeps prompts private there as well.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        _check_existing(path)
        return
    except OSError as error:
        raise DatabaseMisnamed(f"Cannot create the database {path}: {error.strerror}.") from error
    try:
        os.fchmod(descriptor, 0o600)  # whatever the umask took away
    finally:
        os.close(descriptor)


def _make_directory(directory: Path) -> None:
    missing = [d for d in (directory, *directory.parents) if not d.exists()]
    for folder in reversed(missing):
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            folder.chmod(0o700)
        except OSError as error:
            raise DatabaseMisnamed(
                f"Cannot make the directory {folder} for the database: {error.strerror}. "
                "Choose another place with --database, OVERNIGHT_DATABASE or OVERNIGHT_HOME."
            ) from error
    if not directory.is_dir():
        raise DatabaseMisnamed(f"Cannot make the database in {directory}: it is not a directory.")


def _check_existing(path: Path) -> None:
    if not path.is_file():
        raise DatabaseMisnamed(f"The database {path} is not a regular file.")
    # Looking into it would be clearer, but closing the file would drop the POSIX locks that SQLite holds on it in this
    # process. SQLite refuses strangers itself, except files of a single byte, which it would overwrite.
    if path.stat().st_size == 1:
        raise NotADatabase(f"{path} is not a database. Name another file with --database or OVERNIGHT_DATABASE.")
    if not os.access(path, os.R_OK):
        raise DatabaseMisnamed(f"The database {path} cannot be read: permission denied.")
    for place in (path, path.parent):
        if not os.access(place, os.W_OK):
            raise DatabaseReadOnly(
                f"The database {path} is read-only: {place} cannot be written. Change its permissions or its owner."
            )


def install_events(
    engine: Engine, path: Path, *, busy_timeout_s: float, foreign_keys: bool = True, read_only: bool = False
) -> None:
    """Set the pragmas on every new connection, and begin transactions ourselves.

    sqlite3's legacy mode begins late and never before a SELECT; a transaction that reads first and writes later then
    fails at once when another one wrote in between. So: BEGIN for readers, BEGIN IMMEDIATE for writers.
    """

    @event.listens_for(engine, "connect")
    def _connected(raw: Any, _record: object) -> None:
        raw.isolation_level = None
        try:
            if read_only:
                _set_safe_pragmas(raw, busy_timeout_s)
            else:
                _set_pragmas(raw, path, busy_timeout_s, foreign_keys)
        except BaseException:
            raw.close()  # the pool has not taken it yet, and an open connection would keep others from mending it
            raise

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        options = connection.get_execution_options()
        if options.get("overnight_bare", False):
            return
        immediate = options.get("overnight_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


def _set_pragmas(raw: sqlite3.Connection, path: Path, busy_timeout_s: float, foreign_keys: bool) -> None:
    wanted = journal_mode_for(sqlite3.sqlite_version_info[:3])
    _set_safe_pragmas(raw, busy_timeout_s)
    if path.stat().st_size == 0:
        # Only an empty file can still be made for giving space back in small pieces (storage.space).
        raw.execute("PRAGMA auto_vacuum = INCREMENTAL")
    raw.execute(f"PRAGMA foreign_keys = {'ON' if foreign_keys else 'OFF'}")
    (mode,) = raw.execute(f"PRAGMA journal_mode = {wanted}").fetchone()
    if mode != wanted:
        raise DatabaseUnreachable(
            f"The database {path} is in journal mode {mode} and in use, so it cannot change to {wanted}, the one "
            f"that is safe with SQLite {sqlite3.sqlite_version}. Stop the other processes that use it."
        )
    raw.execute("PRAGMA synchronous = FULL")


def _set_safe_pragmas(raw: sqlite3.Connection, busy_timeout_s: float) -> None:
    """Those that are about reading, too, and need no lock."""
    raw.execute(f"PRAGMA busy_timeout = {int(busy_timeout_s * 1000)}")
    raw.execute("PRAGMA mmap_size = 0")
    raw.execute("PRAGMA trusted_schema = OFF")
