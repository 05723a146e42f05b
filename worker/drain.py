"""The loop: what waits in the database, through the engine, back into the database. It knows no Celery.

Everything here runs on one thread, which also owns the engine. Times are unix seconds from ``clock``.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import EngineError
from engine.request import Request
from storage.claims import (
    ClaimedRequest,
    Doing,
    claim,
    claim_suspects,
    give_back,
    give_back_requests,
    held_claims,
    served_jobs,
)
from storage.crashes import FOUND_GUILTY, count_crash, only_suspects
from storage.database import Database
from storage.errors import ClaimLost, JobNotFound, StorageError
from storage.jobs import Job, cancelled_among, fail_job, get_job, note_plan
from storage.results import record
from worker.aside import DEATHS_SPARED, LOADING, RUNNING, Aside, sentence_of
from worker.bell import Bell
from worker.blackbox import BlackBox
from worker.fairness import Waiting, choose_model
from worker.faults import Blame, blame, blame_in_pass
from worker.feed import Feed
from worker.joblog import JobLog
from worker.ledger import Ledger, key_of
from worker.logs import get_logger
from worker.models import ModelRef, model_dir_for, resolve_model
from worker.patience import Patience
from worker.prospects import Prospect, prospects
from worker.residency import Engine, Residency
from worker.rows import JobKeys, RowKey, to_request
from worker.sample import sample_workload
from worker.settings import Settings
from worker.watch import Watch

if TYPE_CHECKING:
    from engine.planner.workload import Workload

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
        describe: Callable[[Doing], None],
        is_lost: Callable[[], bool],
        bell: Bell,
        clock: Callable[[], float],
        patience: Patience,
        aside: Aside,
        box: BlackBox,
        is_alone: bool = False,
    ) -> None:
        """``prepare`` makes the model directory of a reference; ``reap`` frees what dead workers hold; ``describe``
        tells people what this worker does; ``is_lost``: another may have taken the claims; ``is_alone``: there are no
        other workers that could do better, so a fault of this machine fails the job."""
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
        self._patiently = patience
        self._aside = aside
        self._box = box
        self._is_alone = is_alone
        self._log = get_logger({"worker": worker_id})
        self._joblog = JobLog(self._log, self._jobs, clock)

    def run(self) -> None:
        """Drain until the bell says stop.

        Raises:
            DatabaseUnreachable: nothing can be read or recorded, for longer than patience lasts; what is claimed comes
                back by the lease.
            ClaimLost: this worker was taken for dead; its claims are others' by now.
            DeviceFailed, DeviceUnavailable: the device is lost; what was claimed has been given back.
        """
        self._log.info("waiting for jobs", extra={"action": "start"})
        while not self._bell.is_stopping:
            self._bell.answer()
            self._reap()
            self._aside.refresh()
            if self._patiently(lambda: held_claims(self._database, self._worker_id)):
                self._give_back()  # the engine is empty: whatever is claimed here, nobody runs
            if not self.step():
                self._idle()

    def preload(self, name: str) -> None:
        """Make a model resident before any job asks for it.

        Raises:
            ModelNotFound, EngineError: it cannot be loaded.
        """
        if self._aside.has(name):
            self._log.warning("not loaded now: %s", sentence_of(self._aside.now()), extra={"action": "aside"})
            return
        ref = resolve_model(name, self._settings)
        self._load(ref, model_dir_for(ref, self._settings), [], name)

    def step(self) -> bool:
        """One model's turn; False when there was nothing to do."""
        waiting = self._prospects()
        model = self._choose(waiting)
        if model is None:
            return False
        of_model = [each for each in waiting if each.model == model]
        first = of_model[0]
        jobs = [each.job for each in of_model]
        try:
            engine = self._load(first.ref, first.model_dir, jobs, first.job.model)
        except StorageError:
            raise
        except Exception as error:  # noqa: BLE001 (classified below; a fault of ours is told with its traceback)
            whose = blame(error)
            whose = Blame.MACHINE if whose is Blame.UNKNOWN else whose
            self._bear(error, jobs, f"its model cannot be loaded: {error}", whose)
            return True
        suspects = first.job.id in self._patiently(lambda: only_suspects(self._database, [first.job.id]))
        self._run(engine, model, jobs, apart=suspects)
        return True

    def _run(self, engine: Engine, model: str, jobs: Sequence[Job], *, apart: bool) -> None:
        """One engine run; what fails in it is borne by whom it belongs to."""
        self._describe(Doing("draining", model))
        ledger = Ledger(model)
        refill = self._suspects(ledger, jobs) if apart else self._rows(engine, ledger, model)
        feed = Feed(refill, self._clock, begins=lambda request: self._box.begins(_row(request)))
        try:
            self._drain(engine, model, ledger, feed)
        except StorageError:
            raise
        except Exception as error:  # noqa: BLE001 (classified below)
            held, running = ledger.jobs, self._box.running
            self._salvage(ledger)
            self._unload()
            whose = blame_in_pass(error)
            if whose in (Blame.UNKNOWN, Blame.DEVICE):
                # The process may well end of it, and a row may well be the reason.
                self._patiently(lambda: count_crash(self._database, self._worker_id, _claims(running)))
            self._bear(error, self._jobs(held) or jobs, str(error), whose)
        except BaseException:
            self._salvage(ledger)
            raise
        finally:
            self._box.clear()

    def _drain(self, engine: Engine, model: str, ledger: Ledger, feed: Feed) -> None:
        watch = Watch()
        committed_at = reconciled_at = began_at = self._clock()
        with closing(engine.passes(feed)) as passes:  # type: ignore[type-var]
            for report in passes:
                ledger.add(report, began_at=began_at)
                self._box.ends(key_of(output) for output in report.outputs)
                if (warning := watch.add(report.stats)) is not None:
                    self._log.warning("%s", warning, extra={"action": "slow", "model": model})
                began_at = self._clock()
                if began_at - committed_at >= _COMMIT_S or not ledger.jobs:
                    self._commit(ledger)
                    self._drop_cancelled(engine, feed, ledger)
                    committed_at = began_at
                    if began_at - reconciled_at >= self._settings.scan_s:
                        self._reconcile(engine, feed, ledger)
                        reconciled_at = began_at
                if self._bell.is_stopping:
                    break
                if self._is_lost():
                    raise ClaimLost(self._worker_id)
        self._commit(ledger)
        if self._bell.is_stopping:
            self._give_back()

    def _rows(self, engine: Engine, ledger: Ledger, model: str) -> Callable[[int], list[Request] | None]:
        """Refills a run with rows of all jobs of ``model``, in turn."""

        def refill(limit: int) -> list[Request] | None:
            if self._bell.is_stopping:
                return None
            waiting = self._prospects()
            if not waiting:
                return []
            if self._choose(waiting) != model:
                # No job of this model waits any more, or one of another model has waited too long.
                return None
            of_model = [each.job for each in waiting if each.model == model]
            apart = self._patiently(lambda: only_suspects(self._database, [job.id for job in of_model]))
            requests: list[Request] = []
            for job in of_model:
                if job.id in apart:
                    # Its turn has come, and it must run alone: this run takes nothing more.
                    return requests or None
                if len(requests) >= limit:
                    break
                rows = self._claim(job, limit - len(requests))
                if rows and job.plan != (plan := engine.plan.to_json()):
                    self._patiently(lambda job=job, plan=plan: note_plan(self._database, job.id, plan))  # type: ignore[misc]
                requests += self._requests(ledger, {job.id: job}, rows)
            return requests

        return refill

    def _suspects(self, ledger: Ledger, jobs: Sequence[Job]) -> Callable[[int], list[Request] | None]:
        """Fills a run once, with rows that were in a crash together, and with nothing else."""
        by_id = {job.id: job for job in jobs}
        is_filled = False

        def refill(limit: int) -> list[Request] | None:  # noqa: ARG001 (a group runs whole)
            nonlocal is_filled
            if is_filled or self._bell.is_stopping:
                return None
            is_filled = True
            rows = self._patiently(
                lambda: claim_suspects(self._database, self._worker_id, list(by_id), now=self._clock())
            )
            self._log.info("rows that run apart, since they were in a crash: %d", len(rows), extra={"action": "apart"})
            return list(self._requests(ledger, by_id, rows))

        return refill

    def _claim(self, job: Job, limit: int) -> list[ClaimedRequest]:
        rows = self._patiently(lambda: claim(self._database, self._worker_id, job.id, limit, now=self._clock()))
        self._log.debug("claimed %d rows", len(rows), extra={"action": "claim", "job": job.id})
        return rows

    def _requests(self, ledger: Ledger, jobs: dict[int, Job], rows: Sequence[ClaimedRequest]) -> Iterator[Request]:
        keys = [RowKey(row.job_id, row.index, row.attempt) for row in rows]
        ledger.claim(keys)
        for key, row in zip(keys, rows, strict=True):
            job = jobs[row.job_id]
            self._joblog.claims(job)
            if row.crash_group == FOUND_GUILTY:
                ledger.refuse(
                    key,
                    "crashed",
                    f"the worker ended {row.crashes} times while it computed this row, the last time with no other",
                )
                continue
            try:
                yield to_request(key, job.task, row.payload, job.params, job.seed)
            except ValueError as error:
                ledger.refuse(key, "invalid_request", str(error))

    def _commit(self, ledger: Ledger) -> None:
        results, passes = ledger.take()
        if results or passes:
            self._patiently(lambda: record(self._database, self._worker_id, results, passes, now=self._clock()))
        if passes and self._aside.is_any:
            for job in self._jobs({result.job_id for result in results}):
                self._aside.clear(job.model)
        self._joblog.committed(ledger.jobs)

    def _salvage(self, ledger: Ledger) -> None:
        """After a failure: what is computed is recorded, what is not is given back."""
        self._commit(ledger)
        self._give_back()

    def _drop_cancelled(self, engine: Engine, feed: Feed, ledger: Ledger) -> None:
        if not ledger.jobs:
            return
        for job_id in sorted(self._patiently(lambda: cancelled_among(self._database, sorted(ledger.jobs)))):
            dropped = self._forget(engine, feed, ledger, JobKeys([job_id]))
            self._log.info("dropped %d rows: cancelled", dropped, extra={"action": "cancel", "job": job_id})

    def _reconcile(self, engine: Engine, feed: Feed, ledger: Ledger) -> None:
        """What the database thinks that we run, and what we do run, made equal.

        They differ where a job was cancelled and queued again between two looks, or a message of ours was lost.
        """
        held = {RowKey(*each) for each in self._patiently(lambda: held_claims(self._database, self._worker_id))}
        if strays := held - ledger.claims:
            self._patiently(lambda: give_back_requests(self._database, self._worker_id, _claims(strays)))
            self._log.warning("gave back %d rows that nobody ran", len(strays), extra={"action": "give_back"})
        if lost := ledger.claims - held:
            self._forget(engine, feed, ledger, lost)

    def _forget(self, engine: Engine, feed: Feed, ledger: Ledger, keys: "JobKeys | frozenset[RowKey]") -> int:
        dropped = feed.forget(keys) + engine.drop(keys)
        self._box.ends(ledger.forget(keys))
        return dropped

    def _bear(self, error: Exception, jobs: Sequence[Job], message: str, whose: Blame) -> None:
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

    def _jobs(self, job_ids: Iterable[int]) -> list[Job]:
        """Those that are still there: one may have been pruned meanwhile."""
        found: list[Job] = []
        for job_id in sorted(job_ids):
            with suppress(JobNotFound):
                found.append(self._patiently(lambda job_id=job_id: get_job(self._database, job_id)))  # type: ignore[misc]
        return found

    def _prospects(self) -> list[Prospect]:
        def absent(job: Job, error: Exception) -> None:
            self._bear(error, [job], str(error), blame(error))

        return self._patiently(
            lambda: prospects(self._database, self._settings, is_aside=self._aside.has, absent=absent)
        )

    def _choose(self, waiting: Sequence[Prospect]) -> str | None:
        if not waiting:
            return None
        served = self._patiently(lambda: served_jobs(self._database, but=self._worker_id))
        return choose_model(
            [
                Waiting(
                    each.job.id,
                    each.model,
                    each.job.priority,
                    each.job.created_at,
                    is_served=each.job.id in served,
                )
                for each in waiting
            ],
            resident=self._resident,
            left_at=self._residency.left_at,
            now=self._clock(),
            max_wait_s=self._settings.max_wait_s,
        )

    @property
    def _resident(self) -> str | None:
        return None if self._residency.model_dir is None else str(self._residency.model_dir)

    def _load(self, ref: ModelRef, model_dir: Path, jobs: Sequence[Job], name: str) -> Engine:
        def sample() -> "Workload | None":
            try:
                return self._patiently(lambda: sample_workload(self._database, model_dir, jobs, self._box.begins))
            except (StorageError, EngineError):
                raise
            except Exception as error:  # noqa: BLE001 (a row that nobody foresaw: it is found once it runs)
                self._log.warning("no plan for these rows: %s", error, exc_info=error, extra={"action": "sample"})
                return None
            finally:
                self._box.ends(self._box.running)

        if self._residency.model_dir == model_dir:
            return self._residency.ensure(model_dir, sample)
        self._describe(Doing("loading", str(model_dir)))
        self._log.info("loading", extra={"action": "load", "model": model_dir})
        self._box.loads(name)
        try:
            self._prepare(ref, model_dir)
            return self._residency.ensure(model_dir, sample, lambda state: self._describe(Doing(state, str(model_dir))))
        finally:
            self._box.loads(None)

    def _unload(self) -> None:
        try:
            self._residency.unload()
        except Exception as error:  # noqa: BLE001 (the failure before it is the one that counts)
            self._log.warning("unloading failed as well: %s", error, extra={"action": "unload"})

    def _idle(self) -> None:
        """Say so, and wait for the bell, the next scan, or the end of a model's waiting time."""
        wait_s = self._settings.scan_s
        faults = self._aside.now()
        if not faults:
            self._describe(Doing("idle", self._resident))
        else:
            now = self._clock()
            self._describe(Doing("waiting", self._resident, sentence_of(faults), faults[0].retry_at))
            wait_s = min(wait_s, max(0.0, faults[0].retry_at - now))
        self._bell.wait(wait_s)

    def _fail(self, jobs: Iterable[Job], message: str) -> None:
        for job in jobs:
            with suppress(JobNotFound):
                self._patiently(lambda job=job: fail_job(self._database, job.id, message, now=self._clock()))  # type: ignore[misc]
            self._log.error("job failed: %s", message, extra={"action": "fail", "job": job.id})

    def _give_back(self) -> None:
        given = self._patiently(lambda: give_back(self._database, self._worker_id, now=self._clock()))
        if given:
            self._log.info("gave back %d rows", given, extra={"action": "give_back"})


def _row(request: Request) -> RowKey:
    assert isinstance(request.key, RowKey)
    return request.key


def _claims(keys: Iterable[RowKey]) -> list[tuple[int, int, int]]:
    return [(key.job_id, key.index, key.attempt) for key in keys]
