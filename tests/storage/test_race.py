"""Several processes on one database: no request is ever two workers' at once, and each gets one output."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from storage.claims import expire
from storage.database import Database
from storage.jobs import JobState, get_job
from storage.results import stream_outputs
from tests.storage.factories import make_job

WORKER = """
import json, os, sys
from storage.claims import claim, list_workers, register_worker
from storage.database import Database
from storage.results import record
from tests.storage.factories import pass_totals, result_of
db, job_id = Database.open(sys.argv[1], busy_timeout_s=60.0), int(sys.argv[2])
me = register_worker(db, hostname="box", pid=os.getpid(), queue="default", device="cpu", now=1.0, lease_s=1e9)
pauses = [*map(int, sys.argv[3:])]  # after so many blocks it waits to be told to go on
print("ready", flush=True)
mine, blocks = [], 0
sys.stdin.readline()
while claimed := claim(db, me, job_id, 7, now=2.0):
    new = record(db, me, [result_of(c, text=str(me)) for c in claimed], pass_totals(job_id), now=3.0)
    assert new == len(claimed), (new, len(claimed))
    mine += [c.index for c in claimed]
    print(json.dumps([c.index for c in claimed]), flush=True)
    blocks += 1
    if blocks in pauses:
        sys.stdin.readline()
"""


def start(path: Path, job_id: int, *pauses: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WORKER, str(path), str(job_id), *map(str, pauses)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go_on(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def indexes(printed: str) -> list[int]:
    return [index for line in printed.splitlines() for index in json.loads(line)]


def test_two_processes_share_a_job_without_overlap(db: Database, path: Path) -> None:
    job_id = make_job(db, 300)
    processes = [start(path, job_id, 1) for _ in range(2)]
    for process in processes:
        go_on(process)
    firsts = [process.stdout.readline() for process in processes if process.stdout]
    for process in processes:  # both have done a block, and neither has ended
        go_on(process)
    shares = [indexes(first + process.communicate()[0]) for first, process in zip(firsts, processes, strict=True)]
    assert [process.returncode for process in processes] == [0, 0]
    assert all(shares)
    assert sorted(shares[0] + shares[1]) == list(range(300))
    assert get_job(db, job_id).state is JobState.DONE


def test_kill_9_loses_and_repeats_nothing(db: Database, path: Path) -> None:
    """It is killed while it is at any of its blocks from the second to the fiftieth of 58."""
    job_id = make_job(db, 400)
    first = start(path, job_id, 50)
    assert first.stdout is not None
    go_on(first)
    reported = indexes(first.stdout.readline() + first.stdout.readline())
    first.kill()
    rest = first.communicate()[0]
    assert first.returncode == -signal.SIGKILL
    reported += indexes(rest[: rest.rfind("\n") + 1])
    before = get_job(db, job_id).num_done
    assert len(reported) <= before < 400  # what it said was committed

    def gone(pid: int) -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        return False

    assert expire(db, now=4.0, is_dead=lambda worker: gone(worker.pid)) in (0, 7)
    second = start(path, job_id)
    assert len(indexes(second.communicate("\n")[0])) == 400 - before
    made = list(stream_outputs(db, job_id))
    assert [output.index for output in made] == list(range(400))
    assert get_job(db, job_id).state is JobState.DONE
