import json
from pathlib import Path

import pytest

from tests.cli.conftest import Command, Run, work, write_rows


@pytest.fixture
def job(with_redis: Path, run: Run, model: str) -> int:
    dataset = write_rows(Path("d.jsonl"), *({"id": i, "prompt": "a"} for i in range(4)))
    return int(run("enqueue", dataset, "--model", model, "--task", "generate").stdout)


def test_nothing_there_is_fine_and_leaves_nothing_behind(home: Path, run: Run) -> None:
    done = run("status", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout) == {"jobs": [], "workers": []}
    assert run("status").exit_code == 0
    assert run("status", "--watch").exit_code == 0
    assert not home.exists()


def test_no_heavy_module_is_loaded(home: Path, command: Command) -> None:
    (home).mkdir()
    done = command("status", "--json", "--database", "x.db", environ={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "click" in imported
    heavy = {"torch", "transformers", "numpy", "celery", "redis", "kombu", "rich", "jinja2", "alembic", "tokenizers"}
    assert imported & heavy == set()


@pytest.mark.parametrize("verb", ["status", "wait", "fetch", "cancel", "retry"])
def test_an_unknown_job_is_absent_with_and_without_a_database(home: Path, run: Run, verb: str, job: int) -> None:
    assert run(verb, "77").exit_code == 3
    done = run(verb, "77", "--database", "none.db")
    assert done.exit_code == 3
    assert "77" in done.stderr
    assert not Path("none.db").exists()


@pytest.mark.parametrize("word", ["0", "-1", "x", "1.5", str(2**63)])
def test_a_job_that_is_no_number_is_usage(home: Path, run: Run, word: str) -> None:
    assert run("status", word).exit_code == 2


def test_one_job_has_exactly_the_fields_of_the_contract(home: Path, run: Run, job: int) -> None:
    work(home, job, limit=2)
    document = json.loads(run("status", str(job), "--json").stdout)
    assert list(document) == [
        "id", "state", "model", "task", "requests", "tokens", "seconds", "throughput", "eta_s",
    ]  # fmt: skip
    assert document["state"] == "running"
    assert document["requests"] == {"total": 4, "done": 2, "failed": 0}
    assert document["tokens"] == {"prompt": 6, "generated": 4}
    assert set(document["throughput"]) == {"generated_per_s", "total_per_s"}


def test_all_jobs_newest_first_with_the_live_workers(home: Path, run: Run, job: int, model: str) -> None:
    second = int(run("enqueue", "d.jsonl", "--model", model, "--task", "generate").stdout)
    document = json.loads(run("status", "--json").stdout)
    assert [entry["id"] for entry in document["jobs"]] == [second, job]
    assert document["workers"] == []  # the one that worked has stopped


def test_a_table_never_cuts_an_id_or_a_path(home: Path, run: Run, job: int, model: str) -> None:
    done = run("status")
    assert model in done.stdout
    assert "no worker is running" in done.stderr


def test_status_of_a_queued_job_says_how_to_start_a_worker(home: Path, run: Run, job: int) -> None:
    done = run("status", str(job))
    assert done.exit_code == 0
    assert "overnight worker" in done.stderr


def test_watch_follows_to_the_end_off_a_terminal_in_plain_lines(home: Path, run: Run, job: int) -> None:
    work(home, job)
    done = run("status", str(job), "--watch")
    assert done.exit_code == 0
    assert "done: 100% | 4/4 requests" in done.stderr
    assert "\x1b" not in done.stderr + done.stdout


@pytest.mark.parametrize(("failing", "code"), [(frozenset(), 0), (frozenset({1}), 1)])
def test_wait_ends_with_the_jobs_outcome(home: Path, run: Run, job: int, failing: frozenset[int], code: int) -> None:
    work(home, job, failing=failing)
    done = run("wait", str(job))
    assert done.exit_code == code
    assert done.stdout == ""
    assert f"overnight fetch {job}" in done.stderr


def test_cancel_keeps_outputs_and_retry_takes_it_up_again(home: Path, run: Run, job: int) -> None:
    work(home, job, limit=1)
    assert run("cancel", str(job)).exit_code == 0
    assert run("wait", str(job)).exit_code == 1
    assert len(run("fetch", str(job)).stdout.splitlines()) == 1
    again = run("cancel", str(job))
    assert (again.exit_code, "already cancelled" in again.stderr) == (2, True)
    assert run("retry", str(job)).exit_code == 0
    work(home, job)
    assert run("wait", str(job)).exit_code == 0
    assert run("retry", str(job)).exit_code == 2


def test_retry_rings_no_bell_that_is_off_but_queues_the_job(home: Path, run: Run, job: int) -> None:
    work(home, job, failing=frozenset({0}))
    done = run("--redis", "redis://127.0.0.1:1", "retry", str(job))
    assert done.exit_code == 0
    assert json.loads(run("status", str(job), "--json").stdout)["state"] == "queued"
