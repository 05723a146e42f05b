import io
import re
import sqlite3
import sys
from pathlib import Path

import pytest

from cli.progress import LineProgress, Pace, Sample, Snapshot, follow, job_progress, progress_line
from cli.reports import eta_of, job_document, outcome_of, seconds_of
from cli.workers import Attendance
from storage.database import Database
from storage.jobs import Job, JobState, NewJob, NewRequest, create_job


def make_job(**changes: object) -> Job:
    values: dict[str, object] = {
        "id": 7, "created_at": 90.0, "started_at": 100.0, "finished_at": None, "state": JobState.RUNNING, "model": "m",
        "task": "generate", "params": {}, "seed": 0, "priority": 0, "queue": "default", "num_requests": 100,
        "num_done": 30, "num_failed": 10, "prompt_tokens": 400, "generated_tokens": 100, "message": None,
        "plan": None, "name": None, "origin": None,
    }  # fmt: skip
    return Job(**{**values, **changes})  # type: ignore[arg-type]


def test_a_job_document_has_the_shape_and_the_sums_of_the_contract() -> None:
    assert job_document(make_job(), now=110.0) == {
        "id": 7,
        "name": None,
        "state": "running",
        "message": None,
        "model": "m",
        "task": "generate",
        "exact": False,
        "dataset": None,
        "prompt": None,
        "choices": None,
        "plan": None,
        "formats": None,
        "created_at": 90.0,
        "started_at": 100.0,
        "finished_at": None,
        "requests": {"total": 100, "done": 30, "failed": 10},
        "tokens": {"prompt": 400, "generated": 100},
        "seconds": 10.0,
        "throughput": {"generated_per_s": 10.0, "total_per_s": 50.0},
        "eta_s": 15.0,
    }


@pytest.mark.parametrize(
    ("plan", "formats"),
    [
        ({"dtype": "float16"}, {"weights": "plain", "kv": "plain", "dtype": "float16"}),  # of a version before
        (
            {"dtype": "bfloat16", "weight_format": "int4", "kv_format": "plain"},
            {"weights": "int4", "kv": "plain", "dtype": "bfloat16"},
        ),
    ],
)
def test_the_formats_that_a_job_ran_under_are_its_plans(plan: dict[str, str], formats: dict[str, str]) -> None:
    assert job_document(make_job(plan=plan), now=110.0)["formats"] == formats


def test_a_finished_job_no_longer_depends_on_the_clock() -> None:
    job = make_job(state=JobState.DONE, finished_at=104.0)
    assert job_document(job, now=110.0) == job_document(job, now=99999.0)
    assert eta_of(job, 110.0) == 0.0


def test_a_job_that_has_not_begun_has_no_speed_and_no_estimate() -> None:
    job = make_job(
        state=JobState.QUEUED, started_at=None, num_done=0, num_failed=0, prompt_tokens=0, generated_tokens=0
    )
    document = job_document(job, now=110.0)
    assert (seconds_of(job, 110.0), document["throughput"]["total_per_s"], document["eta_s"]) == (0.0, 0.0, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"state": JobState.DONE, "num_failed": 0}, None),
        ({"state": JobState.DONE}, "10 failed requests"),
        ({"state": JobState.FAILED, "message": "no model"}, "no model"),
        ({"state": JobState.CANCELLED}, "cancelled"),
    ],
)
def test_an_outcome_says_what_happened_and_what_to_do(changes: dict[str, object], words: str | None) -> None:
    outcome = outcome_of(make_job(**changes))
    if words is None:
        assert outcome is None
    else:
        assert outcome is not None
        assert words in outcome
        assert "overnight " in outcome


def test_the_pace_forgets_what_is_long_ago() -> None:
    pace = Pace()
    pace.add(Sample(now=0.0, ended=0, tokens=0))
    assert pace.tokens_per_s == 0.0
    assert pace.eta_s(100) is None
    for second in range(100, 131, 5):
        pace.add(Sample(now=float(second), ended=second - 100, tokens=10 * (second - 100)))
    assert pace.tokens_per_s == pytest.approx(10.0)
    assert pace.eta_s(100) == pytest.approx(70.0)


