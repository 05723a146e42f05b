"""What a claim is: a sentence, the command that measures it, the figure in its report, and the line for the figure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import isfinite
from typing import Any


class Machine(StrEnum):
    """The kinds of machine that claims are made for."""

    CUDA = "cuda"
    AMX = "amx"
    """A CPU with matrix units, no GPU."""
    CPU = "cpu"
    """A CPU without, no GPU."""
    FLOAT32 = "float32"
    """A CPU that is slow in bfloat16, no GPU: systems are compared in float32."""


class Need(StrEnum):
    """What not every machine has."""

    MEMORY_CAP = "a memory limit that the kernel enforces"
    SMOLLM2 = "a model from PyPI that `make venv` leaves out"


@dataclass(frozen=True, slots=True)
class AtLeast:
    """A line that a figure must reach."""

    value: float

    def is_met(self, figure: float) -> bool:
        """Whether it does."""
        return figure >= self.value

    def __str__(self) -> str:
        return f"≥ {self.value:g}"


@dataclass(frozen=True, slots=True)
class AtMost:
    """A line that a figure must not exceed."""

    value: float

    def is_met(self, figure: float) -> bool:
        """Whether it keeps below."""
        return figure <= self.value

    def __str__(self) -> str:
        return f"≤ {self.value:g}"


Line = AtLeast | AtMost


@dataclass(frozen=True, slots=True)
class Missed:
    """A line that is known to be missed on a kind of machine."""

    why: str
    """What stands in its way, for people."""
    yet: Line
    """What holds all the same: worse than that is news."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One figure."""

    name: str
    sentence: str
    """What is claimed, in words; the figure stands before it."""
    command: tuple[str, ...]
    """A module and its arguments, as after ``python -m``; it prints one JSON document."""
    figure: str
    """Where the figure is in it: keys joined by full stops. True counts as 1."""
    line: Line | Mapping[Machine, Line]
    """For every machine, or by kind; a kind that is absent has no such claim."""
    needs: frozenset[Need] = frozenset()
    requires: Mapping[str, object] = field(default_factory=dict)
    """What the report must say besides, for the figure to be worth anything."""
    missed: Mapping[Machine, Missed] = field(default_factory=dict)

    def line_for(self, machine: Machine) -> Line | None:
        """Its line on a kind of machine; None: the claim is not for it."""
        return self.line.get(machine) if isinstance(self.line, Mapping) else self.line

    def read(self, document: Mapping[str, Any]) -> float:
        """The figure in a report.

        Raises:
            ValueError: it is not there, is no finite number, or the report does not say what it must.
        """
        for path, wanted in self.requires.items():
            if (found := _at(document, path)) != wanted:
                raise ValueError(f"{path} is {found!r:.60} in the report, and must be {wanted!r}")
        figure = _at(document, self.figure)
        if not isinstance(figure, bool | int | float) or not isfinite(figure):
            raise ValueError(f"{self.figure} is {figure!r:.60} in the report, and must be a number")
        return float(figure)


def _at(document: Mapping[str, Any], path: str) -> Any:
    """The value at some keys; None where there is none."""
    found: Any = document
    for key in path.split("."):
        if not isinstance(found, Mapping):
            return None
        found = found.get(key)
    return found
