"""A real database for each test, and the laws of its tables checked when the test ends.

SQLite always. PostgreSQL as well where OVERNIGHT_TEST_POSTGRES is the URL of a database that may be emptied; the tests
that are about the SQLite file (they ask for `path`) run on SQLite alone.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from storage.database import Database
from storage.integrity import check_integrity

POSTGRES = os.environ.get("OVERNIGHT_TEST_POSTGRES")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Twice, where there are two databases and the test does not care which."""
    if {"db", "empty"} & set(metafunc.fixturenames):
        both = POSTGRES is not None and "path" not in metafunc.fixturenames
        metafunc.parametrize("dialect", ["sqlite", "postgresql"] if both else ["sqlite"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "overnight.db"


@pytest.fixture
def empty(dialect: str, tmp_path: Path) -> str:
    """The URL or path of an empty database."""
    if dialect == "sqlite":
        return str(tmp_path / "home" / "overnight.db")
    assert POSTGRES is not None
    emptied = create_engine(POSTGRES)
    with emptied.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA public")
    emptied.dispose()
    return POSTGRES


@pytest.fixture
def db(empty: str) -> Iterator[Database]:
    with Database.open(empty, busy_timeout_s=5.0) as database:
        yield database
        check_integrity(database)
