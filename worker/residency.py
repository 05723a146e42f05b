"""Which model is loaded. Weights stay where they are between jobs; one model at a time."""

from collections.abc import Callable, Container, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from engine.request import Request

if TYPE_CHECKING:
    from engine.planner.plan import Plan
    from engine.planner.workload import Workload
    from engine.schedule.passes import PassReport

Sample = Callable[[], "Workload | None"]
"""The workload that waits for a model; ``None``: nothing is known of it."""
Tell = Callable[[str], None]
"""Told the worker's state, in a word for people: "loading", "measuring"."""


class Engine(Protocol):
    """What the worker needs of ``engine.Engine``."""

    plan: "Plan"

    def passes(self, requests: Iterator[Request | None]) -> "Iterator[PassReport]":
        """One report a pass; closing the iterator drops everything unfinished."""

    def drop(self, keys: Container[Hashable]) -> int:
        """Between passes: forget these requests."""

    def close(self) -> None:
        """Free all memory."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine, and what is known of its plan."""

    engine: Engine
    seconds_saved: Callable[["Workload"], float] | None = None
    """Seconds saved by loading the model again with a plan for this workload; 0 or less: it does not pay. ``None``:
    nobody can tell, since this machine was not measured."""

    def is_better_anew(self, sample: Sample) -> bool:
        """Whether loading the model again pays, for the workload that waits."""
        if self.seconds_saved is None:
            return False
        workload = sample()
        return workload is not None and self.seconds_saved(workload) > 0


class Residency:
    """Keeps at most one engine; loading another model closes it first, so that both never need to fit."""

    def __init__(
        self,
        load: Callable[[Path, Sample, Tell], Loaded],
        clock: Callable[[], float],
        why_not_exact: Callable[[Path], str | None] = lambda _: None,
    ) -> None:
        """``why_not_exact``: of a model directory, what this worker would round of it; see ``worker.exactness``."""
        self.why_not_exact = why_not_exact
        self._load = load
        self._clock = clock
        self._loaded: Loaded | None = None
        self._model_dir: Path | None = None
        self.left_at: dict[str, float] = {}
        """When each model was unloaded to make room for another; unix seconds."""

    @property
    def model_dir(self) -> Path | None:
        """The model directory of the resident model."""
        return self._model_dir

    @property
    def model(self) -> str | None:
        """The resident model's directory as a text, by which jobs of one model are known; None: there is none."""
        return None if self._model_dir is None else str(self._model_dir)

    def ensure(self, model_dir: Path, sample: Sample = lambda: None, tell: Tell = lambda _: None) -> Engine:
        """The engine of ``model_dir``, loaded now unless it is resident.

        It is loaded again where the work has changed so much that another plan pays for moving the weights.

        Raises:
            EngineError: it cannot be loaded; nothing is resident then.
        """
        if self._loaded is not None and self._model_dir == model_dir and not self._loaded.is_better_anew(sample):
            return self._loaded.engine
        self.unload()
        self._loaded = self._load(model_dir, sample, tell)
        self._model_dir = model_dir
        self.left_at.pop(str(model_dir), None)
        return self._loaded.engine

    def unload(self) -> None:
        """Close the resident engine, if there is one."""
        loaded, self._loaded = self._loaded, None
        model_dir, self._model_dir = self._model_dir, None
        if model_dir is not None:
            self.left_at[str(model_dir)] = self._clock()
        if loaded is not None:
            loaded.engine.close()
