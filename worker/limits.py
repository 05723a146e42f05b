"""How large one row of a dataset may be, and how long its prompt may take; each limit is a setting.

A row above a limit becomes an error row that names the limit, so that one row never takes the memory or the time of a
night's work.
"""

from dataclasses import dataclass, fields
from types import MappingProxyType

from engine.units import KIB, MIB, format_bytes

__all__ = ["CEILINGS", "DEFAULT_LIMITS", "NAMES", "Limits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one row may be; the names are those of the settings. Sizes are in bytes of UTF-8."""

    row_bytes: int = MIB
    """A line of JSON, or a row of CSV with all its lines."""
    row_fields: int = 1000
    """Fields of a row."""
    row_depth: int = 64
    """Lists and objects within each other, the row itself included."""
    row_choices: int = 1000
    """Choices of a row that has its own."""
    id_bytes: int = KIB
    """The field ``id`` as JSON text."""
    id_depth: int = 8
    """Lists and objects within each other in the field ``id``."""
    render_s: float = 2.0
    """Seconds of computing that the template may take for one row."""
    prompt_bytes: int = MIB
    """What the template may make of one row."""

    def told(self, name: str) -> str:
        """The value of a limit and where it is set, for the end of a sentence."""
        value = getattr(self, name)
        amount = f"{value:,}"
        if name.endswith("_bytes"):
            amount = format_bytes(value)
        elif name.endswith("_s"):
            amount = f"{value:g} s"
        return f"the limit is {amount} (OVERNIGHT_{name.upper()}, or {name} in overnight.toml)"


DEFAULT_LIMITS = Limits()
NAMES = tuple(field.name for field in fields(Limits))
CEILINGS = MappingProxyType({"row_bytes": 64 * MIB, "prompt_bytes": 64 * MIB, "row_depth": 200, "id_depth": 200})
"""No setting goes beyond: SQLite stores no value of 1 GB (escaped, a text may grow sixfold), and Python reads no JSON
that is nested much deeper, the less so the deeper its own stack is."""
