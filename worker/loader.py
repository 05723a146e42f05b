"""Makes a model resident, and tells while it does: people by the worker's state, the finder of a death by the box."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import EngineError
from storage.claims import Doing
from storage.errors import StorageError
from storage.jobs import Job
from worker.blackbox import BlackBox
from worker.logs import BoundLogger
from worker.models import ModelRef
from worker.residency import Engine, Residency
from worker.rows import RowKey

if TYPE_CHECKING:
    from engine.planner.workload import Workload

SampleJobs = Callable[[Path, Sequence[Job], Callable[[RowKey], None]], "Workload | None"]
"""What jobs still want of a model, from a few of their rows, each told before it is looked into."""


class Loader:
    """Loads the model that jobs ask for into the residency."""

    def __init__(
        self,
        residency: Residency,
        box: BlackBox,
        log: BoundLogger,
        *,
        prepare: Callable[[ModelRef, Path], None],
        describe: Callable[[Doing], None],
        sample: SampleJobs,
    ) -> None:
        """``prepare`` makes the model directory of a reference; ``describe`` tells people what this worker does."""
        self._residency = residency
        self._box = box
        self._log = log
        self._prepare = prepare
        self._describe = describe
        self._sample = sample

    def load(self, name: str, ref: ModelRef, model_dir: Path, jobs: Sequence[Job]) -> Engine:
        """The engine of a model, planned for what ``jobs`` still want. ``name``: as they name it.

        Raises:
            EngineError, OSError: it cannot be loaded. If its directory could not be made, the model that was resident
                still is; otherwise none is.
            DatabaseUnreachable: for longer than patience lasts.
            ClaimLost: this worker was taken for dead.
        """

        def sample() -> "Workload | None":
            return self._workload(model_dir, jobs)

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

    def unload(self) -> None:
        """After a failure, which is what counts: another one here is only logged."""
        try:
            self._residency.unload()
        except Exception as error:  # noqa: BLE001 (the failure before it is the one that counts)
            self._log.warning("unloading failed as well: %s", error, extra={"action": "unload"})

    def _workload(self, model_dir: Path, jobs: Sequence[Job]) -> "Workload | None":
        try:
            return self._sample(model_dir, jobs, self._box.begins)
        except (StorageError, EngineError):
            raise
        except Exception as error:  # noqa: BLE001 (a row that nobody foresaw: it is found once it runs)
            self._log.warning("no plan for these rows: %s", error, exc_info=error, extra={"action": "sample"})
            return None
        finally:
            self._box.ends(self._box.running)
