"""The real thing: worker processes as a user starts them, on a real Redis, watched through the database."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection

from storage.claims import Worker, list_workers
from storage.database import Database
from storage.jobs import Job, NewJob, NewRequest, create_job, get_job
from storage.results import OutputRow, stream_outputs
from worker import children
from worker.doorbell import ping
from worker.errors import RedisRefused, RedisUnreachable
from worker.private_redis import find_redis_server

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 240.0
"""Of a busy machine: what has not come by then will not come. pytest ends a test after 300 s in any case."""


def wait_until(what: str, condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    """Other processes can only be watched from outside."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for: {what}"
        time.sleep(0.02)


SLOW = ("--micro-batch", "1")
"""With passes of one token each, of a quarter of a millisecond at the very least."""


class WorkerProcess:
    """`overnight worker` as its own process; its stderr is kept."""

    def __init__(self, command: list[str], environ: dict[str, str], log: Path) -> None:
        self._log = log
        with log.open("wb") as output:
            self.process = children.spawn(command, environ=environ, stdout=output, stderr=output)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def stop(self) -> None:
        """Returns when it stands still, by SIGSTOP."""
        self.process.send_signal(signal.SIGSTOP)
        stat = Path(f"/proc/{self.process.pid}/stat")
        wait_until("the worker to stand still", lambda: stat.read_text().rpartition(") ")[2].startswith("T"))

    def signal(self, number: int) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


class Station:
    """One OVERNIGHT_HOME, one Redis, and what runs there."""

    def __init__(self, home: Path, redis_url: str) -> None:
        self.home = home
        self.environ = {
            **{k: v for k, v in os.environ.items() if not k.startswith("OVERNIGHT_")},
            "OVERNIGHT_HOME": str(home),
            "OVERNIGHT_REDIS": redis_url,
            "OMP_NUM_THREADS": "1",
        }
        self.database = Database.open(f"sqlite:///{home}/overnight.db")
        self._workers: list[WorkerProcess] = []

    def cli(self, *words: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """One command, to its end."""
        command = [sys.executable, "-m", "cli", *map(str, words)]
        return subprocess.run(
            command, cwd=ROOT, env=self.environ, input=stdin, capture_output=True, text=True, timeout=PATIENCE_S
        )

    def start_worker(self, *words: str | Path, ready: bool = True, **settings: object) -> WorkerProcess:
        """`overnight worker`; with passes of one token (``*SLOW``) a job can be caught in the middle."""
        command = [sys.executable, "-m", "cli", "worker", "--device", "cpu", "--micro-batch", "64"]
        command += ["--micro-batches", "1", *map(str, words)]
        environ = self.environ | {f"OVERNIGHT_{name.upper()}": str(value) for name, value in settings.items()}
        known = {worker.id for worker in self.workers()}
        log = self.home / f"worker-{len(self._workers)}.log"
        worker = WorkerProcess(command, environ | {"PYTHONPATH": str(ROOT)}, log)
        self._workers.append(worker)
        if ready:
            wait_until(
                "the worker to look around",
                lambda: (
                    worker.process.poll() is not None
                    or any(each.id not in known and each.state != "starting" for each in self.workers())
                ),
            )
            assert worker.process.poll() is None, worker.log
        return worker

    def workers(self) -> list[Worker]:
        return list_workers(self.database)

    def enqueue(self, model: Path, num_rows: int, **params: object) -> int:
        """A job put into the database, and no ring: as if the message had been lost."""
        return create_job(
            self.database,
            NewJob(str(model), "generate", {"max_new_tokens": 24, **params}, seed=0, priority=0, queue="default"),
            [NewRequest(i, None, {"prompt": "ab" * (1 + i % 9) + chr(97 + i % 26)}) for i in range(num_rows)],
            now=time.time(),
        )

    def job(self, job_id: int) -> Job:
        return get_job(self.database, job_id)

    def wait_done(self, job_id: int) -> Job:
        wait_until(f"job {job_id} to finish", lambda: self.job(job_id).is_finished)
        return self.job(job_id)

    @contextlib.contextmanager
    def caught_in_the_middle(self, job_id: int) -> Iterator[None]:
        """While it lasts, some rows are done and some are claimed: nobody can write to the database meanwhile."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with self.database.write() as connection:
                states = self._request_states(connection, job_id)
                if states.get("done") and states.get("claimed"):
                    yield
                    return
            assert states.get("done") != sum(states.values()), "it was too quick to be caught in the middle"
            assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for the job to be in the middle"
            time.sleep(0.02)

    @contextlib.contextmanager
    def stopped_in_the_middle(self, worker: WorkerProcess, job_id: int) -> Iterator[None]:
        """While it lasts, the worker stands still with rows of the job claimed, and others can use the database."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            # While we hold the lock for writing, it cannot be stopped with that in its hands.
            with self.database.write() as connection:
                states = self._request_states(connection, job_id)
                is_running = bool(states.get("claimed"))
                if is_running:
                    worker.stop()
            try:
                if is_running and self._nobody_reads():
                    yield
                    return
            finally:
                worker.process.send_signal(signal.SIGCONT)
            assert states.get("done") != sum(states.values()), "it was too quick to be caught in the middle"
            assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for the job to be in the middle"
            time.sleep(0.02)

    def _nobody_reads(self) -> bool:
        with contextlib.closing(sqlite3.connect(str(self.database.path), timeout=0.1)) as connection:
            try:
                connection.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError:
                return False
            connection.rollback()
            return True

    def texts(self, job_id: int) -> list[tuple[int, Any]]:
        """(index, output) of every output row, duplicates included."""
        return [(row.index, row.output) for row in stream_outputs(self.database, job_id)]

    def errors(self, job_id: int) -> list[OutputRow]:
        """The rows that failed."""
        return list(stream_outputs(self.database, job_id, errors_only=True))

    def request_states(self, job_id: int) -> dict[str, int]:
        with self.database.read() as connection:
            return self._request_states(connection, job_id)

    @staticmethod
    def _request_states(connection: Connection, job_id: int) -> dict[str, int]:
        rows = connection.exec_driver_sql(
            f"SELECT state, count(*) FROM requests WHERE job_id = {job_id} GROUP BY state"
        )
        return {state: count for state, count in rows}  # noqa: C416 (rows are not tuples to a type checker)

    def close(self) -> None:
        for worker in self._workers:
            if worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait()
        self.database.close()


@pytest.fixture
def station(tmp_path: Path, redis_url: str) -> Iterator[Station]:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    with contextlib.closing(Station(home, redis_url)) as made:
        yield made


class OwnRedis:
    """A Redis that can be killed and started again at the same place."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.socket = folder / "redis.sock"
        self._options = options
        self.url = f"unix://{self.socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [find_redis_server(), "--port", "0", "--unixsocket", self.socket, "--save", "", "--dir", "/tmp"]
        command += self._options
        self._process = children.spawn(list(map(str, command)), stdout=subprocess.DEVNULL)
        wait_until("Redis to answer", self._answers)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self.socket.unlink(missing_ok=True)

    def _answers(self) -> bool:
        try:
            ping(self.url)
        except RedisRefused:
            return True  # it wants a password
        except RedisUnreachable:
            return False
        return True


@pytest.fixture
def own_redis() -> Iterator[OwnRedis]:
    with tempfile.TemporaryDirectory(prefix="overnight-test-") as folder:  # a socket's path must be short
        server = OwnRedis(Path(folder))
        server.start()
        yield server
        server.kill()


def json_of(ran: subprocess.CompletedProcess[str]) -> Any:
    """The one JSON document on stdout."""
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)
