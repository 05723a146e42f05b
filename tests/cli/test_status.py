import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.plans import plan_in_words
from storage.claims import Doing, heartbeat, register_worker, stop_worker
from storage.database import Database
from storage.faults import note_fault
from storage.jobs import fail_job, note_plan
from tests.cli.conftest import ROOT, Command, Run, work, write_rows
from worker.presence import host_name, process_of


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
        "id", "name", "state", "message", "model", "task", "exact", "dataset", "prompt", "choices", "plan", "formats",
        "created_at", "started_at", "finished_at", "requests", "tokens", "seconds", "throughput", "eta_s",
    ]  # fmt: skip
    assert document["state"] == "running"
    assert document["requests"] == {"total": 4, "done": 2, "failed": 0}
    assert document["tokens"] == {"prompt": 6, "generated": 4}
    assert set(document["throughput"]) == {"generated_per_s", "total_per_s"}
    assert (document["dataset"], document["prompt"]) == (str(Path("d.jsonl").resolve()), "{{ prompt }}")
    assert (document["name"], document["choices"], document["message"], document["plan"]) == (None, None, None, None)
    assert document["eta_s"] is None  # nobody works on it


def test_all_jobs_newest_first_with_the_live_workers(home: Path, run: Run, job: int, model: str) -> None:
    second = int(run("enqueue", "d.jsonl", "--model", model, "--task", "generate").stdout)
    document = json.loads(run("status", "--json").stdout)
    assert [entry["id"] for entry in document["jobs"]] == [second, job]
    assert document["workers"] == []  # the one that worked has stopped


@pytest.fixture
def worker(home: Path, job: int) -> Iterator[tuple[Database, int]]:
    """A registered worker: this process."""
    with Database.open(str(home / "overnight.db")) as database:
        number = register_worker(
            database, hostname=host_name(), pid=os.getpid(), queue="default", device="cpu", now=time.time(),
            lease_s=600.0, process=process_of(os.getpid()),
        )  # fmt: skip
        yield database, number
        stop_worker(database, number, now=time.time())


def test_a_worker_says_what_it_waits_for(run: Run, worker: tuple[Database, int]) -> None:
    database, number = worker
    doing = Doing("waiting", "m", "the model 'm' is not here", time.time() + 250.5)
    heartbeat(database, number, now=time.time(), lease_s=600.0, doing=doing)
    for _ in range(2):
        note_fault(database, host_name(), "m", "no room", now=time.time(), waits_s=[60.0])
    note_fault(database, "another machine", "m", "no room", now=time.time(), waits_s=[60.0])
    (document,) = json.loads(run("status", "--json").stdout)["workers"]
    assert list(document) == [
        "id", "hostname", "pid", "queue", "device", "model", "state", "message", "retry_at", "crashes", "started_at",
        "heartbeat_at",
    ]  # fmt: skip
    assert (document["message"], document["retry_at"], document["crashes"]) == (doing.message, doing.retry_at, 2)
    assert f"worker {number}: the model 'm' is not here (tries again in 4 min 10 s)" in run("status").stdout


def test_a_name_a_dataset_an_age_and_a_priority_are_in_the_table(run: Run, job: int, model: str) -> None:
    assert "NAME" not in run("status").stdout
    words = ("--model", model, "--task", "generate", "--name", "night run", "--priority", "3")
    assert run("enqueue", "d.jsonl", *words).exit_code == 0
    heading, named, nameless = run("status").stdout.splitlines()[:3]
    assert " ".join(heading.split()) == "JOB NAME STATE DONE FAILED TOTAL PRIORITY AGE TASK DATASET MODEL"
    assert re.fullmatch(rf"2\s+night run\s+queued\s+0\s+0\s+4\s+3\s+\d+ s\s+generate\s+d\.jsonl\s+{model}", named)
    assert nameless.split()[:3] == ["1", "-", "queued"]


@pytest.mark.parametrize("name", ["", " ", "two\nlines", "\x1b[2J"])
def test_a_name_is_one_line_of_text(run: Run, job: int, model: str, name: str) -> None:
    done = run("enqueue", "d.jsonl", "--model", model, "--task", "generate", "--name", name)
    assert (done.exit_code, "--name" in done.stderr) == (2, True)


