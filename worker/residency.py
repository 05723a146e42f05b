"""Which model is loaded. Weights stay where they are between jobs; one model at a time."""

from collections.abc import Callable, Container, Hashable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from engine.request import Request

if TYPE_CHECKING:
    from engine.passes import PassReport


class Engine(Protocol):
    """What the worker needs of ``engine.Engine``."""

    def passes(self, requests: Iterator[Request | None]) -> "Iterator[PassReport]":
        """One report a pass; closing the iterator drops everything unfinished."""

    def drop(self, keys: Container[Hashable]) -> int:
        """Between passes: forget these requests."""

    def close(self) -> None:
        """Free all memory."""


class Residency:
    """Keeps at most one engine; loading another model closes it first, so that both never need to fit."""

    def __init__(self, load: Callable[[Path], Engine], clock: Callable[[], float]) -> None:
        self._load = load
        self._clock = clock
        self._engine: Engine | None = None
        self._model_dir: Path | None = None
        self.left_at: dict[str, float] = {}
        """When each model was unloaded to make room for another; unix seconds."""

    @property
    def model_dir(self) -> Path | None:
        """The model directory of the resident model."""
        return self._model_dir

    def ensure(self, model_dir: Path) -> Engine:
        """The engine of ``model_dir``, loaded now unless it is resident.

        Raises:
            EngineError: it cannot be loaded; nothing is resident then.
        """
        if self._engine is not None and self._model_dir == model_dir:
            return self._engine
        self.unload()
        self._engine = self._load(model_dir)
        self._model_dir = model_dir
        self.left_at.pop(str(model_dir), None)
        return self._engine

    def unload(self) -> None:
        """Close the resident engine, if there is one."""
        engine, self._engine = self._engine, None
        model_dir, self._model_dir = self._model_dir, None
        if model_dir is not None:
            self.left_at[str(model_dir)] = self._clock()
        if engine is not None:
            engine.close()
