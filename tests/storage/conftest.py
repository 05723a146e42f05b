"""A real SQLite file for each test, and the laws of its tables checked when the test ends."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.database import Database
from storage.integrity import check_integrity


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "overnight.db"


@pytest.fixture
def db(path: Path) -> Iterator[Database]:
    with Database.open(str(path), busy_timeout_s=5.0) as database:
        yield database
        check_integrity(database)
