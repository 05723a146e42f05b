"""Opening: a private file on a safe disk, the right journal, and one clear error for everything else."""

import os
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.database import Database
from storage.errors import (
    DatabaseFull,
    DatabaseLocked,
    DatabaseReadOnly,
    DatabaseUnreachable,
    NotADatabase,
    SchemaTooNew,
    StorageError,
    UnsafeFilesystem,
)
from storage.jobs import create_job, list_jobs
from storage.schema import HEAD
from storage.sqlite import journal_mode_for, network_filesystem, prepare_file
from tests.storage.factories import make_job, make_worker, new_job, rows


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o277])
def test_the_file_is_private_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "a" / "b" / "overnight.db"
    before = os.umask(umask)
    try:
        with Database.open(str(path)) as db:
            make_job(db)
            with db.write() as connection:  # its journal is there while a transaction is
                connection.exec_driver_sql("UPDATE jobs SET seed = 1")
                beside = [p for p in path.parent.iterdir() if p != path]
                assert [mode(p) for p in beside] == [0o600] * len(beside)
                assert beside
    finally:
        os.umask(before)
    assert mode(path) == 0o600
    assert mode(path.parent) == mode(path.parent.parent) == 0o700


def test_a_url_and_a_path_name_the_same_file(path: Path) -> None:
    with Database.open(f"sqlite:///{path}") as db:
        job_id = make_job(db)
        assert (db.path, db.schema_version, db.sqlite_version) == (path, HEAD, sqlite3.sqlite_version)
        assert db.url == f"sqlite:///{path}"
    with Database.open(str(path)) as db:
        assert [job.id for job in list_jobs(db)] == [job_id]


@pytest.mark.parametrize(
    ("version", "expected"),
    [((3, 40, 1), "truncate"), ((3, 51, 2), "truncate"), ((3, 51, 3), "wal"), ((3, 53, 0), "wal")],
)
def test_write_ahead_logging_only_where_it_is_safe(version: tuple[int, int, int], expected: str) -> None:
    assert journal_mode_for(version) == expected


def test_the_pragmas_hold(db: Database, path: Path) -> None:
    assert db.journal_mode == journal_mode_for(sqlite3.sqlite_version_info[:3])
    expected = {"journal_mode": db.journal_mode, "foreign_keys": 1, "synchronous": 2, "busy_timeout": 5000}
    with db.read() as connection:
        found = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in expected}
    assert found == expected


def test_a_write_transaction_holds_the_lock_from_its_start(db: Database, path: Path) -> None:
    with Database.open(str(path), busy_timeout_s=0.0) as other, db.write(), pytest.raises(DatabaseLocked):
        make_worker(other)


def test_an_exception_rolls_back(db: Database) -> None:
    job_id = make_job(db)

    def half() -> None:
        with db.write() as connection:
            connection.exec_driver_sql("UPDATE jobs SET seed = 99")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert [(job.id, job.seed) for job in list_jobs(db)] == [(job_id, 7)]


