"""A linear program whose variables have names. No torch."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Generic, TypeVar

Name = TypeVar("Name", bound=Hashable)


class LinearProgram(Generic[Name]):
    """Maximises a weighted sum of variables, none of them below 0, under linear constraints."""

    def __init__(self, variables: Sequence[Name]) -> None:
        self._column = {name: index for index, name in enumerate(variables)}
        self._at_most: list[tuple[list[float], float]] = []
        self._equal: list[tuple[list[float], float]] = []
        self._zero: set[Name] = set()

    def at_most(self, terms: Mapping[Name, float], limit: float = 0.0) -> None:
        """Constrain the weighted sum of some variables from above."""
        self._at_most.append((self._row(terms), limit))

    def equal(self, terms: Mapping[Name, float], value: float = 0.0) -> None:
        """Constrain the weighted sum of some variables to a value."""
        self._equal.append((self._row(terms), value))

    def without(self, name: Name) -> None:
        """Constrain a variable to 0."""
        self._zero.add(name)

    def copy(self) -> "LinearProgram[Name]":
        """The same program, to which more constraints may be added."""
        other = LinearProgram(list(self._column))
        other._at_most, other._equal, other._zero = list(self._at_most), list(self._equal), set(self._zero)
        return other

    def maximise(self, terms: Mapping[Name, float]) -> dict[Name, float] | None:
        """The variables' values at the greatest weighted sum; ``None``: the constraints exclude each other."""
        import numpy as np  # heavy, and only planning needs them
        from scipy.optimize import linprog

        solved = linprog(
            c=[-weight for weight in self._row(terms)],
            A_ub=np.array([row for row, _ in self._at_most]),
            b_ub=np.array([limit for _, limit in self._at_most]),
            A_eq=np.array([row for row, _ in self._equal]),
            b_eq=np.array([value for _, value in self._equal]),
            bounds=[(0.0, 0.0 if name in self._zero else None) for name in self._column],
            method="highs",
        )
        if solved.status != 0:
            return None
        # The solver's tolerances let variables be a little below 0.
        return {name: max(0.0, float(solved.x[column])) for name, column in self._column.items()}

    def _row(self, terms: Mapping[Name, float]) -> list[float]:
        row = [0.0] * len(self._column)
        for name, weight in terms.items():
            row[self._column[name]] = weight
        return row
