"""Jobs, claims and outputs as one worker sees them: its number is filled in, and a database that cannot answer is
waited for."""

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from typing import Any

from storage.beginning import begins_with_errors
from storage.claims import (
    ClaimedRequest,
    claim,
    claim_suspects,
    give_back,
    give_back_requests,
    held_claims,
    served_jobs,
)
from storage.crashes import count_crash, only_suspects
from storage.database import Database
from storage.errors import JobNotFound
from storage.jobs import Job, cancelled_among, fail_job, get_job, note_plan, runnable_jobs
from storage.results import PassTotals, RequestResult, record
from worker.patience import Patience
from worker.rows import RowKey


class JobStore:
    """What a worker reads and writes of jobs. ``clock``: unix seconds.

    Each method raises DatabaseUnreachable where the database cannot answer for longer than patience lasts; ``claim``,
    ``claim_suspects`` and ``record`` raise ClaimLost where this worker was taken for dead.
    """

    def __init__(self, database: Database, worker_id: int, *, patience: Patience, clock: Callable[[], float]) -> None:
        self._database = database
        self._worker_id = worker_id
        self._patiently = patience
        self._clock = clock

    def runnable(self, queue: str) -> list[Job]:
        """The jobs of a queue with rows to claim, in turn."""
        return self._patiently(lambda: runnable_jobs(self._database, queue))

    def served_by_others(self) -> set[int]:
        """The jobs of which another worker holds rows."""
        return self._patiently(lambda: served_jobs(self._database, but=self._worker_id))

    def jobs(self, job_ids: Iterable[int]) -> list[Job]:
        """Those that are still there: one may have been pruned meanwhile."""
        found: list[Job] = []
        for job_id in sorted(job_ids):
            with suppress(JobNotFound):
                found.append(self._job(job_id))
        return found

    def cancelled(self, job_ids: Collection[int]) -> set[int]:
        """Those whose claimed rows nobody wants any longer."""
        return self._patiently(lambda: cancelled_among(self._database, sorted(job_ids)))

    def only_suspects(self, job_ids: Sequence[int]) -> set[int]:
        """Those whose waiting rows were all in a crash."""
        return self._patiently(lambda: only_suspects(self._database, job_ids))

    def begins_with_errors(self, job_id: int, code: str, number: int) -> bool:
        """Whether the first ``number`` rows of an unfinished job are all errors of this code, and none has a result."""
        return self._patiently(lambda: begins_with_errors(self._database, job_id, code, number))

    def note_plan(self, job_id: int, plan: dict[str, Any]) -> None:
        """What the job's rows are computed under from now on."""
        self._patiently(lambda: note_plan(self._database, job_id, plan))

    def fail(self, job_id: int, message: str) -> None:
        """Fail a job as a whole, if it is still there."""
        with suppress(JobNotFound):
            self._patiently(lambda: fail_job(self._database, job_id, message, now=self._clock()))

    def claim(self, job_id: int, limit: int) -> list[ClaimedRequest]:
        """Take up to ``limit`` rows of a job."""
        return self._patiently(lambda: claim(self._database, self._worker_id, job_id, limit, now=self._clock()))

    def claim_suspects(self, job_ids: Sequence[int]) -> list[ClaimedRequest]:
        """Take one group of rows that were in a crash together."""
        return self._patiently(lambda: claim_suspects(self._database, self._worker_id, job_ids, now=self._clock()))

    def held(self) -> set[RowKey]:
        """The rows that are claimed by this worker, as the database knows it."""
        return {RowKey(*each) for each in self._patiently(lambda: held_claims(self._database, self._worker_id))}

    def record(self, results: Sequence[RequestResult], passes: PassTotals | None) -> None:
        """Outputs and passes, in one transaction."""
        self._patiently(lambda: record(self._database, self._worker_id, results, passes, now=self._clock()))

    def give_back(self) -> int:
        """All rows that this worker holds; returns how many."""
        return self._patiently(lambda: give_back(self._database, self._worker_id, now=self._clock()))

    def give_back_rows(self, keys: Iterable[RowKey]) -> None:
        """Some of the rows that this worker holds; those that it holds no longer are left alone."""
        claims = _claims(keys)
        self._patiently(lambda: give_back_requests(self._database, self._worker_id, claims))

    def count_crash(self, keys: Iterable[RowKey]) -> None:
        """These rows were in a pass that failed for a reason that may be one of them."""
        claims = _claims(keys)
        self._patiently(lambda: count_crash(self._database, self._worker_id, claims))

    def _job(self, job_id: int) -> Job:
        return self._patiently(lambda: get_job(self._database, job_id))


def _claims(keys: Iterable[RowKey]) -> list[tuple[int, int, int]]:
    return [(key.job_id, key.index, key.attempt) for key in keys]
