"""A drain with the real engine, in one thread; only the clock is the test's."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine import Engine, PlanOptions
from engine.loading import load_engine
from storage.claims import Doing, register_worker
from storage.database import Database
from storage.jobs import Job, NewJob, NewRequest, create_job, get_job
from storage.results import OutputRow, stream_outputs
from worker.aside import Aside
from worker.bell import Bell
from worker.blackbox import BlackBox
from worker.drain import Drain
from worker.patience import Patience
from worker.residency import Loaded, Residency, Sample, Tell
from worker.session import prepare_model
from worker.settings import Settings

START = 1_000_000.0


class Clock:
    """Time that passes only when it is looked at, and lets a test act in the middle of a run."""

    def __init__(self) -> None:
        self.now = START
        self.step_s = 0.0
        self.actions: list[tuple[int, Callable[[], object]]] = []
        self._looks = itertools.count()

    def __call__(self) -> float:
        look = next(self._looks)
        self.now += self.step_s
        due = [action for after, action in self.actions if look >= after]
        self.actions = [(after, action) for after, action in self.actions if look < after]
        for action in due:
            action()
        return self.now

    def after(self, looks: int, action: Callable[[], object]) -> None:
        """Do something when the time has been looked at this many more times."""
        self.actions.append((next(self._looks) + looks, action))


class Bench:
    """A drain with all that it needs."""

    def __init__(self, database: Database, settings: Settings, placement: PlanOptions) -> None:
        self.database = database
        self.settings = settings
        self.clock = Clock()
        self.bell = Bell()
        self.loaded: list[Path] = []
        self.placement = placement
        self.residency = Residency(self.load, self.clock)
        self.worker_id = 0
        self.is_alone = False
        self.box: BlackBox | None = None
        self.drain = self.new_worker()

    def engine_of(self, model_dir: Path) -> Engine:
        return load_engine(model_dir, replace(self.placement, disk_dir=self.settings.home))

    def load(self, model_dir: Path, sample: Sample, tell: Tell) -> Loaded:
        self.loaded.append(model_dir)
        return Loaded(self.engine_of(model_dir))

    def new_worker(self) -> Drain:
        self.worker_id = register_worker(
            self.database, hostname="here", pid=1, queue="default", device="cpu", now=self.clock.now, lease_s=60
        )
        return self.new_worker_of_the_same_number()

    def new_worker_of_the_same_number(self) -> Drain:
        patience = Patience(0)
        if self.box is not None:
            self.box.close()
        self.box = BlackBox(self.settings.home, self.settings.database_url, self.worker_id)
        self.aside = Aside(
            self.database,
            "here",
            waits_s=(60.0, 300.0),
            clock=self.clock,
            patience=patience,
            is_alone=self.is_alone,
        )
        self.told: list[Doing] = []
        self.drain = Drain(
            database=self.database,
            settings=self.settings,
            worker_id=self.worker_id,
            residency=self.residency,
            prepare=prepare_model,
            reap=lambda: None,
            describe=self.told.append,
            is_lost=lambda: False,
            bell=self.bell,
            clock=self.clock,
            patience=patience,
            aside=self.aside,
            box=self.box,
            is_alone=self.is_alone,
        )
        return self.drain

    def enqueue(
        self,
        model: Path | str,
        payloads: Sequence[dict[str, Any] | None],
        *,
        task: str = "generate",
        priority: int = 0,
        queue: str = "default",
        exact: bool = False,
        **params: Any,
    ) -> int:
        params = {"max_new_tokens": 6, **params} if task == "generate" else {}
        return create_job(
            self.database,
            NewJob(str(model), task, params, seed=3, priority=priority, queue=queue, exact=exact),
            [NewRequest(index, f"row {index}", payload) for index, payload in enumerate(payloads)],
            now=self.clock.now,
        )

    def job(self, job_id: int) -> Job:
        return get_job(self.database, job_id)

    def outputs(self, job_id: int) -> list[OutputRow]:
        return list(stream_outputs(self.database, job_id))

    def texts(self, job_id: int) -> dict[int, str]:
        return {row.index: row.output["text"] for row in self.outputs(job_id) if row.output is not None}

    def count(self, state: str, job_id: int) -> int:
        with self.database.read() as connection:
            return int(
                connection.exec_driver_sql(
                    "SELECT count(*) FROM requests WHERE job_id = ? AND state = ?", (job_id, state)
                ).scalar_one()
            )

    def crashes(self, job_id: int) -> set[int]:
        """The rows that are blamed for something."""
        with self.database.read() as connection:
            blamed = 'SELECT "index" FROM requests WHERE job_id = ? AND crashes > 0'
            return set(connection.exec_driver_sql(blamed, (job_id,)).scalars())

    def drain_all(self) -> None:
        while self.drain.step():
            pass


def prompts(count: int) -> list[dict[str, Any] | None]:
    return [{"prompt": "ab" * (1 + index % 9) + chr(97 + index % 26)} for index in range(count)]
