"""A campaign of seeded faults: ``python -m benchmarks.chaos --minutes 10``.

Each round has a home, a Redis and jobs of its own, and two workers that a supervisor starts again whenever they end.
Faults come at random moments; the last one over, everything must be done within a minute: every row once, and equal to
an undisturbed run. A round that fails says its seed, which repeats it.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.strangers import ATTACKS
from storage.database import Database
from storage.errors import InvalidTransition, StorageError
from storage.integrity import check_integrity
from storage.jobs import NewJob, NewRequest, cancel_job, create_job, get_job, retry_job
from storage.results import stream_outputs
from worker import children
from worker.doorbell import client_url, ping, ring
from worker.errors import RedisUnreachable
from worker.private_redis import find_redis_server
from worker.settings import Settings, load_settings

ROOT = Path(__file__).resolve().parents[1]
MODEL = "tiny"
LEASE_S = 3.0
PATIENCE_S = 60.0
"""How long a round may take from the end of its last fault."""
Outputs = list[dict[int, Any]]
"""For each job, the output or error code by row."""


class ChaosFound(Exception):
    """A promise was broken; the text says which."""


@dataclass(frozen=True, slots=True)
class Load:
    """The jobs of a round."""

    rows: int
    """Rows of each of three jobs."""
    new_tokens: int

    def jobs(self) -> list[tuple[NewJob, list[NewRequest]]]:
        """One of each task."""

        def new(task: str, **params: Any) -> NewJob:
            return NewJob(MODEL, task, params, seed=5, priority=0, queue="default")

        def words(index: int) -> str:
            return " ".join(f"w{10 + (7 * index + step) % 80}" for step in range(3 + index % 11))

        rows = range(self.rows)
        return [
            (
                new("generate", max_new_tokens=self.new_tokens, ignore_eos=True),
                [NewRequest(i, i, {"prompt": words(i)}) for i in rows],
            ),
            (new("score"), [NewRequest(i, i, {"context": words(i), "continuation": " " + words(i + 1)}) for i in rows]),
            (new("choose"), [NewRequest(i, i, {"prompt": words(i), "choices": ["w10", "w11 w12"]}) for i in rows]),
        ]


@dataclass(slots=True)
class Helper:
    """One worker process, started again by ``Round.tend`` when it has ended."""

    words: list[str]
    environ: dict[str, str]
    process: subprocess.Popen[bytes]


@dataclass(slots=True)
class Round:
    """Everything that runs, and the faults that may befall it."""

    folder: Path
    models: Path
    chance: random.Random
    settings: Settings = field(init=False)
    database: Database = field(init=False)
    helpers: list[Helper] = field(default_factory=list)
    redis: subprocess.Popen[bytes] | None = None
    counts: Counter[str] = field(default_factory=Counter)
    job_ids: list[int] = field(default_factory=list)

    def begin(self, load: Load) -> None:
        """Redis, the database, the jobs and two workers."""
        self.begin_empty()
        self.job_ids = [create_job(self.database, job, rows, now=time.time()) for job, rows in load.jobs()]
        for _ in range(2):
            self.add_worker()

    def begin_empty(self) -> None:
        """Redis and the database."""
        home = self.folder / "home"
        home.mkdir(mode=0o700)
        flags: dict[str, object] = {"home": str(home), "models": str(self.models)}
        self.settings = load_settings(flags | {"redis": f"unix://{self.folder}/redis.sock"}, {})
        self.start_redis()
        self.database = Database.open(self.settings.database_url, busy_timeout_s=30.0)

    def end(self) -> None:
        """Stop whatever runs, however it stands."""
        for helper in self.helpers:
            if helper.process.poll() is None:
                helper.process.send_signal(signal.SIGCONT)
                helper.process.terminate()
        for helper in self.helpers:
            children.stop(helper.process, grace_s=20.0)
        if self.redis is not None:
            self.redis.send_signal(signal.SIGCONT)
            children.stop(self.redis, grace_s=5.0)
        self.database.close()

    def ring(self, job_id: int) -> None:
        """Wake the workers."""
        ring(self.settings, job_id)

    def add_worker(self, *words: str, micro_batch: int = 16, **environ: str) -> None:
        """One worker more, with settings under which things happen in seconds."""
        given = {
            **{name: value for name, value in os.environ.items() if not name.startswith("OVERNIGHT_")},
            "OVERNIGHT_HOME": str(self.settings.home),
            "OVERNIGHT_REDIS": self.settings.redis_url,
            "OVERNIGHT_MODELS": str(self.models),
            "OVERNIGHT_LEASE_S": str(LEASE_S),
            "OVERNIGHT_SCAN_S": "0.5",
            "OVERNIGHT_BACKOFF_S": "0.5",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            **environ,
        }
        small = ["--device", "cpu", "--dtype", "float32", "--micro-batch", str(micro_batch)]
        command = [sys.executable, "-m", "cli", "worker", *small, "--micro-batches", "1", *words]
        self.helpers.append(Helper(command, given, self._spawn(command, given)))

    def tend(self) -> None:
        """What a supervisor does: a worker that ended is started again."""
        for helper in self.helpers:
            if helper.process.poll() is not None:
                helper.process = self._spawn(helper.words, helper.environ)

    def _spawn(self, command: list[str], environ: dict[str, str]) -> subprocess.Popen[bytes]:
        with (self.folder / "workers.log").open("ab") as log:
            return children.spawn(command, environ=environ, stdout=log, stderr=log)

    def start_redis(self) -> None:
        """An empty Redis at the round's place."""
        socket = self.folder / "redis.sock"
        socket.unlink(missing_ok=True)
        command = [find_redis_server(), "--port", "0", "--unixsocket", socket, "--save", "", "--dir", self.folder]
        with (self.folder / "redis.log").open("ab") as log:
            self.redis = children.spawn(list(map(str, command)), stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(RedisUnreachable):
                ping(self.settings.redis_url)
                return
            time.sleep(0.02)
        raise ChaosFound("Redis did not start: the campaign's own fault")

    # Faults. Each is over when it returns.

    def kill(self) -> None:
        """kill -9 of a worker."""
        self.chance.choice(self.helpers).process.kill()

    def terminate(self) -> None:
        """A polite stop."""
        self._signal(signal.SIGTERM)

    def interrupt(self) -> None:
        """Ctrl-C, sometimes twice."""
        for _ in range(self.chance.choice([1, 2])):
            self._signal(signal.SIGINT)

    def stop_and_go_on(self) -> None:
        """A machine that sleeps, sometimes for longer than its lease."""
        helper = self.chance.choice(self.helpers)
        if helper.process.poll() is None:
            helper.process.send_signal(signal.SIGSTOP)
            time.sleep(self.chance.uniform(0.5, 1.5 * LEASE_S))
            helper.process.send_signal(signal.SIGCONT)

    def strangers(self) -> None:
        """Some malformed messages, one after another."""
        import redis

        with redis.Redis.from_url(client_url(self.settings.redis_url)) as client:
            for name in self.chance.sample(sorted(ATTACKS), 8):
                # One that put a text in the queue's place keeps the next ones out, until a worker mends it.
                with contextlib.suppress(redis.RedisError):
                    ATTACKS[name](client, self.settings)
                    self.counts[f"message: {name}"] += 1

    def kill_redis(self) -> None:
        """Killed, away for a moment, and back, empty."""
        assert self.redis is not None
        self.redis.kill()
        self.redis.wait()
        time.sleep(self.chance.uniform(0.0, 2.0))
        self.start_redis()

    def silence_redis(self) -> None:
        """It accepts connections and answers nobody."""
        assert self.redis is not None
        self.redis.send_signal(signal.SIGSTOP)
        time.sleep(self.chance.uniform(0.5, 3.0))
        self.redis.send_signal(signal.SIGCONT)

    def flush_redis(self) -> None:
        """FLUSHALL."""
        import redis

        with contextlib.suppress(redis.RedisError), redis.Redis.from_url(client_url(self.settings.redis_url)) as client:
            client.flushall()

    def cancel_and_retry(self) -> None:
        """A storm of both, between two commits of a worker."""
        for _ in range(self.chance.choice([1, 3, 6])):
            job_id = self.chance.choice(self.job_ids)
            with contextlib.suppress(InvalidTransition):
                cancel_job(self.database, job_id, now=time.time())
                if self.chance.random() < 0.5:
                    time.sleep(self.chance.uniform(0.0, 0.3))
                retry_job(self.database, job_id, now=time.time())

    def lock_database(self) -> None:
        """Another program holds the lock, as a backup does."""
        with contextlib.closing(sqlite3.connect(str(self.database.path), timeout=30.0)) as other:
            other.execute("BEGIN EXCLUSIVE")
            time.sleep(self.chance.uniform(0.5, 2 * LEASE_S))

    def worker_without_model(self) -> None:
        """A worker whose models folder is empty."""
        empty = self.folder / "no-models"
        empty.mkdir(exist_ok=True)
        self.add_worker(OVERNIGHT_MODELS=str(empty))

    def worker_without_room(self) -> None:
        """A worker with too little memory for the model."""
        self.add_worker("--device-memory", "100KiB")

    def kill_enqueue(self) -> None:
        """An enqueue that is killed while it loads."""
        command = [sys.executable, "-m", "cli", "enqueue", "-", "--model", MODEL, "--task", "generate"]
        process = subprocess.Popen(command, env=self.helpers[0].environ, stdin=subprocess.PIPE, cwd=ROOT, stderr=-3)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            for index in range(self.chance.choice([10, 5000])):
                process.stdin.write(f'{{"prompt": "w{10 + index % 50}"}}\n'.encode())
            process.stdin.flush()
            time.sleep(self.chance.uniform(0.1, 0.5))
        process.kill()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()

    def _signal(self, number: signal.Signals) -> None:
        helper = self.chance.choice(self.helpers)
        if helper.process.poll() is None:
            helper.process.send_signal(number)

    FAULTS = (
        *("kill", "kill", "terminate", "interrupt", "stop_and_go_on", "strangers", "strangers", "kill_redis"),
        *("silence_redis", "flush_redis", "cancel_and_retry", "cancel_and_retry", "lock_database"),
        *("worker_without_model", "worker_without_room", "kill_enqueue"),
    )

    def befall(self, number: int) -> None:
        """Some faults at random moments."""
        for _ in range(number):
            time.sleep(self.chance.uniform(0.1, 1.5))
            self.tend()
            name = self.chance.choice(self.FAULTS)
            self.counts[name] += 1
            getattr(self, name)()

    def wait(self, patience_s: float = PATIENCE_S) -> float:
        """Until all jobs are done; returns how long it took from now.

        Raises:
            ChaosFound: it took too long.
        """
        began = time.monotonic()
        while True:
            self.tend()
            with contextlib.suppress(StorageError):
                if all(get_job(self.database, job_id).is_finished for job_id in self.job_ids):
                    return time.monotonic() - began
            if time.monotonic() - began > patience_s:
                jobs = [get_job(self.database, job_id) for job_id in self.job_ids]
                state = "; ".join(f"job {j.id} {j.state} {j.num_done}+{j.num_failed} of {j.num_requests}" for j in jobs)
                raise ChaosFound(f"not done {patience_s:.0f} s after the last fault: {state}")
            time.sleep(0.05)

    def outputs(self) -> Outputs:
        """What came of each row."""
        found = []
        for job_id in self.job_ids:
            rows = list(stream_outputs(self.database, job_id))
            made = {row.index: row.output if row.output is not None else row.error_code for row in rows}
            if len(made) != len(rows):
                raise ChaosFound(f"job {job_id} has rows twice")
            found.append(made)
        return found

    def check(self, undisturbed: Outputs) -> None:
        """Every row once, and as it would have been.

        Raises:
            ChaosFound: names the first that differs.
        """
        check_integrity(self.database)
        for job_id, made, wanted in zip(self.job_ids, self.outputs(), undisturbed, strict=True):
            for index in wanted:
                if not same(made.get(index), wanted[index]):
                    found, hoped = (str(each)[:200] for each in (made.get(index), wanted[index]))
                    raise ChaosFound(f"job {job_id}, row {index}: {found} instead of {hoped}")
            if len(made) != len(wanted):
                raise ChaosFound(f"job {job_id} has {len(made)} outputs for {len(wanted)} rows")

    def check_logs(self) -> None:
        """No traceback reached anybody, and nothing is left in memory or on disk.

        Raises:
            ChaosFound: there was one.
        """
        log = (self.folder / "workers.log").read_text(errors="replace")
        if "Traceback" in log:
            raise ChaosFound(f"a traceback in {self.folder / 'workers.log'}")
        spilled = [path for path in self.settings.spill_dir.glob("*") if path.is_file()]
        if spilled:
            raise ChaosFound(f"spill files were left: {spilled}")


def same(one: object, other: object) -> bool:
    """Texts and labels exactly; log-probabilities as far as float32 promises them (docs/numerics.md)."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 1e-4
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@contextlib.contextmanager
def chaos_round(models: Path, seed: int, load: Load) -> Iterator[Round]:
    """A round that has begun, and that leaves nothing behind but, after a failure, its folder.

    Raises:
        ChaosFound: its workers' logs hold a traceback, or spill files are left.
    """
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    one = Round(folder, models, random.Random(seed))
    one.begin(load)
    try:
        yield one
    finally:
        one.end()
    one.check_logs()
    shutil.rmtree(folder)


def run_undisturbed(models: Path, load: Load) -> Outputs:
    """What the rows give when nothing happens."""
    with chaos_round(models, 0, load) as quiet:
        quiet.wait()
        return quiet.outputs()


def run_round(
    models: Path, seed: int, load: Load, undisturbed: Outputs, *, faults: int, patience_s: float = PATIENCE_S
) -> tuple[float, Counter[str]]:
    """One round; returns the seconds from its last fault to its end, and how often each fault came.

    Raises:
        ChaosFound: a promise was broken.
    """
    with chaos_round(models, seed, load) as one:
        one.befall(faults)
        seconds = one.wait(patience_s)
        one.check(undisturbed)
    return seconds, one.counts


def make_models(folder: Path, say: Callable[[str], None]) -> Path:
    """A models folder with the tiny model in it."""
    from benchmarks.checkpoints import make_checkpoint

    checkpoint = make_checkpoint("tiny", "float32", folder / "cache", say)
    models = folder / "models"
    models.mkdir(exist_ok=True)
    if not (models / MODEL).exists():
        shutil.copytree(checkpoint.model_dir, models / MODEL)
    return models


def main() -> int:
    """Rounds until the time is over; exit code 1 when a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1, help="of the first round; each next one has the next")
    parser.add_argument("--rounds", type=int, help="instead of --minutes")
    parser.add_argument("--faults", type=int, default=6, help="a round")
    parser.add_argument("--rows", type=int, default=400, help="of each of the three jobs of a round")
    asked = parser.parse_args()
    load = Load(asked.rows, 24)
    counts: Counter[str] = Counter()
    taken: list[float] = []
    failures: Mapping[int, str] = {}
    with tempfile.TemporaryDirectory(prefix="chaos-models-") as folder:
        models = make_models(Path(folder), lambda text: print(text, file=sys.stderr))
        undisturbed = run_undisturbed(models, load)
        began = time.monotonic()
        seed = asked.seed
        broken: dict[int, str] = {}
        while (seed - asked.seed < asked.rounds) if asked.rounds else (time.monotonic() - began < 60 * asked.minutes):
            try:
                seconds, round_counts = run_round(models, seed, load, undisturbed, faults=asked.faults)
            except (ChaosFound, StorageError) as error:
                broken[seed] = str(error)
                print(f"seed {seed}: BROKEN: {error}", file=sys.stderr)
            else:
                taken.append(seconds)
                counts += round_counts
                print(f"seed {seed}: done {seconds:.1f} s after the last fault", file=sys.stderr)
            seed += 1
        failures = broken
    messages = {name: count for name, count in counts.items() if name.startswith("message: ")}
    report = {
        "rounds": seed - asked.seed,
        "broken": failures,
        "num_broken": len(failures),
        "slowest_s": round(max(taken, default=0.0), 1),
        "faults": {name: count for name, count in sorted(counts.items()) if name not in messages},
        "kinds_of_messages": len(messages),
        "messages": sum(messages.values()),
    }
    print(json.dumps(report, indent=1))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