def test_off_a_terminal_a_line_comes_every_few_seconds_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    progress = LineProgress()
    for now in range(1000, 1012):
        progress.update(Snapshot(make_job(num_done=now - 1000, num_failed=0)), float(now))
    progress.update(Snapshot(make_job(state=JobState.DONE, num_done=100, num_failed=0)), 1012.0)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.split(" | ")[1] for line in captured.err.splitlines()] == [
        "0/100 requests", "5/100 requests", "10/100 requests", "100/100 requests",
    ]  # fmt: skip
    assert "\x1b" not in captured.err


def test_a_progress_line_names_failures_speed_and_time_left() -> None:
    pace = Pace()
    pace.add(Sample(0.0, 0, 0))
    pace.add(Sample(10.0, 40, 500))
    assert progress_line(Snapshot(make_job()), pace) == (
        "job 7 running: 40% | 40/100 requests | 10 failed | 50 tokens/s | 15 s left"
    )
    assert progress_line(Snapshot(make_job(task="choose")), pace) == (
        "job 7 running: 40% | 40/100 requests | 10 failed | 4 rows/s | 50 tokens/s | 15 s left"
    )


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
def test_a_bar_never_cuts_the_count_of_rows(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for name, value in (("COLUMNS", str(columns)), ("TERM", "xterm"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    with job_progress("job 7") as progress:
        for now, done in ((0.0, 0), (10.0, 345_678)):
            progress.update(Snapshot(make_job(task="choose", num_requests=1_000_000, num_done=done)), now)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).replace("\r", "\n")
    last = [line for line in shown.splitlines() if line.strip()][-1]
    assert last.startswith("job 7 ")
    assert " 345,688/1,000,000 running · 10 failed" in last
    assert len(last) <= columns
    assert ("19 s left · 34,568 rows/s" in last) == (columns >= 80)


@pytest.mark.parametrize(
    ("attended", "words"),
    [(Attendance(hint="start one"), "no worker is running"), (Attendance(doing="loading the model"), None)],
)
def test_a_job_that_stands_still_has_no_speed_and_no_estimate(attended: Attendance, words: str | None) -> None:
    pace = Pace()
    pace.add(Sample(0.0, 0, 0))
    pace.add(Sample(10.0, 40, 500))
    line = progress_line(Snapshot(make_job(num_failed=0), attended), pace)
    assert line == f"job 7 running: 30% | 30/100 requests | {words or 'loading the model'}"
    assert job_document(make_job(), now=110.0, is_attended=False)["eta_s"] is None


def test_a_standstill_does_not_slow_what_comes_after_it(capsys: pytest.CaptureFixture[str]) -> None:
    progress = LineProgress()
    for now, done, hint in [(0, 0, None), (10, 10, None), (11, 10, "x"), (20, 10, "x"), (21, 10, None)]:
        progress.update(Snapshot(make_job(num_done=done, num_failed=0), Attendance(hint=hint)), float(now))
    progress.update(Snapshot(make_job(num_done=20, num_failed=0), Attendance()), 31.0)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" | ")[2:] for line in lines[:4]] == [
        [], ["1 min 30 s left"], ["no worker is running"], [],
    ]  # fmt: skip
    assert lines[-1].split(" | ")[2:] == ["1 min 28 s left"]


def test_following_a_job_waits_for_a_database_that_is_locked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "overnight.db"
    with Database.open(str(path), busy_timeout_s=0.01) as database:
        new = NewJob("m", "generate", {}, seed=0, priority=0, queue="default")
        job_id = create_job(database, new, [NewRequest(0, None, None, ("bad_line", "no"))], now=1.0)
        other = sqlite3.connect(path, check_same_thread=False)
        other.execute("BEGIN EXCLUSIVE")

        def unlock() -> None:  # asked between two tries
            other.close()

        (snapshot,) = follow(database, job_id, watch=unlock)
    assert snapshot.job.state == "done"
    assert "waiting for the database" in capsys.readouterr().err
