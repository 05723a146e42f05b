"""One run of the engine: rows of the jobs of one model, from their claim to their commit.

Everything here runs on the drain's thread.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import closing

from engine.request import Request
from storage.claims import ClaimedRequest
from storage.crashes import FOUND_GUILTY
from storage.jobs import Job
from worker.aside import Aside
from worker.bell import Bell
from worker.blackbox import BlackBox
from worker.fault_policy import FaultPolicy
from worker.feed import Feed, Refill
from worker.job_store import JobStore
from worker.joblog import JobLog
from worker.ledger import Ledger, key_of
from worker.logs import BoundLogger
from worker.prospects import Prospects
from worker.residency import Engine
from worker.rows import JobKeys, RowKey, to_request
from worker.watch import Watch

_COMMIT_S = 1.0


class ModelRun:
    """Feeds one engine until no job of its model waits, another model's turn has come, or the bell says stop."""

    def __init__(
        self,
        engine: Engine,
        model: str,
        *,
        store: JobStore,
        prospects: Prospects,
        aside: Aside,
        policy: FaultPolicy,
        box: BlackBox,
        bell: Bell,
        joblog: JobLog,
        log: BoundLogger,
        clock: Callable[[], float],
        reconcile_s: float,
        suspects_of: Sequence[Job] | None,
    ) -> None:
        """``reconcile_s``: how often claims are compared with the database's, in seconds; ``suspects_of``: run nothing
        but one group of rows of these jobs that were in a crash together; None: rows of all jobs of the model."""
        self._engine = engine
        self._model = model
        self._store = store
        self._prospects = prospects
        self._aside = aside
        self._policy = policy
        self._box = box
        self._bell = bell
        self._joblog = joblog
        self._log = log
        self._clock = clock
        self._reconcile_s = reconcile_s
        self._suspects_of = suspects_of
        self._ledger = Ledger(model)

    @property
    def jobs(self) -> frozenset[int]:
        """The jobs with claimed rows that have no result yet."""
        return self._ledger.jobs

    def work(self, after_pass: Callable[[], None]) -> None:
        """Run to the end. ``after_pass`` is called between passes and may raise to end it.

        However it ends, rows may still be claimed: what is computed of them waits for ``commit``, and giving the others
        back is the caller's. So it is where the bell ended it, which is no error.

        Raises:
            EngineError, or whatever else a pass ended in.
            DatabaseUnreachable: for longer than patience lasts.
            ClaimLost: this worker was taken for dead.
        """
        refill = self._rows if self._suspects_of is None else self._suspects(self._suspects_of)
        # Not kept: a feed knows its run, and a run that knew its feed would be freed at some time or other.
        feed = Feed(refill, self._clock, begins=lambda request: self._box.begins(_row(request)))
        watch = Watch()
        committed_at = reconciled_at = began_at = self._clock()
        with closing(self._engine.passes(feed)) as passes:  # type: ignore[type-var]
            for report in passes:
                self._ledger.add(report, began_at=began_at)
                self._box.ends(key_of(output) for output in report.outputs)
                if (warning := watch.add(report.stats)) is not None:
                    self._log.warning("%s", warning, extra={"action": "slow", "model": self._model})
                began_at = self._clock()
                if began_at - committed_at >= _COMMIT_S or not self._ledger.jobs:
                    self.commit()
                    self._drop_unwanted(feed)
                    committed_at = began_at
                    if began_at - reconciled_at >= self._reconcile_s:
                        self._reconcile(feed)
                        reconciled_at = began_at
                if self._bell.is_stopping:
                    break
                after_pass()
        self.commit()

    def commit(self) -> None:
        """Record what is computed, and fail a job that this shows to be hopeless."""
        results, passes = self._ledger.take()
        if results or passes:
            self._store.record(results, passes)
            self._policy.judge(results)
        if passes and self._aside.is_any:
            for job in self._store.jobs({result.job_id for result in results}):
                self._aside.clear(job.model)
        self._joblog.committed(self._ledger.jobs)

    def _rows(self, limit: int) -> list[Request] | None:
        """Rows of all jobs of the model, in turn."""
        if self._bell.is_stopping:
            return None
        waiting = self._prospects.look()
        if not waiting:
            return []
        if self._prospects.choose(waiting) != self._model:
            # No job of this model waits any more, or one of another model has waited too long.
            return None
        of_model = [each.job for each in waiting if each.model == self._model]
        apart = self._store.only_suspects([job.id for job in of_model])
        requests: list[Request] = []
        for job in of_model:
            if job.id in apart:
                # Its turn has come, and it must run alone: this run takes nothing more.
                return requests or None
            if len(requests) >= limit:
                break
            rows = self._store.claim(job.id, limit - len(requests))
            self._log.debug("claimed %d rows", len(rows), extra={"action": "claim", "job": job.id})
            if rows and job.plan != (plan := self._engine.plan.to_json()):
                self._store.note_plan(job.id, plan)
            requests += self._requests({job.id: job}, rows)
        return requests

    def _suspects(self, jobs: Sequence[Job]) -> Refill:
        """Fills the run once, with rows that were in a crash together, and with nothing else."""
        by_id = {job.id: job for job in jobs}
        is_filled = False

        def refill(limit: int) -> list[Request] | None:  # noqa: ARG001 (a group runs whole)
            nonlocal is_filled
            if is_filled or self._bell.is_stopping:
                return None
            is_filled = True
            rows = self._store.claim_suspects(list(by_id))
            self._log.info("rows that run apart, since they were in a crash: %d", len(rows), extra={"action": "apart"})
            return list(self._requests(by_id, rows))

        return refill

    def _requests(self, jobs: Mapping[int, Job], rows: Sequence[ClaimedRequest]) -> Iterator[Request]:
        keys = [RowKey(row.job_id, row.index, row.attempt) for row in rows]
        self._ledger.claim(keys)
        for key, row in zip(keys, rows, strict=True):
            job = jobs[row.job_id]
            self._joblog.claims(job)
            if row.crash_group == FOUND_GUILTY:
                self._ledger.refuse(
                    key,
                    "crashed",
                    f"the worker ended {row.crashes} times while it computed this row, the last time with no other",
                )
                continue
            try:
                yield to_request(key, job.task, row.payload, job.params, job.seed)
            except ValueError as error:
                self._ledger.refuse(key, "invalid_request", str(error))

    def _drop_unwanted(self, feed: Feed) -> None:
        if not self._ledger.jobs:
            return
        for job_id in sorted(self._store.cancelled(self._ledger.jobs)):
            dropped = self._forget(feed, JobKeys([job_id]))
            self._log.info("dropped %d rows: their job has ended", dropped, extra={"action": "cancel", "job": job_id})

    def _reconcile(self, feed: Feed) -> None:
        """What the database thinks that we run, and what we do run, made equal.

        They differ where a job was cancelled and queued again between two looks, or a message of ours was lost.
        """
        held = self._store.held()
        if strays := held - self._ledger.claims:
            self._store.give_back_rows(strays)
            self._log.warning("gave back %d rows that nobody ran", len(strays), extra={"action": "give_back"})
        if lost := self._ledger.claims - held:
            self._forget(feed, lost)

    def _forget(self, feed: Feed, keys: JobKeys | Container[RowKey]) -> int:
        dropped = feed.forget(keys) + self._engine.drop(keys)
        self._box.ends(self._ledger.forget(keys))
        return dropped


def _row(request: Request) -> RowKey:
    assert isinstance(request.key, RowKey)
    return request.key
