"""The loop: what waits in the database, through the engine, back into the database. It knows no Celery.

Everything here runs on one thread, which also owns the engine. Times are unix seconds from ``clock``.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path

from engine.errors import DeviceUnavailable, EngineError, LaneFailed
from engine.request import Request
from storage.claims import ClaimedRequest, claim, give_back
from storage.database import Database
from storage.errors import ClaimLost, StorageError
from storage.jobs import Job, cancelled_among, fail_job, note_plan, runnable_jobs
from storage.results import record
from worker.bell import Bell
from worker.errors import ModelNotFound
from worker.fairness import Waiting, choose_model
from worker.feed import Feed
from worker.ledger import Ledger
from worker.logs import get_logger
from worker.models import ModelRef, model_dir_for, resolve_model
from worker.residency import Engine, Residency
from worker.rows import JobKeys, RowKey, to_request
from worker.sample import sample_workload
from worker.settings import Settings
from worker.watch import Watch

_COMMIT_S = 1.0


class Drain:
    """Drains one queue as one registered worker."""

    def __init__(
        self,
        *,
        database: Database,
        settings: Settings,
        worker_id: int,
        residency: Residency,
        prepare: Callable[[ModelRef, Path], None],
        reap: Callable[[], None],
        describe: Callable[[str | None, str], None],
        is_lost: Callable[[], bool],
        bell: Bell,
        clock: Callable[[], float],
    ) -> None:
        """``prepare`` makes the model directory of a reference; ``reap`` frees what dead workers hold; ``describe``
        tells people the model and state of this worker; ``is_lost``: another may have taken the claims."""
        self._database = database
        self._settings = settings
        self._worker_id = worker_id
        self._residency = residency
        self._prepare = prepare
        self._reap = reap
        self._describe = describe
        self._is_lost = is_lost
        self._bell = bell
        self._clock = clock
        self._log = get_logger({"worker": worker_id})

    def run(self) -> None:
        """Drain until the bell says stop.

        Raises:
            DatabaseUnreachable: nothing can be read or recorded; what is claimed comes back by the lease.
            ClaimLost: this worker was taken for dead; its claims are others' by now.
            EngineError: the device or the disk of the engine failed; what was claimed has been given back.
        """
        self._log.info("waiting for jobs", extra={"action": "start"})
        while not self._bell.is_stopping:
            self._bell.answer()
            self._reap()
            if not self.step():
                self._describe(self._resident, "idle")
                self._bell.wait(self._settings.scan_s)

    def preload(self, name: str) -> None:
        """Make a model resident before any job asks for it.

        Raises:
            ModelNotFound, EngineError: it cannot be loaded.
        """
        ref = resolve_model(name, self._settings)
        self._load(ref, model_dir_for(ref, self._settings), [])

    def step(self) -> bool:
        """One model's turn; False when there was nothing to do."""
        jobs = self._runnable()
        model = self._choose(jobs)
        if model is None:
            return False
        of_model = [job for job, ref, model_dir in jobs if str(model_dir) == model]
        ref, model_dir = next((ref, path) for _, ref, path in jobs if str(path) == model)
        try:
            engine = self._load(ref, model_dir, of_model)
        except DeviceUnavailable:
            raise
        except (ModelNotFound, EngineError, OSError) as error:
            self._fail(of_model, f"its model cannot be loaded: {error}")
            return True
        self._describe(model, "draining")
        ledger = Ledger(model)
        try:
            self._drain(engine, model, ledger)
        except StorageError:
            raise
        except EngineError as error:
            held = ledger.jobs
            self._salvage(ledger)
            self._residency.unload()
            if isinstance(error, LaneFailed):
                # The device or a disk misbehaves under us: another process may do better, this one will not.
                raise
            self._fail([job for job in of_model if job.id in held], str(error))
        except BaseException:
            self._salvage(ledger)
            raise
        return True

    def _drain(self, engine: Engine, model: str, ledger: Ledger) -> None:
        """One engine run over all jobs of ``model``."""
        feed = Feed(lambda limit: self._claim(engine, model, ledger, limit), self._clock)
        watch = Watch()
        committed_at = began_at = self._clock()
        with closing(engine.passes(feed)) as passes:  # type: ignore[type-var]
            for report in passes:
                ledger.add(report, began_at=began_at)
                if (warning := watch.add(report.stats)) is not None:
                    self._log.warning("%s", warning, extra={"action": "slow", "model": model})
                began_at = self._clock()
                if began_at - committed_at >= _COMMIT_S or not ledger.jobs:
                    self._commit(ledger)
                    self._drop_cancelled(engine, feed, ledger)
                    committed_at = began_at
                if self._bell.is_stopping:
                    break
                if self._is_lost():
                    raise ClaimLost(self._worker_id)
        self._commit(ledger)
        if self._bell.is_stopping:
            self._give_back()

    def _claim(self, engine: Engine, model: str, ledger: Ledger, limit: int) -> list[Request] | None:
        """Up to ``limit`` requests of the jobs of ``model``; None when the run should end."""
        if self._bell.is_stopping:
            return None
        jobs = self._runnable()
        if not jobs:
            return []
        if self._choose(jobs) != model:
            # No job of this model waits any more, or one of another model has waited too long.
            return None
        requests: list[Request] = []
        for job, _, model_dir in jobs:
            if str(model_dir) != model or len(requests) >= limit:
                continue
            rows = claim(self._database, self._worker_id, job.id, limit - len(requests), now=self._clock())
            if rows and job.plan != (plan := engine.plan.to_json()):
                note_plan(self._database, job.id, plan)
            keys = [RowKey(row.job_id, row.index, row.attempt) for row in rows]
            ledger.claim(keys)
            requests += self._requests(job, keys, rows, ledger)
            self._log.debug("claimed %d rows", len(rows), extra={"action": "claim", "job": job.id})
        return requests

    def _requests(
        self, job: Job, keys: Sequence[RowKey], rows: Sequence[ClaimedRequest], ledger: Ledger
    ) -> Iterable[Request]:
        for key, row in zip(keys, rows, strict=True):
            try:
                yield to_request(key, job.task, row.payload, job.params, job.seed)
            except ValueError as error:
                ledger.refuse(key, "invalid_request", str(error))

    def _commit(self, ledger: Ledger) -> None:
        results, passes = ledger.take()
        if results or passes:
            record(self._database, self._worker_id, results, passes, now=self._clock())

    def _salvage(self, ledger: Ledger) -> None:
        """After a failure: what is computed is recorded, what is not is given back."""
        self._commit(ledger)
        self._give_back()

    def _drop_cancelled(self, engine: Engine, feed: Feed, ledger: Ledger) -> None:
        if not ledger.jobs:
            return
        cancelled = cancelled_among(self._database, sorted(ledger.jobs))
        if cancelled:
            dropped = feed.forget(cancelled) + engine.drop(JobKeys(cancelled))
            ledger.forget(cancelled)
            for job_id in sorted(cancelled):
                self._log.info("dropped %d rows: cancelled", dropped, extra={"action": "cancel", "job": job_id})

    def _runnable(self) -> list[tuple[Job, ModelRef, Path]]:
        """The jobs that wait, in turn, with where their models are; a job whose model is absent is failed."""
        found: list[tuple[Job, ModelRef, Path]] = []
        for job in runnable_jobs(self._database, self._settings.queue):
            try:
                ref = resolve_model(job.model, self._settings)
                found.append((job, ref, model_dir_for(ref, self._settings)))
            except (ModelNotFound, OSError) as error:
                self._fail([job], str(error))
        return found

    def _choose(self, jobs: Sequence[tuple[Job, ModelRef, Path]]) -> str | None:
        waiting = [
            Waiting(job.id, str(model_dir), job.priority, job.created_at, has_started=job.started_at is not None)
            for job, _, model_dir in jobs
        ]
        return choose_model(
            waiting,
            resident=self._resident,
            left_at=self._residency.left_at,
            now=self._clock(),
            max_wait_s=self._settings.max_wait_s,
        )

    @property
    def _resident(self) -> str | None:
        return None if self._residency.model_dir is None else str(self._residency.model_dir)

    def _load(self, ref: ModelRef, model_dir: Path, jobs: Sequence[Job]) -> Engine:
        if self._residency.model_dir != model_dir:
            self._describe(str(model_dir), "loading")
            self._log.info("loading", extra={"action": "load", "model": model_dir})
            self._prepare(ref, model_dir)
        return self._residency.ensure(model_dir, lambda: sample_workload(self._database, model_dir, jobs))

    def _fail(self, jobs: Iterable[Job], message: str) -> None:
        for job in jobs:
            fail_job(self._database, job.id, message, now=self._clock())
            self._log.error("job failed: %s", message, extra={"action": "fail", "job": job.id})

    def _give_back(self) -> None:
        given = give_back(self._database, self._worker_id, now=self._clock())
        if given:
            self._log.info("gave back %d rows", given, extra={"action": "give_back"})
