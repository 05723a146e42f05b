"""What a person sees: sentences on stderr, tables and one JSON document on stdout.

Nothing here is animated, and tables are never cut: an id can always be copied whole.
"""

import itertools
import os
import sys
from collections.abc import Iterable, Sequence

import click

from cli.json_text import json_text
from worker.printable import printable

__all__ = [
    "colour_wanted", "emit", "emit_json", "emit_table", "format_count", "format_rate", "format_seconds", "printable",
    "say", "some_of", "warn",
]  # fmt: skip

_LAYOUT = "\n\t"
"""Characters that lay a message out, and command no terminal."""


def say(text: str) -> None:
    """A message for people, on stderr; what it quotes commands no terminal."""
    click.echo(printable(text, keep=_LAYOUT), err=True)


def warn(text: str) -> None:
    """Something a person should know that stops nothing."""
    say(f"warning: {text}")


def emit(text: str) -> None:
    """A line of a result for people, on stdout."""
    click.echo(printable(text, keep=_LAYOUT))


def emit_json(document: object) -> None:
    """The one JSON document of a command, on stdout; half a surrogate (of a file name) becomes its JSON escape.

    On a terminal its other escapes are those of `printable`: the same JSON.
    """
    text = json_text(document, indent=2)
    click.echo((printable(text, keep="\n") if sys.stdout.isatty() else text).encode(errors="backslashreplace"))


def colour_wanted() -> bool:
    """Whether https://no-color.org allows colour."""
    return not os.environ.get("NO_COLOR")


def emit_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """An aligned table on stdout; the last column is not padded, no cell is shortened."""
    shown = [[printable(cell) for cell in row] for row in (headings, *rows)]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for index, row in enumerate(shown):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        click.echo(click.style(line, bold=True) if index == 0 and colour_wanted() else line)


def some_of(names: Iterable[str], *, most: int = 10, length: int = 40) -> str:
    """The first names of what may be many and long; ``none`` where there are none."""
    shown = [name if len(name) <= length else f"{name[: length - 1]}…" for name in itertools.islice(names, most + 1)]
    return ", ".join([*shown[:most], "…"] if len(shown) > most else shown) or "none"


def format_count(number: int) -> str:
    """``12345`` as ``12,345``."""
    return f"{number:,}"


def counted(number: int, noun: str) -> str:
    """``12,345 rows``, ``1 row``."""
    return f"{format_count(number)} {noun}{'' if number == 1 else 's'}"


def format_seconds(seconds: float) -> str:
    """``3725.4`` as ``1 h 2 min``; ``12.3`` as ``12 s``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def format_rate(tokens_per_s: float) -> str:
    """A throughput, with as many digits as mean something."""
    return f"{tokens_per_s:,.0f} tokens/s" if tokens_per_s >= 100 else f"{tokens_per_s:.3g} tokens/s"


def format_rows(rows_per_s: float) -> str:
    """A throughput in rows, with as many digits as mean something."""
    return f"{rows_per_s:,.0f} rows/s" if rows_per_s >= 100 else f"{rows_per_s:.3g} rows/s"
