"""The shapes of output rows: JSON lines and CSV, written as they come."""

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, BinaryIO

from cli.errors import OutputRefused
from cli.json_text import finite, json_text
from worker.payloads import OUTPUT_KEYS

if TYPE_CHECKING:
    from storage.results import OutputRow

FORMATS = ("jsonl", "csv")
_SUFFIXES = {".csv": "csv", ".jsonl": "jsonl", ".json": "jsonl"}
_NOT_WRITTEN = {
    *(".parquet", ".pq", ".arrow", ".feather", ".tsv", ".xlsx", ".xls", ".ods"),
    *(".gz", ".bz2", ".xz", ".zst", ".zip"),
}
"""Suffixes that promise a reader what we do not write."""

_FORMULA = re.compile(r"[\t\r\n]|[\s\x00-\x1f\u200b-\u200f\u2060\ufeff]*[=+\-@＝＋－＠]")
"""Spreadsheets run a cell that starts so: they drop white space, and read full-width signs as the others."""


def format_of(output: str, given: str | None) -> str:
    """The format asked for, else that of the output's suffix, else JSON lines.

    Raises:
        OutputRefused: the suffix is that of a format which is not written.
    """
    suffix = PurePath(output).suffix
    if given is None and suffix.lower() in _NOT_WRITTEN:
        raise OutputRefused(
            f"-o {output}: {suffix} is not written; name a file that ends in .jsonl or .csv, or say --format"
        )
    return given or _SUFFIXES.get(suffix.lower(), "jsonl")


def output_document(row: "OutputRow") -> dict[str, Any]:
    """One output row, in the shape of the contract."""
    error = None if row.error_code is None else {"code": row.error_code, "message": row.error_message}
    return {
        "id": row.row_id,
        "index": row.index,
        "status": str(row.status),
        "output": row.output,
        "error": error,
        "usage": {"prompt_tokens": row.prompt_tokens, "completion_tokens": row.completion_tokens},
    }


def write_rows(
    rows: "Iterable[OutputRow]", stream: BinaryIO, *, file_format: str, task: str, choices: Sequence[str] | None = None
) -> int:
    """Writes all rows in their order; returns how many. ``choices``: those of every row, where all have the same."""
    if file_format == "csv":
        return _write_csv(rows, stream, task, choices or ())
    count = 0
    for row in rows:
        stream.write(json_text(output_document(row)).encode() + b"\n")
        count += 1
    return count


def _write_csv(rows: "Iterable[OutputRow]", stream: BinaryIO, task: str, choices: Sequence[str]) -> int:
    by_choice = task == "choose" and bool(choices)
    columns = ("label",) if by_choice else OUTPUT_KEYS[task]
    more = [f"logprob_{choice}" for choice in choices] if by_choice else []
    usage = ("prompt_tokens", "completion_tokens")
    heading = ["id", "index", "status", *columns, *more, "error_code", "error_message", *usage]
    stream.write(_csv_line(list(heading)))
    count = 0
    for row in rows:
        output = row.output or {}
        cells = [row.row_id, row.index, str(row.status), *(output.get(name) for name in columns)]
        if by_choice:
            logprobs = output.get("logprobs") or {}
            cells += [logprobs.get(choice) for choice in choices]
        cells += [row.error_code, row.error_message, row.prompt_tokens, row.completion_tokens]
        stream.write(_csv_line([_cell(cell) for cell in cells]))
        count += 1
    return count


def _csv_line(cells: list[object]) -> bytes:
    line = io.StringIO()
    # Python quotes a cell for the characters of the line end only: both, so that a lone \r is quoted too.
    csv.writer(line, lineterminator="\r\n").writerow(cells)
    return line.getvalue().removesuffix("\r\n").encode() + b"\n"


def _cell(value: object) -> object:
    """Numbers as they are, nested values as JSON; text that a spreadsheet would run is quoted with an apostrophe."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        value = finite(value)
    if value is None or isinstance(value, int | float):
        return value
    text = value if isinstance(value, str) else json_text(value)
    return f"'{text}" if _FORMULA.match(text) else text
