"""Rows and models that kill their worker, with real processes and a supervisor that starts them again and again."""

import subprocess
import sys
from pathlib import Path

from storage.faults import list_faults
from tests.e2e.conftest import ROOT, Station, wait_until
from worker import children

WORKER = """
import os, sys
import engine.engine, engine.lengths, engine.tasks
begin = engine.tasks.begin

def deadly(request, *rest):
    if "POISON" in str(request.work):
        os._exit(9)  # as a segmentation fault or the kernel's out-of-memory killer would
    return begin(request, *rest)

engine.tasks.begin = engine.engine.begin = engine.lengths.begin = deadly
if {dies_loading}:
    engine.engine.Engine.load = classmethod(lambda *rest, **more: os._exit(9))
from cli.main import main
main(["worker", "--device", "cpu", "--micro-batch", "16", "--micro-batches", "1"])
"""


class Supervisor:
    """Starts a worker again whenever it has died."""

    def __init__(self, station: Station, *, dies_loading: bool, **settings: object) -> None:
        self.deaths = 0
        self._station = station
        self._script = WORKER.format(dies_loading=dies_loading)
        self._environ = station.environ | {"PYTHONPATH": str(ROOT)}
        self._environ |= {f"OVERNIGHT_{name.upper()}": str(value) for name, value in settings.items()}
        self._log = station.home / "supervised.log"
        self._process = self._start()

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def tend(self) -> None:
        if self._process.poll() is not None:
            self.deaths += 1
            assert self._process.returncode == 9, self.log
            self._process = self._start()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _start(self) -> "subprocess.Popen[bytes]":
        with self._log.open("ab") as log:
            return children.spawn([sys.executable, "-c", self._script], environ=self._environ, stdout=log, stderr=log)


def test_a_row_that_kills_its_worker_is_set_aside_and_the_rest_goes_on(
    station: Station, tiny_model: Path, tmp_path: Path
) -> None:
    dataset = tmp_path / "rows.jsonl"
    lines = [f'{{"prompt": "{"ab" * (1 + i % 5)}"}}' for i in range(24)]
    lines[13] = '{"prompt": "POISON"}'
    dataset.write_text("\n".join(lines))
    undisturbed = station.enqueue(tiny_model, 5)
    poisoned = int(station.cli("enqueue", dataset, "--model", tiny_model, "--task", "generate").stdout)
    supervisor = Supervisor(station, dies_loading=False, scan_s=0.2)

    def is_done() -> bool:
        supervisor.tend()
        return station.job(poisoned).is_finished and station.job(undisturbed).is_finished

    try:
        wait_until("both jobs to end", is_done, timeout_s=200)
    finally:
        supervisor.stop()

    job = station.job(poisoned)
    assert (job.state, job.num_done, job.num_failed) == ("done", 23, 1)
    assert station.job(undisturbed).num_done == 5
    (row,) = station.errors(poisoned)
    assert (row.index, row.error_code) == (13, "crashed")
    assert 3 <= supervisor.deaths <= 8, "about log2 of the rows that were in hand together"


def test_a_model_that_kills_its_worker_while_it_loads_is_left_alone_for_growing_times(
    station: Station, tiny_model: Path
) -> None:
    job_id = station.enqueue(tiny_model, 5)
    supervisor = Supervisor(station, dies_loading=True, scan_s=0.2, backoff_s=3600)

    def is_left_alone() -> bool:
        supervisor.tend()
        return any(worker.state == "waiting" for worker in station.workers())

    try:
        wait_until("the worker to leave the model alone", is_left_alone)
        assert supervisor.deaths == 1, "no crash loop"
        (fault,) = list_faults(station.database)
        assert (fault.model, fault.count, fault.wait_s) == (str(tiny_model), 1, 3600.0)
        (waiting,) = [worker for worker in station.workers() if worker.state == "waiting"]
        assert "died while it loaded the model" in str(waiting.message)
        assert waiting.retry_at == fault.retry_at
    finally:
        supervisor.stop()

    assert station.job(job_id).state == "queued"
    assert station.request_states(job_id) == {"pending": 5}
    station.start_worker()  # one that does not die still leaves it alone
    assert station.job(job_id).state == "queued"
