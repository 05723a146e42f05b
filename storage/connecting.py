"""From what a person wrote to a pool of connections."""

import sqlite3
from pathlib import Path

from sqlalchemy import URL, Engine, create_engine, exc
from sqlalchemy.engine import make_url

from storage.errors import DatabaseMisnamed
from storage.sqlite import OLDEST_SQLITE, install_events
from storage.urls import shown_error, without_password


def parsed_url(url: str) -> URL:
    """What a person wrote: a URL, or the path of a SQLite file.

    Raises DatabaseMisnamed.
    """
    if "://" not in url:
        return URL.create("sqlite", database=url)
    try:
        return make_url(url)
    except (exc.ArgumentError, ValueError) as error:
        raise unusable(url, error) from error


def unusable(url: str, error: Exception) -> DatabaseMisnamed:
    """What to raise for a URL that a driver refuses: the sentence hides its password."""
    said = shown_error(getattr(error, "orig", None) or error, url).splitlines()[0].removesuffix(".")
    return DatabaseMisnamed(
        f"The database URL {without_password(url)} cannot be used: {said}. Correct it in --database or "
        "OVERNIGHT_DATABASE."
    )


def text_of(url: URL) -> str:
    """With its password: never for people."""
    return url.render_as_string(hide_password=False)


def sqlite_path(parsed: URL, given: str) -> tuple[URL, Path]:
    """The URL of a SQLite file with its whole path, and that path.

    Raises DatabaseMisnamed.
    """
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
        raise unusable(given, error) from error
    return parsed.set(database=str(path)), path


def make_engine(url: URL, path: Path | None, busy_timeout_s: float, *, foreign_keys: bool = True) -> Engine:
    """The pool of connections; ``path``: of a SQLite file.

    Raises DatabaseMisnamed.
    """
    # Parameters are prompts: they stay out of error texts and logs.
    try:
        if path is None:
            return create_engine(url, hide_parameters=True, pool_pre_ping=True)
        engine = create_engine(url, hide_parameters=True, connect_args={"timeout": busy_timeout_s})
    except (ModuleNotFoundError, exc.NoSuchModuleError) as error:
        raise DatabaseMisnamed(
            f"No driver for the database {without_password(text_of(url))}: {shown_error(error, text_of(url))}. "
            "For PostgreSQL: pip install 'overnight[postgres]'."
        ) from error
    except (TypeError, ValueError, exc.ArgumentError) as error:
        raise unusable(text_of(url), error) from error
    install_events(engine, path, busy_timeout_s=busy_timeout_s, foreign_keys=foreign_keys)
    return engine
