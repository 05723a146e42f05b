"""What a model, a dataset or a name wrote never commands the terminal it is shown on."""

import csv
import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cli.display import emit_json, emit_table, some_of
from storage.claims import claim, register_worker, stop_worker
from storage.database import Database
from storage.jobs import NewJob, NewRequest, create_job
from storage.results import RequestResult, record
from tests.cli.conftest import ROOT, Run
from worker.printable import printable

EVIL = "e\x1b[2Jv\x9b1mi\u202el\x07"
SPELT = r"e\u001b[2Jv\u009b1mi\u202el\u0007"
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def shown_on_a_terminal(*words: str) -> str:
    """All that the command writes to a terminal, stdout and stderr, its line ends as the command wrote them."""
    ours, theirs = pty.openpty()
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "cli", *words], env=environ, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    content = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        content += piece
    os.close(ours)
    process.wait(timeout=60)
    return content.decode().replace("\r\n", "\n")


@pytest.fixture
def job(home: Path) -> int:
    """A done job whose model, id and output, and the worker, would command a terminal."""
    home.mkdir()
    with Database.open(f"sqlite:///{home / 'overnight.db'}") as db:
        new = NewJob(model=f"/models/{EVIL}", task="generate", params={}, seed=0, priority=0, queue="default")
        job_id = create_job(db, new, iter([NewRequest(index=0, row_id=EVIL, payload={"prompt": "p"})]), now=1.0)
        worker = register_worker(db, hostname=EVIL, pid=1, queue="default", device="cpu", now=1000.0, lease_s=60)
        (row,) = claim(db, worker, job_id, 1, now=1001.0)
        output = {"text": EVIL, "finish_reason": "stop"}
        record(db, worker, [RequestResult(job_id, 0, row.attempt, output, None, 1, 1)], None, now=1002.0)
        stop_worker(db, worker, now=1003.0)
    return job_id


def test_printable_spells_out_what_commands_and_nothing_else() -> None:
    assert printable(EVIL) == SPELT
    assert printable("\udc80\n\t\r", keep="\n") == "\\udc80\n\\u0009\\u000d"
    assert printable("é ｅ \u200d 👍 \\u001b") == "é ｅ \u200d 👍 \\u001b"


@pytest.mark.parametrize("words", [("status",), ("status", "1"), ("status", "--json"), ("status", "1", "--json")])
def test_status_shows_a_models_name_spelt_out(job: int, words: tuple[str, ...]) -> None:
    screen = shown_on_a_terminal(*words)
    assert SPELT in screen
    assert not UNSAFE.search(screen)


@pytest.mark.parametrize("file_format", ["jsonl", "csv"])
def test_outputs_are_spelt_out_on_a_terminal_and_exact_elsewhere(job: int, run: Run, file_format: str) -> None:
    screen = shown_on_a_terminal("fetch", str(job), "--format", file_format)
    assert screen.count(SPELT) == 2  # the id and the text
    assert not UNSAFE.search(screen)
    piped = run("fetch", str(job), "--format", file_format).stdout_bytes.decode()
    if file_format == "csv":
        assert next(csv.DictReader(io.StringIO(piped)))["text"] == EVIL
    else:
        assert json.loads(screen) == json.loads(piped)
        assert json.loads(piped)["output"]["text"] == EVIL
        assert "\x9b" in piped


@pytest.mark.parametrize("faulty", ["field", "model"])
def test_a_fields_name_in_an_error_and_a_models_are_spelt_out(home: Path, model: str, faulty: str) -> None:
    Path("d.jsonl").write_text(json.dumps({EVIL: 1}) + "\n")
    name = model if faulty == "field" else EVIL
    screen = shown_on_a_terminal("enqueue", "d.jsonl", "--task", "generate", "--model", name)
    assert screen.startswith("error: ")
    assert not UNSAFE.search(screen)
    assert "2Jv" in screen


def test_names_in_a_message_are_few_and_short() -> None:
    assert some_of([]) == "none"
    assert some_of(["a", "b"]) == "a, b"
    assert some_of("x" * 100 for _ in range(10**6)) == ", ".join([*["x" * 39 + "…"] * 10, "…"])


def test_a_table_stays_in_its_columns_whatever_the_cells_hold(capsys: pytest.CaptureFixture[str]) -> None:
    emit_table(("A", "B"), [("1\n2", EVIL), ("3", "4")])
    lines = capsys.readouterr().out.splitlines()
    assert [len(lines), lines[1]] == [3, rf"1\u000a2  {SPELT}"]


def test_json_is_valid_also_where_an_older_database_holds_infinities(
    capsysbinary: pytest.CaptureFixture[bytes],
) -> None:
    emit_json({"id": float("inf"), "more": [float("nan"), 1.5], "name": EVIL})
    out = capsysbinary.readouterr().out.decode()

    def never(name: str) -> None:
        raise AssertionError(name)

    assert json.loads(out, parse_constant=never) == {"id": "Infinity", "more": ["NaN", 1.5], "name": EVIL}
