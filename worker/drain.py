"""The loop: what waits in the database, through the engine, back into the database. It knows no Celery.

Everything here runs on one thread, which also owns the engine. Times are unix seconds from ``clock``.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from storage.claims import Doing
from storage.database import Database
from storage.errors import ClaimLost, StorageError
from storage.jobs import Job
from worker.aside import Aside, sentence_of
from worker.bell import Bell
from worker.blackbox import BlackBox
from worker.fault_policy import FaultPolicy
from worker.faults import Blame, blame, blame_in_pass
from worker.job_store import JobStore
from worker.joblog import JobLog
from worker.loader import Loader
from worker.logs import get_logger
from worker.model_run import ModelRun
from worker.models import ModelRef, model_dir_for, resolve_model
from worker.patience import Patience
from worker.prospects import Prospects
from worker.residency import Engine, Residency
from worker.sample import sample_workload
from worker.settings import Settings


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
        self._settings = settings
        self._worker_id = worker_id
        self._residency = residency
        self._reap = reap
        self._describe = describe
        self._is_lost = is_lost
        self._bell = bell
        self._clock = clock
        self._aside = aside
        self._box = box
        self._log = get_logger({"worker": worker_id})
        self._store = JobStore(database, worker_id, patience=patience, clock=clock)
        self._joblog = JobLog(self._log, self._store.jobs, clock)
        self._policy = FaultPolicy(self._store, aside, bell, self._log, is_alone=is_alone)
        self._prospects = Prospects(self._store, settings, residency, aside, self._policy, clock)
        self._loader = Loader(
            residency,
            box,
            self._log,
            prepare=prepare,
            describe=describe,
            sample=lambda model_dir, jobs, begins: patience(lambda: sample_workload(database, model_dir, jobs, begins)),
        )

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
            if self._store.held():
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
        self._loader.load(name, ref, model_dir_for(ref, self._settings), [])

    def step(self) -> bool:
        """One model's turn; False when there was nothing to do."""
        waiting = self._prospects.look()
        model = self._prospects.choose(waiting)
        if model is None:
            return False
        of_model = [each for each in waiting if each.model == model]
        first = of_model[0]
        jobs = [each.job for each in of_model]
        try:
            engine = self._loader.load(first.job.model, first.ref, first.model_dir, jobs)
        except StorageError:
            raise
        except Exception as error:  # noqa: BLE001 (classified below; a fault of ours is told with its traceback)
            whose = blame(error)
            whose = Blame.MACHINE if whose is Blame.UNKNOWN else whose
            self._policy.bear(error, jobs, f"its model cannot be loaded: {error}", whose)
            return True
        apart = first.job.id in self._store.only_suspects([first.job.id])
        self._run(engine, model, jobs, apart=apart)
        return True

    def _run(self, engine: Engine, model: str, jobs: Sequence[Job], *, apart: bool) -> None:
        """One engine run; a failure in it is classified, and acted upon, here."""
        self._describe(Doing("draining", model))
        run = ModelRun(
            engine,
            model,
            store=self._store,
            prospects=self._prospects,
            aside=self._aside,
            policy=self._policy,
            box=self._box,
            bell=self._bell,
            joblog=self._joblog,
            log=self._log,
            clock=self._clock,
            reconcile_s=self._settings.scan_s,
            suspects_of=jobs if apart else None,
        )
        try:
            run.work(self._check_claims)
            if self._bell.is_stopping:
                self._give_back()
        except StorageError:
            raise
        except Exception as error:  # noqa: BLE001 (classified below)
            held, running = run.jobs, self._box.running
            self._salvage(run)
            self._loader.unload()
            whose = blame_in_pass(error)
            if whose in (Blame.UNKNOWN, Blame.DEVICE):
                # The process may well end of it, and a row may well be the reason.
                self._store.count_crash(running)
            self._policy.bear(error, self._store.jobs(held) or jobs, str(error), whose)
        except BaseException:
            self._salvage(run)
            raise
        finally:
            self._box.clear()

    def _check_claims(self) -> None:
        if self._is_lost():
            raise ClaimLost(self._worker_id)

    def _salvage(self, run: ModelRun) -> None:
        """After a failure: what is computed is recorded, what is not is given back."""
        run.commit()
        self._give_back()

    def _give_back(self) -> None:
        if given := self._store.give_back():
            self._log.info("gave back %d rows", given, extra={"action": "give_back"})

    def _idle(self) -> None:
        """Say so, and wait for the bell, the next scan, or the end of a model's waiting time."""
        wait_s = self._settings.scan_s
        faults = self._aside.now()
        if not faults:
            self._describe(Doing("idle", self._residency.model, self._prospects.left))
        else:
            now = self._clock()
            self._describe(Doing("waiting", self._residency.model, sentence_of(faults), faults[0].retry_at))
            wait_s = min(wait_s, max(0.0, faults[0].retry_at - now))
        self._bell.wait(wait_s)
