"""The migrations and `create_all` make one and the same schema; an upgrade happens whole or not at all."""

import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

import storage
from storage.claims import claim, expire, list_workers
from storage.database import Database
from storage.errors import SchemaTooNew
from storage.integrity import check_integrity
from storage.jobs import get_job
from storage.migrations import config, upgrade
from storage.results import stream_outputs
from storage.schema import HEAD, REVISIONS, metadata
from storage.sqlite import install_events
from tests.storage.factories import make_job, make_worker


def schema(path: Path) -> dict[str, list[str]]:
    connection = sqlite3.connect(path)
    rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    connection.close()
    # SQLite quotes the name of a table that was rebuilt.
    return {name: sorted(part.strip().rstrip(",").replace('"', "") for part in sql.splitlines()) for name, sql in rows}


def migrated(path: Path, to: str = "head") -> Path:
    engine = create_engine(f"sqlite:///{path}")
    install_events(engine, path, busy_timeout_s=1.0, foreign_keys=False)
    with engine.connect() as connection, connection.begin():
        upgrade(connection, to)
    engine.dispose()
    return path


def test_the_listed_revisions_are_the_files() -> None:
    script = ScriptDirectory.from_config(config())
    assert tuple(s.revision for s in reversed(list(script.walk_revisions()))) == REVISIONS


def test_create_all_and_the_migrations_agree(tmp_path: Path) -> None:
    Database.open(str(tmp_path / "made.db")).close()
    assert schema(tmp_path / "made.db") == schema(migrated(tmp_path / "migrated.db"))


FIRST_VERSION = (
    "INSERT INTO jobs VALUES (7, 1.0, 2.0, NULL, 1.0, 'running', TRUE, 'opt', 'generate', "
    '\'{"max_new_tokens":7,"dataset":"/data/reviews.jsonl"}\', 3, 0, \'default\', 2, 1, 0, 5, 6, NULL)',
    "INSERT INTO workers VALUES (4, 'here', 1, 'default', 'cpu', NULL, 1, 1, 61, NULL, 'idle')",
    "INSERT INTO requests VALUES (7, 0, '\"a\"', '{\"prompt\":\"x\"}', 'done', NULL, 1)",
    "INSERT INTO requests VALUES (7, 1, NULL, '{\"prompt\":\"y\"}', 'claimed', 4, 2)",
    "INSERT INTO outputs VALUES (7, 0, 'ok', '{\"text\":\"z\"}', NULL, NULL, 5, 6, 3.0)",
)
"""A job in the middle, as that version stored it."""


def test_a_database_of_the_first_version_keeps_its_jobs(empty: str) -> None:
    if "://" in empty:
        engine = create_engine(empty)
    else:
        Path(empty).parent.mkdir()
        engine = create_engine(f"sqlite:///{migrated(Path(empty), to='0001')}")
    with engine.begin() as connection:
        if "://" in empty:
            upgrade(connection, "0001")
        for statement in FIRST_VERSION:
            connection.exec_driver_sql(statement)
        if "://" in empty:
            connection.exec_driver_sql("SELECT setval('workers_id_seq', 4)")
    engine.dispose()
    with Database.open(empty) as db:
        job = get_job(db, 7)
        assert (job.params, job.origin) == ({"max_new_tokens": 7}, {"dataset": "/data/reviews.jsonl"})
        assert (job.plan, job.name, job.num_done) == (None, None, 1)
        assert [(row.row_id, row.output) for row in stream_outputs(db, 7)] == [("a", {"text": "z"})]
        assert [(worker.id, worker.message, worker.retry_at) for worker in list_workers(db)] == [(4, None, None)]
        check_integrity(db)
        # The row that a worker of the old version was at is another's to finish.
        assert expire(db, now=99.0) == 1
        (claimed,) = claim(db, make_worker(db, now=99.0), 7, 5, now=99.0)
        assert (claimed.index, claimed.payload, claimed.attempt) == (1, {"prompt": "y"}, 3)


def test_autogenerate_finds_nothing(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{migrated(tmp_path / 'migrated.db')}")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_a_migrated_database_opens_and_works(tmp_path: Path) -> None:
    with Database.open(str(migrated(tmp_path / "migrated.db"))) as db:
        assert get_job(db, make_job(db)).num_requests == 3
        check_integrity(db)


LATER = f"{int(HEAD) + 1:04}"
REVISION = '''
"""A revision of a later overnight."""
import sqlalchemy as sa
from alembic import op
revision, down_revision, branch_labels, depends_on = "{later}", "{head}", None, None
def upgrade():
    op.create_table("notes", sa.Column("id", sa.Integer, primary_key=True))
    with op.batch_alter_table("jobs") as batch:  # rebuilds a table that others refer to
        batch.add_column(sa.Column("label", sa.Text, server_default="none"))
    {last}
'''
OPEN = """
import sys
from pathlib import Path
import storage.database
assert Path(storage.database.__file__).is_relative_to(sys.argv[2])
with storage.database.Database.open(sys.argv[1]) as db:
    with db.read() as connection:
        print(connection.exec_driver_sql("SELECT id, label FROM jobs").all())
    assert "alembic" in sys.modules
"""


def later_overnight(tmp_path: Path, last: str) -> Path:
    """A copy of the package, away from the checkout, with one revision more."""
    site = tmp_path / "site"
    shutil.copytree(Path(storage.__file__).parent, site / "storage", ignore=shutil.ignore_patterns("__pycache__"))
    revision = REVISION.format(later=LATER, head=HEAD, last=last)
    (site / f"storage/migrations/versions/{LATER}_later.py").write_text(revision)
    text = (site / "storage/schema.py").read_text()
    listed = "REVISIONS = " + json.dumps(REVISIONS).replace("[", "(").replace("]", ")")
    assert listed in text
    (site / "storage/schema.py").write_text(text.replace(listed, f'{listed[:-1]}, "{LATER}")'))
    return site


def open_with(site: Path, path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", OPEN, str(path), str(site)]
    return subprocess.run(command, cwd=site, env={"PYTHONPATH": str(site)}, capture_output=True, text=True)


def test_a_later_overnight_upgrades_and_this_one_then_refuses(db: Database, path: Path, tmp_path: Path) -> None:
    job_id = make_job(db)
    run = open_with(later_overnight(tmp_path, "pass"), path)
    assert (run.returncode, run.stdout) == (0, f"[({job_id}, 'none')]\n"), run.stderr
    with pytest.raises(SchemaTooNew, match=f"has schema {LATER}"):
        Database.open(str(path))


def test_an_upgrade_that_fails_changes_nothing(db: Database, path: Path, tmp_path: Path) -> None:
    job_id, before = make_job(db), schema(path)
    run = open_with(later_overnight(tmp_path, "raise RuntimeError('power cut')"), path)
    assert run.returncode == 1
    assert "power cut" in run.stderr
    assert schema(path) == before
    with Database.open(str(path)) as again:
        assert get_job(again, job_id).num_requests == 3
