"""What a person sees: sentences on stderr, tables and one JSON document on stdout.

Nothing here is animated, and tables are never cut: an id can always be copied whole.
"""

import json
import os
from collections.abc import Sequence

import click


def say(text: str) -> None:
    """A message for people, on stderr."""
    click.echo(text, err=True)


def warn(text: str) -> None:
    """Something a person should know that stops nothing."""
    click.echo(f"warning: {text}", err=True)


def emit_json(document: object) -> None:
    """The one JSON document of a command, on stdout; half a surrogate (of a file name) becomes its JSON escape."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False).encode(errors="backslashreplace"))


def colour_wanted() -> bool:
    """Whether https://no-color.org allows colour."""
    return not os.environ.get("NO_COLOR")


def emit_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """An aligned table on stdout; the last column is not padded, no cell is shortened."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for index, row in enumerate([headings, *rows]):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        click.echo(click.style(line, bold=True) if index == 0 and colour_wanted() else line)


def format_count(number: int) -> str:
    """``12345`` as ``12,345``."""
    return f"{number:,}"


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
