"""What once hung, killed or failed a queue, all of it in one queue and before one worker; what waits behind it drains.

(What one command says to one mistake is in tests/cli/test_hostile_input.py; what may come through Redis, in
test_worker_process.py; rows and models that kill their worker, in test_crash_loops.py.)
"""

import json
import shutil
import signal
from pathlib import Path

from sqlalchemy import Text, type_coerce, update

from storage.schema import requests
from tests.e2e.conftest import Station, wait_until
from tests.engine.test_checks import DAMAGES

DAMAGED = (
    "one layer more in the manifest",
    "a layer under another name",
    "the head under another name",
    "a vocabulary of 10**12",
    "a billion positions",
    "an added token beyond the vocabulary",
)
"""Of the engine's table, those that once ended the worker."""


def deep_rows(station: Station, model: Path) -> int:
    """As an earlier version stored them: an id and a payload that no JSON reader gets through."""
    job_id = station.enqueue(model, 3)
    deep = "[" * 972 + "]" * 972
    with station.database.write() as connection:
        row = (requests.c.job_id == job_id, requests.c.index == 1)
        values = {"row_id": type_coerce(deep, Text), "payload": type_coerce(deep * 40, Text)}
        connection.execute(update(requests).where(*row).values(values))
    return job_id


def test_what_waits_behind_all_of_it_drains(station: Station, tiny_model: Path, tmp_path: Path) -> None:
    bad: dict[str, int] = {}
    for number, (name, damage) in enumerate((name, DAMAGES[name]) for name in DAMAGED):
        folder = tmp_path / f"damaged-{number}"
        shutil.copytree(tiny_model, folder)
        damage(folder)
        bad[name] = station.enqueue(folder, 3)
    absent = station.enqueue(tmp_path / "absent", 3)
    deep = deep_rows(station, tiny_model)
    good = station.enqueue(tiny_model, 30)

    worker = station.start_worker(scan_s=0.2)
    elsewhere = tmp_path / "no-models"
    elsewhere.mkdir()
    poor = station.start_worker("--device-memory", "100KiB", scan_s=0.2, models=elsewhere)
    assert station.wait_done(good).num_done == 30
    assert station.wait_done(deep).num_failed == 1
    for name, job_id in bad.items():
        job = station.wait_done(job_id)
        assert job.state == "failed", name
        assert job.message, name
        assert "\n" not in job.message, name
    assert [row.error_code for row in station.errors(deep)] == ["invalid_request"]
    assert station.job(absent).state == "queued", "another machine may have the model"
    wait_until(
        "the workers to say what they leave alone",
        lambda: any(each.state == "waiting" and "absent" in str(each.message) for each in station.workers()),
    )
    shown = station.cli("status")
    assert shown.returncode == 0
    assert "alone until" in shown.stdout + shown.stderr
    for each in (worker, poor):
        assert each.process.poll() is None, each.log
        assert each.signal(signal.SIGTERM) == 0
        assert "Traceback" not in each.log


def test_cancel_and_retry_at_once_hang_nothing(station: Station, tiny_model: Path) -> None:
    job_id = station.enqueue(tiny_model, 240, max_new_tokens=100)
    undisturbed = station.enqueue(tiny_model, 240, max_new_tokens=100)
    worker = station.start_worker(scan_s=0.2)
    for _ in range(3):
        with station.stopped_in_the_middle(worker, job_id):
            assert station.cli("cancel", job_id).returncode == 0
            assert station.cli("retry", job_id).returncode == 0
    assert station.wait_done(job_id).num_done == 240
    assert station.wait_done(undisturbed).num_done == 240
    assert station.texts(job_id) == station.texts(undisturbed)
    assert worker.signal(signal.SIGTERM) == 0


def test_a_database_that_is_locked_for_long_is_waited_for(station: Station, tiny_model: Path) -> None:
    """For longer than one statement waits, and than the worker's lease."""
    job_id = station.enqueue(tiny_model, 400, max_new_tokens=60)
    worker = station.start_worker(scan_s=0.2, lease_s=2)
    with station.caught_in_the_middle(job_id):
        wait_until("the worker to wait", lambda: "waiting for the database" in worker.log)
    job = station.wait_done(job_id)
    assert (job.num_done, job.num_failed) == (400, 0)
    assert worker.process.poll() is None
    assert worker.signal(signal.SIGTERM) == 0


def choose(station: Station, model: Path, *prompt: str) -> list[object]:
    rows = "".join(json.dumps({"text": text}) + "\n" for text in ("ab", "cd", "abcabc"))
    ran = station.cli("enqueue", "-", "--model", model, "--task", "choose", "--choices", "x,yz", *prompt, stdin=rows)
    assert ran.returncode == 0, ran.stderr
    return [output for _, output in station.texts(station.wait_done(int(ran.stdout)).id)]


def test_a_prompt_file_as_an_editor_saves_it_gives_the_labels_of_its_text(
    station: Station, tiny_model: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "prompt.txt"
    saved.write_text("Review: {{ text }}\nSentiment:\n")
    station.start_worker(scan_s=0.2)
    by_file = choose(station, tiny_model, "--prompt", f"@{saved}")
    assert by_file == choose(station, tiny_model, "--prompt", "Review: {{ text }}\nSentiment:")


def test_an_end_that_nobody_asked_for_is_never_exit_code_0(station: Station) -> None:
    path = station.home / "other.db"
    path.write_bytes(b"no database at all" * 100)
    assert station.cli("worker", "--database", path).returncode == 4
