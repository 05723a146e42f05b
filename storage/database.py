"""One Database object, passed in: it opens, creates or upgrades the database and hands out short transactions."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from sqlalchemy import URL, Connection, Engine, Insert, Table, create_engine, exc, func, inspect, select
from sqlalchemy.engine import make_url

from storage.errors import (
    DatabaseFull,
    DatabaseLocked,
    DatabaseMisnamed,
    DatabaseReadOnly,
    DatabaseUnreachable,
    NotADatabase,
    SchemaTooNew,
    StorageError,
    ValueTooBig,
)
from storage.reading import connect_for_reading, is_closed_wal
from storage.schema import HEAD, REVISIONS, alembic_version, metadata
from storage.sqlite import OLDEST_SQLITE, install_events, prepare_file
from storage.urls import shown_error, without_password

_REFUSALS = ("password authentication failed", "no password supplied", '" does not exist')  # PostgreSQL's words
_READ_ONLY = "25006"
_ADVISORY_LOCK = 0x6F766E74  # "ovnt": PostgreSQL's name for "one process creates or upgrades the schema"


class Database:
    """The database of one overnight installation. Threads may share it; it must not be carried across a fork."""

    def __init__(self, url: URL, engine: Engine, path: Path | None) -> None:
        """Use `open`, which also looks at what is there."""
        self._url = url
        self._engine = engine
        self.path = path  #: the SQLite file, None for a server
        self.journal_mode = ""  #: "truncate" or "wal"; "" for a server
        self.schema_version = HEAD  #: the revision of the schema, after opening

    @classmethod
    def open(cls, url: str, *, busy_timeout_s: float = 10.0) -> "Database":
        """Open a SQLAlchemy URL or the path of a SQLite file; create or upgrade the schema where that is needed.

        `busy_timeout_s`: how long to wait for another process's write.
        Raises DatabaseUnreachable or one of its kinds (locked, read-only, full, no database, too new, unsafe disk).
        """
        parsed = _parse(url)
        path = None
        if parsed.get_backend_name() == "sqlite":
            parsed, path = _sqlite_path(parsed, url)
        database = cls(parsed, _make_engine(parsed, path, busy_timeout_s), path)
        try:
            if path is not None:
                prepare_file(path)
            database._connect(url)
            database._open_schema(busy_timeout_s)
        except BaseException:
            database.close()
            raise
        return database

    @classmethod
    def open_for_reading(cls, url: str, *, busy_timeout_s: float = 10.0) -> "Database":
        """Open a database where nothing can be written: nothing is made, upgraded or repaired.

        Raises DatabaseReadOnly where that would be needed first, DatabaseUnreachable or one of its other kinds.
        """
        parsed = _parse(url)
        if parsed.get_backend_name() != "sqlite":
            return cls.open(url, busy_timeout_s=busy_timeout_s)
        parsed, path = _sqlite_path(parsed, url)
        immutable = is_closed_wal(path)
        engine = create_engine(
            parsed, hide_parameters=True, creator=lambda: connect_for_reading(path, busy_timeout_s, immutable=immutable)
        )
        install_events(engine, path, busy_timeout_s=busy_timeout_s, read_only=True)
        database = cls(parsed, engine, path)
        try:
            database._check_schema()
        except BaseException:
            database.close()
            raise
        return database

    @property
    def url(self) -> str:
        """The URL, its password hidden."""
        return without_password(_text_of(self._url))

    @property
    def dialect(self) -> str:
        """ "sqlite", "postgresql", ..."""
        return self._engine.dialect.name

    @property
    def sqlite_version(self) -> str | None:
        """The version of the SQLite library, None for a server."""
        return sqlite3.sqlite_version if self.path else None

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A read transaction. Keep it short: on SQLite with a rollback journal an open reader blocks every commit."""
        with self._translated(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A write transaction, which holds SQLite's write lock from its start. Commits at the end, or not at all."""
        with self._translated(), self._engine.connect() as connection:
            writer = connection.execution_options(overnight_write=True)
            with writer.begin():
                yield writer

    @contextmanager
    def bare(self) -> Iterator[Connection]:
        """A connection of SQLite outside any transaction, for the statements that allow none."""
        with self._translated(), self._engine.connect() as connection:
            yield connection.execution_options(overnight_bare=True)

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def __enter__(self) -> "Database":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Database({self.url!r})"

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except exc.DBAPIError as error:
            translated = translate(error, str(self.path or self.url), _text_of(self._url))
            if translated is None:
                raise
            raise translated from error

    def _connect(self, given: str) -> None:
        """The first connection, which the pool keeps: only now does the driver see the options of the URL."""
        try:
            with self._translated(), self._engine.connect():
                pass
        except (TypeError, ValueError, exc.ProgrammingError) as error:
            raise _unusable(given, error) from error

    def _open_schema(self, busy_timeout_s: float) -> None:
        with self.read() as connection:
            if self.path:
                self.journal_mode = str(connection.exec_driver_sql("PRAGMA journal_mode").scalar_one())
            version = _version(connection)
        if version is None:
            version = self._create_schema()
        if version == HEAD:
            return
        if version not in REVISIONS:
            raise self._too_new(version)
        from storage.migrations import upgrade  # Alembic, only now

        # Rebuilding a table, SQLite's way to alter it, must not trip over foreign keys: its own connection, without.
        engine = _make_engine(self._url, self.path, busy_timeout_s, foreign_keys=False)
        try:
            with self._translated(), engine.connect() as connection:
                writer = connection.execution_options(overnight_write=True)
                with writer.begin():
                    one_at_a_time(writer, _ADVISORY_LOCK)
                    upgrade(writer)
        finally:
            engine.dispose()

    def _check_schema(self) -> None:
        with self.read() as connection:
            version = _version(connection)
        if version is None:
            raise NotADatabase(
                f"{self.path} is not a database of overnight. Name another file with --database or OVERNIGHT_DATABASE."
            )
        if version not in REVISIONS:
            raise self._too_new(version)
        if version != HEAD:
            raise DatabaseReadOnly(
                f"The database {self.path} has the older schema {version} and cannot be written, so it cannot be "
                f"upgraded to {HEAD}. Run `overnight status` once where it can be written, or name a copy of it with "
                "--database."
            )

    def _too_new(self, version: str) -> SchemaTooNew:
        return SchemaTooNew(
            f"The database {self.path or self.url} has schema {version}; this overnight knows up to {HEAD}. "
            "A newer overnight made it: use that one, or name another database."
        )

    def _create_schema(self) -> str:
        """Make all tables and stamp them, in one transaction; another process may have been faster."""
        with self.write() as connection:
            one_at_a_time(connection, _ADVISORY_LOCK)
            version = _version(connection)
            if version is not None:
                return version
            strangers = sorted(inspect(connection).get_table_names())
            if strangers and self.path:
                raise NotADatabase(
                    f"{self.path} is a SQLite database of something else (tables: {', '.join(strangers[:5])}). "
                    "Name another file with --database or OVERNIGHT_DATABASE."
                )
            metadata.create_all(connection)
            alembic_version.create(connection)
            connection.execute(alembic_version.insert().values(version_num=HEAD))
        return HEAD


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


def _parse(url: str) -> URL:
    if "://" not in url:
        return URL.create("sqlite", database=url)
    try:
        return make_url(url)
    except (exc.ArgumentError, ValueError) as error:
        raise _unusable(url, error) from error


def _unusable(url: str, error: Exception) -> DatabaseMisnamed:
    said = shown_error(getattr(error, "orig", None) or error, url).splitlines()[0].removesuffix(".")
    return DatabaseMisnamed(
        f"The database URL {without_password(url)} cannot be used: {said}. Correct it in --database or "
        "OVERNIGHT_DATABASE."
    )


def _text_of(url: URL) -> str:
    """With its password: never for people."""
    return url.render_as_string(hide_password=False)


def _sqlite_path(parsed: URL, given: str) -> tuple[URL, Path]:
    if not parsed.database or parsed.database == ":memory:" or parsed.database.startswith("file:"):
        raise DatabaseMisnamed(
            f"The database {without_password(given)} is not a file. Give a path, or sqlite:////absolute/path.db."
        )
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        oldest = ".".join(map(str, OLDEST_SQLITE))
        raise DatabaseMisnamed(f"SQLite {sqlite3.sqlite_version} is too old: overnight needs {oldest} or later.")
    try:
        path = Path(parsed.database).expanduser().resolve()
    except (RuntimeError, ValueError) as error:  # ~nobody, or a zero character
        raise _unusable(given, error) from error
    return parsed.set(database=str(path)), path


def _make_engine(url: URL, path: Path | None, busy_timeout_s: float, *, foreign_keys: bool = True) -> Engine:
    # Parameters are prompts: they stay out of error texts and logs.
    try:
        if path is None:
            return create_engine(url, hide_parameters=True, pool_pre_ping=True)
        engine = create_engine(url, hide_parameters=True, connect_args={"timeout": busy_timeout_s})
    except (ModuleNotFoundError, exc.NoSuchModuleError) as error:
        raise DatabaseMisnamed(
            f"No driver for the database {without_password(_text_of(url))}: {shown_error(error, _text_of(url))}. "
            "For PostgreSQL: pip install 'overnight[postgres]'."
        ) from error
    except (TypeError, ValueError, exc.ArgumentError) as error:
        raise _unusable(_text_of(url), error) from error
    install_events(engine, path, busy_timeout_s=busy_timeout_s, foreign_keys=foreign_keys)
    return engine


def _version(connection: Connection) -> str | None:
    """The stamped revision; None where there is no stamp."""
    if not connection.dialect.has_table(connection, alembic_version.name):
        return None
    return connection.execute(select(alembic_version.c.version_num)).scalar_one_or_none()


def insert_once(connection: Connection, table: Table) -> Insert:
    """INSERT .. ON CONFLICT DO NOTHING, in the database's own words."""
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import insert as postgresql_insert

        return postgresql_insert(table).on_conflict_do_nothing()
    from sqlalchemy.dialects.sqlite import insert as sqlite_insert

    return sqlite_insert(table).on_conflict_do_nothing()


def one_at_a_time(connection: Connection, what: int) -> None:
    """Within a write transaction: nobody else is past this call with the same number until it ends.

    SQLite's write lock already lets only one in; PostgreSQL needs to be asked.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(what)))
