import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from storage.claims import register_worker, stop_worker
from storage.database import Database
from storage.jobs import cancel_job
from tests.cli.conftest import Run, work, write_rows


@pytest.fixture
def old_job(with_redis: Path, run: Run, model: str) -> int:
    """Done in 1970, as `work` has it."""
    dataset = write_rows(Path("d.jsonl"), *({"prompt": "a" * 2000} for _ in range(300)))
    job_id = int(run("enqueue", dataset, "--model", model, "--task", "generate").stdout)
    work(with_redis, job_id)
    return job_id


def test_old_jobs_go_and_the_file_is_smaller(home: Path, run: Run, old_job: int, model: str) -> None:
    young = int(run("enqueue", "d.jsonl", "--model", model, "--task", "generate").stdout)
    database = home / "overnight.db"
    with Database.open(str(database)) as db:
        cancel_job(db, young, now=time.time())
    size = database.stat().st_size
    tried = run("prune", "--dry-run")
    assert (tried.exit_code, tried.stdout) == (0, "")
    assert f"would prune 1 job ({old_job}) with 300 requests" in tried.stderr
    assert database.stat().st_size == size
    done = run("prune")
    assert (done.exit_code, done.stdout) == (0, "")
    assert f"pruned 1 job ({old_job}) with 300 requests" in done.stderr
    assert "less than before" in done.stderr
    assert database.stat().st_size < size
    assert run("fetch", str(old_job)).exit_code == 3
    assert run("status", str(young)).exit_code == 0
    assert run("prune", "--older-than", "0m").exit_code == 0
    assert run("status", str(young)).exit_code == 3


def test_machines_get_one_document(home: Path, run: Run, old_job: int) -> None:
    size = (home / "overnight.db").stat().st_size
    tried = json.loads(run("prune", "--json", "--dry-run").stdout)
    done = json.loads(run("prune", "--json").stdout)
    assert (tried.pop("dry_run"), done.pop("dry_run")) == (True, False)
    assert tried.pop("bytes") == {"before": size, "after": size, "free": 0}
    space = done.pop("bytes")
    assert space == {"before": size, "after": (home / "overnight.db").stat().st_size, "free": 0}
    assert space["after"] < size
    assert done.pop("before") == pytest.approx(tried.pop("before"), abs=60)
    assert done == tried == {"jobs": [old_job], "requests": 300, "passes": 0, "workers": 1, "faults": 0}


def test_without_a_database_there_is_nothing_to_do(home: Path, run: Run) -> None:
    assert run("prune").exit_code == 0
    assert json.loads(run("prune", "--json").stdout)["bytes"] is None
    assert not home.exists()


@pytest.mark.parametrize("age", ["7", "d", "-1d", "1.5h", "7 days", "1y", ""])
def test_an_age_that_is_none_is_refused_by_name(home: Path, run: Run, age: str) -> None:
    done = run("prune", "--older-than", age)
    assert done.exit_code == 2
    assert "--older-than" in done.stderr
    assert "7d" in done.stderr


def test_an_old_file_is_left_whole_while_a_worker_is_alive_and_says_how(home: Path, run: Run, old_job: int) -> None:
    database = home / "overnight.db"
    with closing(sqlite3.connect(database, isolation_level=None)) as older:
        older.execute("PRAGMA auto_vacuum = NONE")
        older.execute("VACUUM")
    size = database.stat().st_size
    with Database.open(str(database)) as db:
        worker = register_worker(db, hostname="h", pid=1, queue="q", device="cpu", now=time.time(), lease_s=3600)
    done = run("prune")
    assert database.stat().st_size == size
    assert "are free for new jobs" in done.stderr
    assert "overnight prune --compact" in done.stderr
    with Database.open(str(database)) as db:
        stop_worker(db, worker, now=time.time())
    assert "less than before" in run("prune").stderr
    assert database.stat().st_size < size
