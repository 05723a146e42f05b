"""What the command line waits for: storage loads no Alembic, no ORM, no torch."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
from storage.database import Database
from storage.claims import list_workers
from storage.jobs import create_job, list_jobs
from storage.results import record
from tests.storage.factories import make_job
with Database.open(sys.argv[1]) as db:  # a new file, too
    make_job(db)
    assert len(list_jobs(db)) == 1 and list_workers(db, 1.0) == []
heavy = ("alembic", "torch", "transformers", "numpy", "sqlalchemy.orm", "sqlalchemy.dialects.postgresql")
print([name for name in heavy if name in sys.modules])
"""


def test_creating_and_reading_load_nothing_heavy(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "overnight.db")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