def test_one_job_tells_what_it_was_made_from_and_where_it_lies(home: Path, run: Run, job: int, model: str) -> None:
    prompt = "Review: {{ prompt }}\n" + "x" * 150 + "\nthree\nfour:"
    words = ("--task", "choose", "--choices", "good,bad", "--prompt", prompt, "--name", "films")
    second = int(run("enqueue", "d.jsonl", "--model", model, *words).stdout)
    plan = {
        "device": "cuda:0", "dtype": "float16", "layers": {"device": 10, "host": 0, "disk": 14}, "micro_batch": 2048,
        "kv_bytes": {"device": 3 * 2**30, "host": 2**29, "disk": 0}, "micro_batches": 4,
    }  # fmt: skip
    with Database.open(str(home / "overnight.db")) as database:
        note_plan(database, second, plan)
        fail_job(database, second, "the disk is gone", now=time.time())
    shown = run("status", str(second)).stdout
    lines = dict(line.split(":", 1) for line in shown.splitlines() if not line.startswith(" "))
    assert lines["name"].strip() == "films"
    assert lines["state"].strip() == "failed: the disk is gone"
    assert lines["choices"].strip() == "good, bad"
    assert lines["dataset"].strip() == str(Path("d.jsonl").resolve())
    assert lines["plan"].strip() == (
        "10 of 24 layers on the device, 14 on disk; KV cache up to 3.0 GiB on the device, up to 512.0 MiB in host "
        "memory; float16; 4 x 2,048 tokens a pass"
    )
    assert f"prompt:     Review: {{{{ prompt }}}}\n            {'x' * 99}…\n            three\n            …\n" in shown
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d", lines["finished"].strip())
    assert "started" not in lines
    document = json.loads(run("status", str(second), "--json").stdout)
    assert (document["message"], document["plan"], document["name"]) == ("the disk is gone", plan, "films")
    assert (document["prompt"], document["choices"]) == (prompt, ["good", "bad"])


def test_on_a_cpu_all_memory_is_memory() -> None:
    plan = {
        "device": "cpu", "dtype": "float32", "layers": {"device": 2, "host": 1, "disk": 0}, "micro_batch": 8,
        "kv_bytes": {"device": 2**20, "host": 2**20, "disk": 2**10}, "micro_batches": 1,
    }  # fmt: skip
    assert plan_in_words(plan) == (
        "all 3 layers in memory; KV cache up to 2.0 MiB in memory, up to 1.0 KiB on disk; float32; 1 x 8 tokens a pass"
    )


def test_a_job_of_choices_tells_rows_and_all_tokens(home: Path, run: Run, job: int, model: str) -> None:
    second = int(run("enqueue", "d.jsonl", "--model", model, "--task", "choose", "--choices", "a,b").stdout)
    for each in (job, second):
        work(home, each)
    assert re.search(r"throughput: +4 tokens/s generated, 10 tokens/s\b", run("status", str(job)).stdout)
    assert re.search(r"throughput: +2 rows/s, 10 tokens/s$", run("status", str(second)).stdout, re.MULTILINE)


def test_a_table_never_cuts_an_id_or_a_path(home: Path, run: Run, job: int, model: str) -> None:
    done = run("status")
    assert model in done.stdout
    assert "no worker is running" in done.stderr


def test_status_of_a_queued_job_says_how_to_start_a_worker(home: Path, run: Run, job: int) -> None:
    done = run("status", str(job))
    assert done.exit_code == 0
    assert "overnight worker" in done.stderr


def watching(home: Path, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "cli", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("verb", ["status", "wait"])
def test_who_waits_sees_that_the_worker_has_died_and_leaves_quietly(home: Path, run: Run, job: int, verb: str) -> None:
    work(home, job, limit=2)
    sleeper = subprocess.Popen(["sleep", "600"])
    with Database.open(str(home / "overnight.db")) as database:
        number = register_worker(
            database, hostname=host_name(), pid=sleeper.pid, queue="default", device="cpu", now=time.time(),
            lease_s=600.0, process=process_of(sleeper.pid),
        )  # fmt: skip
        heartbeat(database, number, now=time.time(), lease_s=600.0, doing=Doing("loading"))
    process = watching(home, verb, str(job), *(["--watch"] if verb == "status" else []))
    impatience = threading.Timer(60.0, process.kill)  # so that a missing line fails the test and does not hang it
    impatience.start()
    try:
        assert process.stderr is not None
        first = process.stderr.readline() if verb == "status" else ""
        assert first in ("", f"job {job} running: 50% | 2/4 requests | loading the model\n")
        sleeper.kill()
        sleeper.wait()
        said = process.stderr.readline()
        assert said.startswith("no worker is running for the queue 'default'; start one")
        if verb == "status":
            assert process.stderr.readline() == f"job {job} running: 50% | 2/4 requests | no worker is running\n"
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=30)
    finally:
        impatience.cancel()
        sleeper.kill()
        process.kill()
        process.wait()
    assert (process.returncode, out) == (130, "")
    assert rest.strip() == ("" if verb == "status" else "error: interrupted")


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
