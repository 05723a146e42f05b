"""One Database object, passed in: it opens, creates or upgrades the database and hands out short transactions."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from sqlalchemy import URL, Connection, Engine, create_engine, exc, inspect, select

from storage.connecting import make_engine, parsed_url, sqlite_path, text_of, unusable
from storage.dialects import one_at_a_time
from storage.errors import DatabaseReadOnly, NotADatabase, SchemaTooNew
from storage.reading import connect_for_reading, is_closed_wal
from storage.schema import HEAD, REVISIONS, alembic_version, metadata
from storage.sqlite import install_events, prepare_file
from storage.translation import translate
from storage.urls import without_password

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
        parsed = parsed_url(url)
        path = None
        if parsed.get_backend_name() == "sqlite":
            parsed, path = sqlite_path(parsed, url)
        database = cls(parsed, make_engine(parsed, path, busy_timeout_s), path)
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
        parsed = parsed_url(url)
        if parsed.get_backend_name() != "sqlite":
            return cls.open(url, busy_timeout_s=busy_timeout_s)
        parsed, path = sqlite_path(parsed, url)
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
        return without_password(text_of(self._url))

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
            translated = translate(error, str(self.path or self.url), text_of(self._url))
            if translated is None:
                raise
            raise translated from error

    def _connect(self, given: str) -> None:
        """The first connection, which the pool keeps: only now does the driver see the options of the URL."""
        try:
            with self._translated(), self._engine.connect():
                pass
        except (TypeError, ValueError, exc.ProgrammingError) as error:
            raise unusable(given, error) from error

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
        engine = make_engine(self._url, self.path, busy_timeout_s, foreign_keys=False)
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


def _version(connection: Connection) -> str | None:
    """The stamped revision; None where there is no stamp."""
    if not connection.dialect.has_table(connection, alembic_version.name):
        return None
    return connection.execute(select(alembic_version.c.version_num)).scalar_one_or_none()
