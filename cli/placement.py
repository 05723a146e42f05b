"""PLACEMENT as given on the command line: for the engine as values, for a worker process as arguments again."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from engine.planner.plan import PlanOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What a person asked for; None means "you decide". The names are the options' names."""

    device: str | None = None
    dtype: str | None = None
    device_memory: int | None = None
    host_memory: int | None = None
    disk_space: int | None = None
    disk_dir: Path | None = None
    weights: str | None = None
    """``20/80/0``: percent on device, host and disk."""
    kv: str | None = None
    activations: str | None = None
    micro_batch: int | None = None
    """Tokens."""
    micro_batches: int | None = None
    schedule: str | None = None
    """``mixed`` or ``block``."""

    @classmethod
    def take(cls, options: dict[str, Any]) -> Self:
        """Moves the placement's values out of a command's keyword arguments."""
        return cls(**{field.name: options.pop(field.name) for field in fields(cls)})

    def given(self) -> Mapping[str, object]:
        """The options that were given."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def arguments(self) -> list[str]:
        """The same options for another command line; the folder absolute."""
        words: list[str] = []
        for name, value in self.given().items():
            text = str(value.absolute()) if isinstance(value, Path) else str(value)
            words += [f"--{name.replace('_', '-')}", text]
        return words

    def plan_options(self) -> "PlanOptions":
        """The engine's form of it; sizes in bytes, shares parsed."""
        from engine.planner.plan import PlanOptions
        from engine.tiers import Shares

        values: dict[str, Any] = dict(self.given())
        for name in ("weights", "kv"):
            if name in values:
                values[name] = Shares.parse(values[name])
        return PlanOptions(**values)
