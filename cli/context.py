"""What every command shares: the settings flags seen so far, and the database they lead to."""

import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from storage.database import Database
    from worker.settings import Settings


class App:
    """One invocation of the command line. Settings are read, and the database opened, when a command asks."""

    def __init__(self) -> None:
        self.flags: dict[str, object] = {}
        """Settings given as flags, before or after the command's name."""

    @cached_property
    def settings(self) -> "Settings":
        """Flags over ``OVERNIGHT_*`` over ``overnight.toml``.

        Raises:
            SettingsError: names the variable or key.
        """
        from worker.settings import load_settings

        return load_settings(self.flags, os.environ)

    @property
    def database_name(self) -> str:
        """The database for people: its file, or its URL without the password."""
        from worker.settings import without_password

        url = self.settings.database_url
        return str(sqlite_path(url) or without_password(url))

    def make_home(self) -> None:
        """The folder of all state, for its user only."""
        self.settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)

    def open_database(self) -> "Database":
        """The database, made if it is not there; the caller closes it.

        Raises:
            DatabaseUnreachable, SchemaTooNew, UnsafeFilesystem: it cannot be used.
        """
        from storage.database import Database

        return Database.open(self.settings.database_url)

    def open_existing_database(self) -> "Database | None":
        """The database, or None where there is none yet: looking must not leave a file behind."""
        path = sqlite_path(self.settings.database_url)
        if path is not None and not path.exists():
            return None
        return self.open_database()

    def open_for_reading(self) -> "Database | None":
        """The same for a command that only looks: it also works where nothing can be written.

        Raises:
            DatabaseReadOnly: what is there must be upgraded or repaired first.
        """
        from storage.database import Database
        from storage.errors import DatabaseReadOnly

        try:
            return self.open_existing_database()
        except DatabaseReadOnly:
            return Database.open_for_reading(self.settings.database_url)

    def job_database(self, job_id: int, *, only_look: bool = False) -> "Database":
        """The database for a command about one job.

        Raises:
            JobNotFound: there is no database, so there is no job; nothing is created.
        """
        from storage.errors import JobNotFound

        database = self.open_for_reading() if only_look else self.open_existing_database()
        if database is None:
            raise JobNotFound(job_id)
        return database

    def files_to_keep(self, origin: Mapping[str, object] | None) -> list[Path]:
        """Files that no output may replace: the dataset of a job, and the database with what SQLite keeps beside it."""
        dataset = (origin or {}).get("dataset")
        kept = [Path(dataset)] if isinstance(dataset, str) else []
        if database := sqlite_path(self.settings.database_url):
            # SQLite names them after the file that a link leads to.
            real = database.resolve()
            kept += [database, *(real.with_name(f"{real.name}{suffix}") for suffix in _SIDE_FILES)]
        return kept


_SIDE_FILES = ("-journal", "-wal", "-shm")
_SQLITE_URL = re.compile(r"sqlite(?:\+\w+)?:///([^?]*)", re.IGNORECASE)


def sqlite_path(url: str) -> Path | None:
    """The file of a SQLite URL; None for any other database, and where the URL names no file."""
    match = _SQLITE_URL.match(url)
    try:
        return Path(match[1]).expanduser() if match and match[1] else None
    except RuntimeError:  # ~nobody: opening it will say so
        return None
