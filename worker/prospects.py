"""Which jobs this worker could run now, and which model it should turn to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import CheckpointError
from storage.jobs import Job
from worker.aside import Aside
from worker.errors import ModelNotFound
from worker.fairness import Waiting, choose_model
from worker.fault_policy import FaultPolicy
from worker.faults import blame
from worker.job_store import JobStore
from worker.models import ModelRef, model_dir_for, resolve_model
from worker.residency import Residency
from worker.settings import Settings


@dataclass(frozen=True, slots=True)
class Prospect:
    """A job that waits, and where its model is."""

    job: Job
    ref: ModelRef
    model_dir: Path

    @property
    def model(self) -> str:
        """Jobs for which this is equal may run together."""
        return str(self.model_dir)


class Prospects:
    """The jobs of one queue, as far as this worker can run them. ``clock``: unix seconds."""

    def __init__(
        self,
        store: JobStore,
        settings: Settings,
        residency: Residency,
        aside: Aside,
        policy: FaultPolicy,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._settings = settings
        self._residency = residency
        self._aside = aside
        self._policy = policy
        self._clock = clock
        self.left: str | None = None
        """Why the first job that is to be exact is left to other workers, in a sentence; ``None``: none is."""

    def look(self) -> list[Prospect]:
        """The jobs with rows to claim whose model is here and not left alone for now, in turn.

        What is absent here is borne as a fault of this machine, which may fail the job. What is to be exact is left to
        others where this worker rounds.

        Raises:
            DatabaseUnreachable: for longer than patience lasts.
        """
        found: list[Prospect] = []
        self.left = None
        for job in self._store.runnable(self._settings.queue):
            if self._aside.has(job.model):
                continue
            try:
                ref = resolve_model(job.model, self._settings)
                model_dir = model_dir_for(ref, self._settings)
                why_not = self._residency.why_not_exact(model_dir) if job.exact else None
                if why_not is None:
                    found.append(Prospect(job, ref, model_dir))
                elif self.left is None:
                    self.left = f"leaves job {job.id} to others, which is to be exact: {why_not}"
            except (ModelNotFound, CheckpointError, OSError) as error:
                self._policy.bear(error, [job], str(error), blame(error))
        return found

    def choose(self, waiting: Sequence[Prospect]) -> str | None:
        """The model to work with now; None where nothing waits.

        Raises:
            DatabaseUnreachable: for longer than patience lasts.
        """
        if not waiting:
            return None
        served = self._store.served_by_others()
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
            resident=self._residency.model,
            left_at=self._residency.left_at,
            now=self._clock(),
            max_wait_s=self._settings.max_wait_s,
        )
