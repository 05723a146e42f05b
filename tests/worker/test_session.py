"""One process's whole life as a worker, in a thread: registering, losing its lease, signing off."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine import PlanOptions
from engine.errors import CheckpointError
from engine.loading import load_engine
from storage.claims import Worker, claim, expire, list_workers, register_worker
from storage.database import Database
from storage.faults import list_faults
from storage.jobs import NewJob, NewRequest, create_job, get_job
from worker.bell import Bell
from worker.blackbox import BlackBox
from worker.models import known_models, model_dir_for, resolve_model
from worker.presence import host_name
from worker.residency import Loaded, Residency, Sample, Tell
from worker.rows import RowKey
from worker.session import prepare_model, serve
from worker.settings import Settings


def wait_until(condition: Callable[[], bool]) -> None:
    """What another thread writes can only be looked for; what never comes is ended by the test's own time limit."""
    while not condition():
        time.sleep(0.01)


class Running:
    """``serve`` on a thread of its own, with the real engine."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self.database = database
        self.settings = replace(settings, scan_s=0.05)
        self.bell = Bell()
        self.loaded: list[Path] = []
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        residency = Residency(self._load, time.time)
        serve(
            database=self.database,
            settings=self.settings,
            device="cpu",
            residency=residency,
            bell=self.bell,
        )
        residency.unload()

    def _load(self, model_dir: Path, sample: Sample, tell: Tell) -> Loaded:
        self.loaded.append(model_dir)
        return Loaded(load_engine(model_dir, PlanOptions(device="cpu", disk_dir=self.settings.home)))

    def work_off(self, model: Path) -> None:
        new = NewJob(str(model), "generate", {"max_new_tokens": 2}, seed=0, priority=0, queue="default")
        job_id = create_job(self.database, new, [NewRequest(0, None, {"prompt": "ab"})], now=time.time())
        wait_until(lambda: get_job(self.database, job_id).is_finished)
        assert get_job(self.database, job_id).state == "done"

    def worker(self) -> Worker:
        (worker,) = list_workers(self.database)
        return worker

    def stop(self) -> None:
        self.bell.stop()
        self.thread.join()


@pytest.fixture
def running(database: Database, settings: Settings) -> Iterator[Running]:
    made = Running(database, settings)
    wait_until(lambda: len(list_workers(database)) == 1)
    yield made
    made.stop()


def test_a_worker_that_was_taken_for_dead_registers_anew_and_keeps_its_model(
    running: Running, tiny_model: Path
) -> None:
    running.work_off(tiny_model)
    first = running.worker().id

    expire(running.database, now=time.time(), is_dead=lambda worker: True)
    wait_until(lambda: [worker.id for worker in list_workers(running.database)] not in ([], [first]))
    running.work_off(tiny_model)

    assert running.worker().id != first
    assert running.loaded == [tiny_model]


def test_it_says_what_it_is_and_signs_off(running: Running, tiny_model: Path) -> None:
    running.work_off(tiny_model)
    wait_until(lambda: running.worker().state == "idle")
    worker = running.worker()
    assert (worker.hostname, worker.device, worker.model) == (host_name(), "cpu", str(tiny_model))

    running.stop()

    assert list_workers(running.database) == []


def test_a_neighbour_that_was_killed_is_signed_off_at_the_next_look(running: Running) -> None:
    gone = register_worker(
        running.database,
        hostname=host_name(),
        pid=2**22,  # Linux gives out none so high
        queue="default",
        device="cpu",
        now=time.time(),
        lease_s=3600,
    )

    wait_until(lambda: gone not in {worker.id for worker in list_workers(running.database)})


def test_two_workers_that_import_the_same_checkpoint_end_with_one_model(
    settings: Settings, tiny_checkpoint: Path
) -> None:
    ref = resolve_model(str(tiny_checkpoint), settings)
    model_dir = model_dir_for(ref, settings)
    together = threading.Barrier(4)
    errors: list[BaseException] = []

    def prepare() -> None:
        together.wait()
        try:
            prepare_model(ref, model_dir)
        except BaseException as error:  # noqa: BLE001 (a thread's error is the test's)
            errors.append(error)

    threads = [threading.Thread(target=prepare) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    assert known_models(settings) == [model_dir.name]
    assert [path.name for path in settings.models_dir.glob("*.partial-*")] == []


def test_a_checkpoint_that_cannot_be_imported_is_an_error(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    ref = resolve_model(str(tmp_path), settings)

    with pytest.raises(CheckpointError):
        prepare_model(ref, model_dir_for(ref, settings))


def test_deaths_that_are_found_at_once_are_one_fault_and_come_before_their_claims(
    database: Database, settings: Settings, tiny_model: Path
) -> None:
    new = NewJob(str(tiny_model), "generate", {"max_new_tokens": 2}, seed=0, priority=0, queue="default")
    job_id = create_job(database, new, [NewRequest(i, None, {"prompt": "ab"}) for i in range(4)], now=time.time())
    dead = [
        register_worker(
            database, hostname="elsewhere", pid=1, queue="default", device="cpu", now=time.time(), lease_s=3600
        )
        for _ in range(3)
    ]
    folder = settings.home / "inflight"
    for worker_id in dead[:2]:
        box = BlackBox(settings.home, settings.database_url, worker_id)
        box.loads("m")
        os.close(box._file)  # as the kernel does for a process that was killed
    held = claim(database, dead[2], job_id, 2, now=time.time())
    box = BlackBox(settings.home, settings.database_url, dead[2])
    for each in held:
        box.begins(RowKey(each.job_id, each.index, each.attempt))
    os.close(box._file)

    running = Running(database, settings)
    wait_until(lambda: get_job(database, job_id).num_done == 2)
    running.stop()

    assert [(fault.model, fault.kind, fault.count) for fault in list_faults(database)] == [("m", "loading", 1)]
    assert list(folder.iterdir()) == []
    with database.read() as connection:
        blamed = connection.exec_driver_sql('SELECT "index", state FROM requests WHERE crashes = 1').all()
    # Their worker is another host's, so its lease decides when they come back; they are marked by then.
    assert sorted(blamed) == [(0, "claimed"), (1, "claimed")]
