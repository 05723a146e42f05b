import logging
import os
import signal
from pathlib import Path

import pytest

from engine.errors import DeviceUnavailable
from engine.planner.plan import PlanOptions
from storage.errors import DatabaseLocked
from worker.daemon import WorkerOptions, exit_code, run_worker
from worker.errors import SettingsError, TraceNotWritten, WorkerError
from worker.settings import Settings


def test_a_polite_stop_is_a_success_and_ctrl_c_says_so() -> None:
    assert exit_code(None, signal.SIGTERM) == 0
    assert exit_code(None, signal.SIGINT) == 130


def test_an_end_that_nobody_asked_for_is_a_failure() -> None:
    assert exit_code(None, None) == 1


@pytest.mark.parametrize("error", [DatabaseLocked("locked"), WorkerError("busy")])
def test_an_error_that_a_person_can_mend_goes_to_the_command_line(error: Exception) -> None:
    with pytest.raises(type(error)):
        exit_code(error, None)


def test_a_fault_of_ours_is_one_sentence(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, logger="overnight"):
        assert exit_code(RuntimeError("shapes differ"), None) == 1

    (record,) = caplog.records
    assert "RuntimeError: shapes differ" in record.getMessage()
    assert "OVERNIGHT_LOG_LEVEL=debug" in record.getMessage()


def test_a_trace_that_cannot_be_written_is_refused_before_any_work(settings: Settings, tmp_path: Path) -> None:
    options = WorkerOptions(placement=PlanOptions(device="cpu"), trace=tmp_path / "no" / "trace.json")
    umask = os.umask(0o077)
    try:
        with pytest.raises(TraceNotWritten, match=r"trace\.json cannot be written: No such file"):
            run_worker(settings, options)
    finally:
        os.umask(umask)


def test_a_worker_tunes_its_process(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that what the worker sets is undone at the end
        monkeypatch.delenv(name)
    test_a_trace_that_cannot_be_written_is_refused_before_any_work(settings, tmp_path)
    assert os.environ["GOMP_SPINCOUNT"]


@pytest.mark.parametrize(
    ("placement", "error", "says"),
    [
        (PlanOptions(device="cuda:99"), DeviceUnavailable, "CUDA device"),
        (PlanOptions(device="cpu", disk_dir=Path("/proc/spill")), SettingsError, "/proc/spill .*--disk-dir"),
    ],
)
def test_what_no_job_could_run_on_is_refused_before_any_work(
    settings: Settings, placement: PlanOptions, error: type[Exception], says: str
) -> None:
    umask = os.umask(0o077)
    try:
        with pytest.raises(error, match=says):
            run_worker(settings, WorkerOptions(placement=placement))
    finally:
        os.umask(umask)
