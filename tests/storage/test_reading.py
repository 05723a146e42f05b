"""A database that cannot be written can be read; what would have to be mended first is said."""

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from storage.database import Database
from storage.errors import DatabaseReadOnly, DatabaseUnreachable, NotADatabase
from storage.jobs import get_job
from storage.reading import is_closed_wal
from tests.storage.factories import make_job, make_worker

READ = """
import os, sys
from storage.database import Database
from storage.errors import StorageError
from storage.jobs import list_jobs
from storage.results import stream_outputs
if os.getuid() == 0:
    os.setgid(65534); os.setgroups([]); os.setuid(65534)  # root may write everywhere
try:
    with Database.open_for_reading(sys.argv[1]) as db:
        print([job.id for job in list_jobs(db)], len(list(stream_outputs(db, 1))))
except StorageError as error:
    print(type(error).__name__, error)
"""


def read_as_nobody(path: Path) -> str:
    run = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A folder with a database of two jobs that another user may read."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    home = tmp_path / "home"
    with Database.open(str(home / "overnight.db")) as db:
        make_job(db, 3, errors=(0,))
        make_job(db)
    (home / "overnight.db").chmod(0o644)
    yield home
    home.chmod(0o700)


@pytest.mark.parametrize(("file_mode", "folder_mode"), [(0o444, 0o777), (0o666, 0o555), (0o444, 0o555)])
def test_what_cannot_be_written_can_be_read(home: Path, file_mode: int, folder_mode: int) -> None:
    (home / "overnight.db").chmod(file_mode)
    for beside in home.glob("overnight.db-*"):
        beside.chmod(0o444)
    home.chmod(folder_mode)
    assert read_as_nobody(home / "overnight.db") == "[2, 1] 1"


def test_a_log_that_was_written_back_needs_no_file_beside_it(home: Path) -> None:
    path = home / "overnight.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    assert not path.with_name("overnight.db-wal").exists()
    assert not is_closed_wal(path)  # root, or its owner, may write: an ordinary connection does
    home.chmod(0o555)
    assert read_as_nobody(path) == "[2, 1] 1"


def test_half_a_write_is_said_and_left_alone(home: Path) -> None:
    path, copy = home / "overnight.db", home / "copy.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        # A journal on the disk, and pages written before the commit: as a killed process leaves them.
        writer.execute("PRAGMA cache_size = 1")
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("UPDATE requests SET payload = zeroblob(200000)")
        shutil.copy(path, copy)
        shutil.copy(f"{path}-journal", f"{copy}-journal")
        writer.execute("ROLLBACK")
    for each in (copy, Path(f"{copy}-journal")):
        each.chmod(0o444)
    before = copy.read_bytes()
    home.chmod(0o555)
    printed = read_as_nobody(copy)
    assert printed.startswith("DatabaseReadOnly")
    assert "in the middle of a write" in printed
    assert copy.read_bytes() == before


def test_an_older_schema_is_not_upgraded(home: Path) -> None:
    path = home / "overnight.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '0002'")
    with pytest.raises(DatabaseReadOnly, match=r"older schema 0002 .* `overnight status` once where it can be written"):
        Database.open_for_reading(str(path))


def test_what_is_no_database_of_ours_is_said(tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / "empty.db").close()
    with pytest.raises(NotADatabase, match="not a database of overnight"):
        Database.open_for_reading(str(tmp_path / "empty.db"))
    with pytest.raises(DatabaseUnreachable):
        Database.open_for_reading(str(tmp_path / "none.db"))
    assert not (tmp_path / "none.db").exists()


def test_a_reader_waits_for_no_right_to_write_and_gets_none(home: Path) -> None:
    path = str(home / "overnight.db")
    with Database.open(path) as writer, Database.open_for_reading(path) as reader:
        new = make_job(writer)
        assert get_job(reader, new).num_requests == 3
        with pytest.raises(DatabaseReadOnly):
            make_worker(reader)
