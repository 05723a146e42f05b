"""The models that this worker leaves alone for a while, and why.

What a worker met itself (no such model here, no room within its budgets) it keeps to itself: another one beside it may
have other folders, budgets and devices. That processes died of a model is kept in the database, for the whole machine,
so that the next process knows.
"""

import time
from collections.abc import Callable, Sequence

from storage.database import Database
from storage.faults import Fault, clear_fault, list_faults, note_fault, wait_after
from worker.patience import Patience

LOADING, RUNNING = "loading", "running"
"""What the worker was doing with a model when it failed; each kind is counted apart."""
DEATHS_SPARED = 8
"""Deaths in a pass, with no result between them, that cost the model no waiting: rows are being told apart, and each
death halves the rows that a culprit may be among. Two culprits at once need about five."""
_Key = tuple[str, str]
"""A model, and the kind of its fault."""


class Aside:
    """The faults that one worker knows of. ``clock``: unix seconds, by the database."""

    def __init__(
        self,
        database: Database,
        machine: str,
        *,
        waits_s: Sequence[float],
        clock: Callable[[], float],
        patience: Patience,
        is_alone: bool = False,
    ) -> None:
        """``is_alone``: there are no others to leave anything to, so nothing is left alone."""
        self._database = database
        self._machine = machine
        self._waits_s = waits_s
        self._clock = clock
        self._patience = patience
        self._is_alone = is_alone
        self._deaths: dict[_Key, Fault] = {}
        self._own: dict[_Key, Fault] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read again of what models processes died on this machine.

        Raises:
            DatabaseUnreachable: for longer than patience lasts; so do the others.
        """
        found = self._patience(lambda: list_faults(self._database, self._machine))
        self._deaths = {(fault.model, fault.kind): fault for fault in found}

    def now(self) -> list[Fault]:
        """The faults whose models are left alone now, the one that is over first in front."""
        if self._is_alone:
            return []
        now = self._clock()
        known = [*self._deaths.values(), *self._own.values()]
        return sorted((each for each in known if each.retry_at > now), key=lambda each: each.retry_at)

    @property
    def is_any(self) -> bool:
        """Whether any fault is remembered, also one whose time is over."""
        return bool(self._deaths or self._own)

    def has(self, model: str) -> bool:
        """Whether a model is left alone now."""
        return any(fault.model == model for fault in self.now())

    def note(self, model: str, message: str, kind: str = LOADING, *, spared: int = 0) -> Fault:
        """A fault that this worker met; the first ``spared`` in a row cost no waiting."""
        before = self._own.get((model, kind))
        count = 1 + (before.count if before else 0)
        now = self._clock()
        retry_at = now + wait_after(count, self._waits_s, spared)
        fault = Fault(self._machine, model, kind, count, message, now, retry_at)
        self._own[model, kind] = fault
        return fault

    def note_death(self, model: str, message: str, kind: str, *, spared: int = 0) -> Fault:
        """A process of this machine died of a model, as far as anybody can tell."""
        fault = self._patience(
            lambda: note_fault(
                self._database,
                self._machine,
                model,
                message,
                now=self._clock(),
                waits_s=self._waits_s,
                kind=kind,
                spared=spared,
            )
        )
        self._deaths[model, kind] = fault
        return fault

    def clear(self, model: str) -> None:
        """A model works here."""
        if any(key[0] == model for key in self._deaths):
            self._patience(lambda: clear_fault(self._database, self._machine, model))
        for known in (self._deaths, self._own):
            for key in [key for key in known if key[0] == model]:
                del known[key]


def sentence_of(faults: Sequence[Fault]) -> str:
    """For people: which models are left alone, until when, and why."""
    return "; ".join(
        f"leaves {fault.model} alone until {time.strftime('%H:%M:%S', time.localtime(fault.retry_at))}: {fault.message}"
        for fault in faults
    )
