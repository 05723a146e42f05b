"""What claims gave, by machine: kept in ``results.json``, shown in ``RESULTS.md``."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.claims.claim import Claim, Machine

FOLDER = Path(__file__).resolve().parent.parent
STORED, SHOWN = FOLDER / "results.json", FOLDER / "RESULTS.md"


@dataclass(frozen=True, slots=True)
class Result:
    """One figure, and when and of which commit it was measured."""

    value: float | None
    """None: the command failed."""
    date: str
    commit: str
    """With ``+`` behind it where files were changed."""
    load: float
    """Load average when the command began: whether other work was going on."""


@dataclass(slots=True)
class MachineResults:
    """The newest figure of each claim on one machine."""

    kind: Machine
    results: dict[str, Result]


Results = dict[str, MachineResults]
"""By the machine's description."""


def read(path: Path = STORED) -> Results:
    """What was kept; nothing where no file is."""
    if not path.exists():
        return {}
    stored: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {
        machine: MachineResults(
            Machine(each["kind"]), {name: Result(**result) for name, result in each["results"].items()}
        )
        for machine, each in stored.items()
    }


def write(results: Results, claims: Sequence[Claim], *, stored: Path = STORED, shown: Path = SHOWN) -> None:
    """Keep them, and write the page that shows them. Results of claims that are gone go, too."""
    known = {claim.name for claim in claims}
    for machine in results.values():
        machine.results = {name: result for name, result in machine.results.items() if name in known}
    plain = {name: {"kind": each.kind, "results": each.results} for name, each in sorted(results.items())}
    text = json.dumps(plain, indent=1, ensure_ascii=False, default=asdict, sort_keys=True)
    stored.write_text(text + "\n", encoding="utf-8")
    shown.write_text(to_markdown(results, claims), encoding="utf-8")


def to_markdown(results: Results, claims: Sequence[Claim]) -> str:
    """The page."""
    return "\n".join(_lines(results, claims)) + "\n"


def _lines(results: Results, claims: Sequence[Claim]) -> Iterator[str]:
    yield "# Results"
    yield ""
    yield "Written by `make claims`; do not edit. Each row is a claim with its line, and the newest figure of this kind"
    yield "of machine; `make claims ONLY=name` runs one again. Figures of different machines do not compare. What is"
    yield "measured, and how, is in [README.md](README.md)."
    for name, machine in sorted(results.items()):
        yield ""
        yield f"## {name}"
        yield ""
        yield "| Claim | | Line | Measured | | Date | Commit |"
        yield "|---|---|---|---|---|---|---|"
        missed = []
        for claim in claims:
            line = claim.line_for(machine.kind)
            result = machine.results.get(claim.name)
            if line is None:
                continue
            if result is None:
                yield f"| `{claim.name}` | {claim.sentence} | {line} | | not run | | |"
                continue
            is_met = result.value is not None and line.is_met(result.value)
            figure = "failed" if result.value is None else f"{result.value:.4g}"
            verdict = "met" if is_met else "**missed**"
            dated = f"{result.date} | `{result.commit}`"
            yield f"| `{claim.name}` | {claim.sentence} | {line} | {figure} | {verdict} | {dated} |"
            if not is_met:
                missed.append(f"- `{claim.name}`: {claim.missed.get(machine.kind, 'not explained yet')}")
        if missed:
            yield ""
            yield "Missed, and why:"
            yield ""
            yield from missed
    yield ""
    yield "## Commands"
    yield ""
    yield "| Command | Claims |"
    yield "|---|---|"
    for command in dict.fromkeys(claim.command for claim in claims):
        names = ", ".join(f"`{claim.name}`" for claim in claims if claim.command == command)
        yield f"| `python -m {' '.join(command)}` | {names} |"
