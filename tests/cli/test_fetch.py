import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import ROOT, Command, Run, work, write_rows


@pytest.fixture
def job(with_redis: Path, run: Run, model: str) -> int:
    dataset = write_rows(Path("d.jsonl"), *({"id": f"r{i}", "prompt": "a"} for i in range(4)))
    job_id = int(run("enqueue", dataset, "--model", model, "--task", "generate").stdout)
    work(with_redis, job_id, failing=frozenset({2}))
    return job_id


def test_rows_come_in_the_order_of_the_dataset(run: Run, job: int) -> None:
    done = run("fetch", str(job))
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.exit_code == 0
    assert [(row["index"], row["id"], row["status"]) for row in rows] == [
        (0, "r0", "ok"), (1, "r1", "ok"), (2, "r2", "error"), (3, "r3", "ok"),
    ]  # fmt: skip


def test_errors_alone_can_be_asked_for(run: Run, job: int) -> None:
    (row,) = map(json.loads, run("fetch", str(job), "--errors").stdout.splitlines())
    assert row["error"]["code"] == "too_long"


def test_a_file_is_replaced_whole_and_says_how_many_rows(run: Run, job: int) -> None:
    Path("out.csv").write_text("old")
    done = run("fetch", str(job), "-o", "out.csv", "--format", "csv")
    assert done.exit_code == 0
    assert done.stdout == ""
    assert "4 rows" in done.stderr
    lines = Path("out.csv").read_text().splitlines()
    assert len(lines) == 5
    assert lines[1].startswith("r0,0,ok,'=text 0,stop")


def test_a_stdout_without_room_leaves_the_way_to_fetch_again(command: Command, job: int) -> None:
    with Path("/dev/full").open("w") as full:
        done = command("fetch", str(job), capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert "stdout could not be written" in done.stderr
    assert "fetch them again" in done.stderr


@pytest.mark.parametrize("name", ["d.jsonl", "./d.jsonl", "link"])
def test_the_dataset_is_never_overwritten(run: Run, job: int, name: str) -> None:
    before = Path("d.jsonl").read_bytes()
    Path("link").symlink_to("d.jsonl")
    done = run("fetch", str(job), "-o", name)
    assert done.exit_code == 2
    assert "overwrite" in done.stderr
    assert Path("d.jsonl").read_bytes() == before


def test_the_database_is_never_overwritten(home: Path, run: Run, job: int) -> None:
    assert run("fetch", str(job), "-o", str(home / "overnight.db")).exit_code == 2


@pytest.mark.parametrize("suffix", ["-journal", "-wal", "-shm"])
@pytest.mark.parametrize("way", ["path", "spelling", "symlink", "hard link"])
def test_what_sqlite_keeps_beside_the_database_is_never_overwritten(
    home: Path, run: Run, job: int, suffix: str, way: str
) -> None:
    side = home / f"overnight.db{suffix}"
    name = {"path": str(side), "spelling": f"{home}/../home/./{side.name}"}.get(way, "link")
    if way == "symlink":
        Path("link").symlink_to(side)
    elif way == "hard link":
        side.touch()
        Path("link").hardlink_to(side)
    done = run("fetch", str(job), "-o", name)
    assert done.exit_code == 2
    assert "overwrite" in done.stderr
    run_words = ("run", "d.jsonl", "--model", "m", "--task", "generate")
    for words in ((*run_words, "-o", name), (*run_words, "-o", "out", "--trace", name)):
        assert run(*words).exit_code == 2


@pytest.mark.parametrize("url", ["sqlite:///link.db", "sqlite+pysqlite:///link.db?timeout=1", "link.db"])
def test_a_database_by_another_name_is_kept_as_well(home: Path, run: Run, job: int, url: str) -> None:
    Path("link.db").symlink_to(home / "overnight.db")
    for name in ("link.db", str(home / "overnight.db-wal")):
        done = run("fetch", str(job), "-o", name, "--database", url)
        assert (done.exit_code, "overwrite" in done.stderr) == (2, True)


def test_an_absent_folder_is_named(run: Run, job: int) -> None:
    done = run("fetch", str(job), "-o", "gone/out.jsonl")
    assert done.exit_code == 3
    assert "gone" in done.stderr


def test_a_full_disk_is_one_sentence(run: Run, job: int) -> None:
    done = run("fetch", str(job), "-o", "/dev/full")
    assert done.exit_code == 1
    assert "No space left" in done.stderr


def test_an_unfinished_job_gives_what_is_there_and_says_so(with_redis: Path, run: Run, job: int, model: str) -> None:
    second = int(run("enqueue", "d.jsonl", "--model", model, "--task", "generate").stdout)
    work(with_redis, second, limit=3)
    done = run("fetch", str(second))
    assert done.exit_code == 0
    assert len(done.stdout.splitlines()) == 3
    assert "3 of 4" in done.stderr


def test_a_job_without_outputs_says_so(run: Run, job: int, model: str) -> None:
    second = run("enqueue", "d.jsonl", "--model", model, "--task", "generate").stdout.strip()
    run("cancel", second)
    done = run("fetch", second)
    assert (done.exit_code, done.stdout) == (0, "")
    assert f"job {second} is cancelled: none of its rows has an output" in done.stderr


def test_a_reader_that_leaves_early_is_no_error(with_redis: Path, run: Run, model: str) -> None:
    write_rows(Path("many.jsonl"), *({"prompt": "a"} for _ in range(3000)))
    job = int(run("enqueue", "many.jsonl", "--model", model, "--task", "generate").stdout)
    work(with_redis, job, limit=3000)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "cli", "fetch", str(job)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    complaint = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=240) == 0
    assert complaint == b""
