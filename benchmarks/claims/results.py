"""What claims gave, by machine: kept in ``results.json``, shown in ``RESULTS.md``."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.claims.claim import Claim, Machine

FOLDER = Path(__file__).resolve().parent.parent
STORED, SHOWN = FOLDER / "results.json", FOLDER / "RESULTS.md"
KEPT = 5
"""Figures of one claim on one machine, so that nobody runs it until it is lucky unseen."""


@dataclass(frozen=True, slots=True)
class Result:
    """One figure, and when and of what it was measured."""

    value: float | None
    """None: the command failed, or its report had none."""
    date: str
    commit: str
    """With ``+`` behind it where files were changed."""
    load: float
    """Load average before the command began: whether other work was going on."""
    packages: str
    """Versions that a figure may depend on."""


@dataclass(slots=True)
class MachineResults:
    """The newest figures of each claim on one machine, the newest last."""

    kind: Machine
    results: dict[str, list[Result]]


Results = dict[str, MachineResults]
"""The results of each machine, by its description."""


def read(path: Path = STORED) -> Results:
    """What was kept; nothing where no file is."""
    if not path.exists():
        return {}
    stored: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {
        machine: MachineResults(
            Machine(each["kind"]),
            {name: [Result(**result) for result in results] for name, results in each["results"].items()},
        )
        for machine, each in stored.items()
    }


def add(machine: str, kind: Machine, name: str, result: Result, path: Path = STORED) -> None:
    """Keep one figure more. The file is read again: somebody else may have added to it meanwhile."""
    results = read(path)
    of_claim = results.setdefault(machine, MachineResults(kind, {})).results.setdefault(name, [])
    of_claim.append(result)
    del of_claim[:-KEPT]
    plain = {machine: {"kind": each.kind, "results": each.results} for machine, each in sorted(results.items())}
    _replace(path, json.dumps(plain, indent=1, ensure_ascii=False, default=asdict, sort_keys=True) + "\n")


def show(claims: Sequence[Claim], *, stored: Path = STORED, shown: Path = SHOWN) -> None:
    """Write the page anew."""
    _replace(shown, to_markdown(read(stored), claims))


def to_markdown(results: Results, claims: Sequence[Claim]) -> str:
    """The page."""
    return "\n".join(_lines(results, claims)) + "\n"


def _replace(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False) as file:
        file.write(text)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


def _lines(results: Results, claims: Sequence[Claim]) -> Iterator[str]:
    yield "# Results"
    yield ""
    yield "Written by `make claims`; do not edit. Each row is a claim with its line, and the newest figure of this"
    yield "kind of machine, with the range of the last ones; `make claims ONLY=name` runs one again. Load is the load"
    yield "average before the run: much above 0 says that other work went on. Figures of different machines do not"
    yield "compare. What is measured, and how, is in [README.md](README.md)."
    for machine, found in sorted(results.items()):
        yield ""
        yield from _table(machine, found, claims)
    yield ""
    yield "## Commands"
    yield ""
    yield "| Command | Claims |"
    yield "|---|---|"
    for command in dict.fromkeys(claim.command for claim in claims):
        names = ", ".join(f"`{claim.name}`" for claim in claims if claim.command == command)
        yield f"| `python -m {' '.join(command)}` | {names} |"


def _table(machine: str, found: MachineResults, claims: Sequence[Claim]) -> Iterator[str]:
    yield f"## {machine}"
    yield ""
    yield "| Claim | Measured | | Line | | Load | Date | Commit |"
    yield "|---|---|---|---|---|---|---|---|"
    notes = []
    for claim in claims:
        line = claim.line_for(found.kind)
        if line is None:
            continue
        if not (results := found.results.get(claim.name)):
            yield f"| `{claim.name}` | | {claim.sentence} | {line} | not run | | | |"
            continue
        newest = results[-1]
        is_met = newest.value is not None and line.is_met(newest.value)
        verdict = "met" if is_met else "**missed**"
        where = f"{newest.load:.1f} | {newest.date} | `{newest.commit}`"
        yield f"| `{claim.name}` | {_figure(results)} | {claim.sentence} | {line} | {verdict} | {where} |"
        if not is_met:
            known = claim.missed.get(found.kind)
            notes.append(f"- `{claim.name}`: {known.why if known else 'not explained yet'}")
    if notes:
        yield ""
        yield "Missed, and why:"
        yield ""
        yield from notes
    yield ""
    packages = dict.fromkeys(results[-1].packages for results in found.results.values() if results)
    yield f"Measured with {'; '.join(packages)}."


def _figure(results: Sequence[Result]) -> str:
    """``1.28 (1.21–1.28 of 3)``."""
    values = [result.value for result in results if result.value is not None]
    newest = "failed" if results[-1].value is None else f"{results[-1].value:.4g}"
    if len(results) == 1 or not values:
        return newest
    return f"{newest} ({min(values):.4g}–{max(values):.4g} of {len(results)})"
