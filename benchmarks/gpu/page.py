"""The page that ``make gpu`` writes: which card, what was run, and what came of it."""

import datetime
from collections.abc import Iterator, Sequence

from benchmarks.gpu.card import Card
from benchmarks.gpu.steps import Ran, Step

_MOST_WORDS = 100
"""Characters of a step's last line that are shown."""


def text(card: Card, date: datetime.date, commit: str, steps: Sequence[Step], ran: Sequence[Ran]) -> str:
    """The whole page. ``ran``: the first of ``steps``, up to one that failed."""
    return "\n".join(_all_lines(card, date, commit, steps, ran)) + "\n"


def _all_lines(
    card: Card, date: datetime.date, commit: str, steps: Sequence[Step], ran: Sequence[Ran]
) -> Iterator[str]:
    yield "# On a GPU"
    yield ""
    yield "Written by `make gpu`; do not edit. It runs these steps in order, up to the first that fails. Steps that"
    yield "compare with a line end in what they compared; the figures of claims are in"
    yield "[RESULTS.md](../benchmarks/RESULTS.md)."
    yield ""
    yield "| | |"
    yield "|---|---|"
    facts = {"Card": card.name, "Driver": card.driver, "PyTorch": card.torch, "Date": date.isoformat()}
    yield from (f"| {name} | {_cell(value)} |" for name, value in facts.items())
    yield f"| Commit | `{commit}` |"
    yield ""
    yield "| Step | | Seconds | Result | Its last words |"
    yield "|---|---|---|---|---|"
    yield from (_row(each) for each in ran)
    yield from (f"| `{step.name}` | {step.sentence} | | not run | |" for step in steps[len(ran) :])


def _row(ran: Ran) -> str:
    result = f"**failed**, exit code {ran.code}" if ran.code else "passed"
    return f"| `{ran.step.name}` | {ran.step.sentence} | {ran.seconds:.0f} | {result} | {_cell(ran.last_words)} |"


def _cell(words: str) -> str:
    """On one line, and no border of a table."""
    shown = words if len(words) <= _MOST_WORDS else f"{words[: _MOST_WORDS - 1]}…"
    return shown.replace("|", "\\|")
