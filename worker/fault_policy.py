"""What follows from a failure: jobs fail, models are left alone for a while, or the worker ends."""

from collections.abc import Iterable, Sequence

from storage.jobs import Job
from storage.results import RequestResult
from worker.aside import DEATHS_SPARED, LOADING, RUNNING, Aside
from worker.bell import Bell
from worker.faults import Blame, blame
from worker.job_store import JobStore
from worker.logs import BoundLogger

FIRST_ROWS = 16
"""So many rows of a job that all are ``not_finite`` are no chance: the others would be so, too."""
_NOT_FINITE = "not_finite"


class FaultPolicy:
    """Acts on a failure by whose fault it was (docs/decisions/0007-faults.md)."""

    def __init__(self, store: JobStore, aside: Aside, bell: Bell, log: BoundLogger, *, is_alone: bool) -> None:
        """``is_alone``: there are no other workers that could do better, so a fault of this machine fails the job."""
        self._store = store
        self._aside = aside
        self._bell = bell
        self._log = log
        self._is_alone = is_alone

    def bear(self, error: Exception, jobs: Sequence[Job], message: str, whose: Blame) -> None:
        """After a failure: the jobs fail, or this worker leaves their models alone for a while.

        Raises:
            DeviceFailed, DeviceUnavailable: ``error`` itself, if the device is lost.
        """
        if whose is Blame.DEVICE:
            raise error
        if self._bell.is_stopping:
            return  # what was interrupted proves nothing
        if blame(error) is Blame.UNKNOWN:
            self._log.error("%s: %s", type(error).__name__, error, exc_info=error, extra={"action": "fault"})
            message = f"{message} ({type(error).__name__})"
        if whose is Blame.JOB:
            self._fail(jobs, message)
            return
        is_unknown = whose is Blame.UNKNOWN
        for model in dict.fromkeys(job.model for job in jobs):
            fault = self._aside.note(
                model, message, RUNNING if is_unknown else LOADING, spared=DEATHS_SPARED if is_unknown else 0
            )
            if fault.wait_s and self._is_alone:
                self._fail([job for job in jobs if job.model == model], message)
            elif fault.wait_s:
                extra = {"action": "aside", "model": model}
                self._log.warning("left alone for %.0f s: %s", fault.wait_s, message, extra=extra)

    def judge(self, results: Iterable[RequestResult]) -> None:
        """After results were recorded: a job fails whose first rows all lack finite numbers, and no row does not.

        Which they are is asked of the database, so that it is the same whoever computed them, and before which restart.
        """
        errors = ((result.job_id, *result.error) for result in results if result.error is not None)
        reasons = {job_id: message for job_id, code, message in errors if code == _NOT_FINITE}
        for job_id, message in sorted(reasons.items()):
            if self._store.begins_with_errors(job_id, _NOT_FINITE, FIRST_ROWS):
                self._fail(self._store.jobs([job_id]), f"its first {FIRST_ROWS} rows all are errors: {message}")

    def _fail(self, jobs: Iterable[Job], message: str) -> None:
        for job in jobs:
            self._store.fail(job.id, message)
            self._log.error("job failed: %s", message, extra={"action": "fail", "job": job.id})
