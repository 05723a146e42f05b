"""Which jobs this worker could run now: those of its queue whose model is here and not left alone for a while."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from storage.database import Database
from storage.jobs import Job, runnable_jobs
from worker.errors import ModelNotFound
from worker.models import ModelRef, model_dir_for, resolve_model
from worker.settings import Settings


@dataclass(frozen=True, slots=True)
class Prospect:
    """A job that waits, and where its model is."""

    job: Job
    ref: ModelRef
    model_dir: Path

    @property
    def model(self) -> str:
        """Two jobs with equal ones may run together."""
        return str(self.model_dir)


def prospects(
    database: Database,
    settings: Settings,
    *,
    is_aside: Callable[[str], bool],
    absent: Callable[[Job, Exception], None],
) -> list[Prospect]:
    """The jobs with rows to claim, in turn.

    ``is_aside``: whether a model is left alone for now; ``absent`` is told of a job whose model is not here.

    Raises:
        DatabaseUnreachable: nothing can be read.
    """
    found: list[Prospect] = []
    for job in runnable_jobs(database, settings.queue):
        if is_aside(job.model):
            continue
        try:
            ref = resolve_model(job.model, settings)
            found.append(Prospect(job, ref, model_dir_for(ref, settings)))
        except (ModelNotFound, OSError) as error:
            absent(job, error)
    return found