def test_locked_says_so(db: Database, path: Path) -> None:
    holder = sqlite3.connect(str(path), isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(DatabaseLocked, match=r"overnight\.db is locked by another process"):
        Database.open(str(path), busy_timeout_s=0.05)
    holder.close()


def test_a_file_that_another_process_keeps_in_an_unsafe_journal_mode(path: Path) -> None:
    if journal_mode_for(sqlite3.sqlite_version_info[:3]) == "wal":
        pytest.skip("this SQLite is new enough for write-ahead logging")
    Database.open(str(path)).close()
    holder = sqlite3.connect(str(path), isolation_level=None)
    holder.execute("PRAGMA journal_mode = WAL")
    holder.execute("SELECT count(*) FROM jobs").fetchall()
    with pytest.raises(DatabaseUnreachable):
        Database.open(str(path), busy_timeout_s=0.05)
    holder.close()
    with Database.open(str(path)) as db:
        assert db.journal_mode == "truncate"


@pytest.mark.parametrize("content", [b"id,text\n1,hello\n" * 100, b"x", b"xy"])
def test_another_file_is_not_touched(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "reviews.csv"
    path.write_bytes(content)
    with pytest.raises(NotADatabase, match=r"reviews\.csv is not a database"):
        Database.open(str(path))
    assert path.read_bytes() == content


def test_another_programs_database_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "music.db"
    other = sqlite3.connect(str(path))
    other.execute("CREATE TABLE albums (title)")
    other.close()
    content = path.read_bytes()
    with pytest.raises(NotADatabase, match=r"something else.*albums"):
        Database.open(str(path))
    assert path.read_bytes() == content


def test_a_damaged_database_says_so(tmp_path: Path) -> None:
    path = tmp_path / "overnight.db"
    with Database.open(str(path)) as db:
        make_job(db, 500)
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(NotADatabase, match="damaged"):
        list_jobs(Database.open(str(path)))


def test_a_newer_schema_is_refused_and_kept(db: Database, path: Path) -> None:
    with db.write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0999'")
    with pytest.raises(SchemaTooNew, match=rf"has schema 0999; this overnight knows up to {HEAD}"):
        Database.open(str(path))
    with db.write() as connection:
        assert connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one() == "0999"


def test_an_empty_file_becomes_a_database(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    with Database.open(str(path)) as db:
        assert make_job(db) == 1


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"])
def test_sqlite_needs_a_file(url: str) -> None:
    with pytest.raises(DatabaseUnreachable, match="is not a file"):
        Database.open(url)


@pytest.mark.parametrize("url", ["nonsense://x/y", "://", "postgresql+nodriver://u:secret@h/d"])
def test_a_url_that_nobody_understands(url: str) -> None:
    with pytest.raises(DatabaseUnreachable) as caught:
        Database.open(url)
    assert "secret" not in str(caught.value)


def test_a_directory_is_no_database(tmp_path: Path) -> None:
    with pytest.raises(DatabaseUnreachable, match="not a regular file"):
        Database.open(str(tmp_path))


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DatabaseUnreachable, match="OVERNIGHT_HOME"):
        Database.open(str(tmp_path / "file" / "home" / "overnight.db"))
    with pytest.raises(DatabaseUnreachable, match="not a directory"):
        Database.open(str(tmp_path / "file" / "overnight.db"))


UNPRIVILEGED = """
import os, sys
from storage.database import Database
from storage.errors import StorageError
from storage.jobs import list_jobs
if os.getuid() == 0:
    os.setgid(65534); os.setgroups([]); os.setuid(65534)  # root may write everywhere
try:
    list_jobs(Database.open(sys.argv[1]))
except StorageError as error:
    print(type(error).__name__, error)
"""


def unprivileged(path: Path) -> str:
    run = subprocess.run([sys.executable, "-c", UNPRIVILEGED, str(path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture
def open_tmp() -> Iterator[Path]:
    """A temporary directory that another user may enter; not pytest's, which every new session closes to others."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize(("file_mode", "folder_mode"), [(0o444, 0o777), (0o666, 0o555)])
def test_read_only_says_what_cannot_be_written(open_tmp: Path, file_mode: int, folder_mode: int) -> None:
    path = open_tmp / "home" / "overnight.db"
    Database.open(str(path)).close()
    path.chmod(file_mode)
    path.parent.chmod(folder_mode)
    culprit = path if file_mode == 0o444 else path.parent
    printed = unprivileged(path)
    path.parent.chmod(0o700)
    assert printed.startswith("DatabaseReadOnly")
    assert f"{culprit} cannot be written" in printed


def test_a_directory_of_somebody_else(open_tmp: Path) -> None:
    (open_tmp / "theirs").mkdir()
    (open_tmp / "theirs").chmod(0o555)
    for path in (open_tmp / "theirs" / "overnight.db", open_tmp / "theirs" / "new" / "overnight.db"):
        printed = unprivileged(path)
        assert printed.startswith("DatabaseMisnamed Cannot")
        assert "Permission denied" in printed


def test_a_write_to_a_read_only_database_says_so(db: Database, path: Path) -> None:
    with db.read() as connection:
        connection.exec_driver_sql("PRAGMA query_only = ON")  # of the one connection in the pool
    with pytest.raises(DatabaseReadOnly, match="is read-only"):
        make_worker(db)
    with db.read() as connection:
        connection.exec_driver_sql("PRAGMA query_only = OFF")


def test_a_full_disk_leaves_no_half_job(db: Database, path: Path) -> None:
    kept, worker = make_job(db), make_worker(db)
    with db.read() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 100}")  # of the one connection in the pool
    with pytest.raises(DatabaseFull, match=r"No room left on the disk for the database .*overnight\.db"):
        create_job(db, new_job(), rows(20_000), now=1.0)
    assert [job.id for job in list_jobs(db)] == [kept]
    with db.read() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM requests").scalar_one() == 3
    assert worker == 1


MOUNTS = """\
/dev/vda / ext4 rw 0 0
server:/export /home nfs4 rw 0 0
/dev/vdb /home/local xfs rw 0 0
me@host:/ /mnt/my\\040files fuse.sshfs rw 0 0
//nas/share /mnt/nas cifs rw 0 0
tmpfs /mnt/nas/fast tmpfs rw 0 0
broken
"""


@pytest.mark.parametrize(
    ("directory", "kind"),
    [
        ("/var/lib", None),
        ("/home/ada", "nfs4"),
        ("/home", "nfs4"),
        ("/homework", None),
        ("/home/local/x", None),
        ("/mnt/my files/x", "fuse.sshfs"),
        ("/mnt/nas", "cifs"),
        ("/mnt/nas/fast/x", None),
    ],
)
def test_the_longest_mount_point_decides(directory: str, kind: str | None) -> None:
    assert network_filesystem(Path(directory), MOUNTS) == kind


def test_a_network_file_system_is_refused(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"server:/x {tmp_path} nfs rw 0 0\n")
    with pytest.raises(UnsafeFilesystem, match=r"network file system .nfs.*OVERNIGHT_DATABASE.*PostgreSQL"):
        prepare_file(tmp_path / "overnight.db", mounts)
    assert not (tmp_path / "overnight.db").exists()
    prepare_file(tmp_path / "overnight.db", tmp_path / "no such file")  # a system without /proc/mounts


def test_every_failure_to_open_is_one_family() -> None:
    for kind in (DatabaseFull, DatabaseLocked, DatabaseReadOnly, NotADatabase, SchemaTooNew, UnsafeFilesystem):
        assert issubclass(kind, DatabaseUnreachable)
    assert issubclass(DatabaseUnreachable, StorageError)


OPEN = "import sys; from storage.database import Database; print(Database.open(sys.argv[1]).schema_version)"


def test_many_processes_may_be_the_first(path: Path) -> None:
    running = [subprocess.Popen([sys.executable, "-c", OPEN, str(path)], stdout=subprocess.PIPE) for _ in range(4)]
    assert [process.communicate()[0] for process in running] == [HEAD.encode() + b"\n"] * 4
