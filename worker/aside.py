"""The models that this machine leaves alone for a while, and why; kept in the database, so that a new process knows."""

import time
from collections.abc import Callable, Sequence

from storage.database import Database
from storage.faults import Fault, clear_fault, list_faults, note_fault
from worker.patience import Patience

DEATHS_SPARED = 8
"""Deaths in a pass, with no result between them, that cost the model no waiting: rows are being told apart, and each
death brings a culprit nearer. Two culprits at once need about five."""


class Aside:
    """What the workers of one machine know of its faults. ``clock``: unix seconds, by the database."""

    def __init__(
        self,
        database: Database,
        machine: str,
        *,
        waits_s: Sequence[float],
        clock: Callable[[], float],
        patience: Patience,
    ) -> None:
        self._database = database
        self._machine = machine
        self._waits_s = waits_s
        self._clock = clock
        self._patience = patience
        self._faults: dict[str, Fault] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read again what other workers of the machine may have noted.

        Raises:
            DatabaseUnreachable: for longer than patience lasts; so do the others.
        """
        found = self._patience(lambda: list_faults(self._database, self._machine))
        self._faults = {fault.model: fault for fault in found}

    def now(self) -> list[Fault]:
        """The faults whose models are left alone now, the one that is over first in front."""
        now = self._clock()
        return sorted((each for each in self._faults.values() if each.retry_at > now), key=lambda each: each.retry_at)

    @property
    def is_any(self) -> bool:
        """Whether any fault is remembered, also one whose time is over."""
        return bool(self._faults)

    def has(self, model: str) -> bool:
        """Whether a model is left alone now."""
        fault = self._faults.get(model)
        return fault is not None and fault.retry_at > self._clock()

    def note(self, model: str, message: str, *, spared: int = 0) -> Fault:
        """One fault more of a model; the first ``spared`` in a row cost no waiting."""
        fault = self._patience(
            lambda: note_fault(
                self._database,
                self._machine,
                model,
                message,
                now=self._clock(),
                waits_s=self._waits_s,
                spared=spared,
            )
        )
        self._faults[model] = fault
        return fault

    def clear(self, model: str) -> None:
        """A model works here."""
        if model in self._faults:
            self._patience(lambda: clear_fault(self._database, self._machine, model))
            del self._faults[model]


def sentence_of(faults: Sequence[Fault]) -> str:
    """For people: which models are left alone, until when, and why."""
    return "; ".join(
        f"leaves {fault.model} alone until {time.strftime('%H:%M:%S', time.localtime(fault.retry_at))}: {fault.message}"
        for fault in faults
    )
