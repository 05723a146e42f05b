"""Reads a dataset row by row, in constant memory: JSON lines from a file or stdin, or CSV by its suffix.

A fault of one line, one that is too long for a row among them, becomes a `BadLine`, so that the caller decides whether
it refuses the dataset; a fault of the whole file (absent, another encoding, another format) is an error at once. Lines
count from 1.
"""

import csv
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from cli.display import some_of
from cli.errors import DatasetFault, FileAbsent
from cli.lines import Lines, RowText, TooLong
from cli.nesting import text_is_deeper
from cli.sources import PATIENCE_S, Unreadable, open_dataset
from worker.limits import DEFAULT_LIMITS, Limits

_FOREIGN = (
    (b"\xff\xfe\x00\x00", "UTF-32 text", "convert it: iconv -f UTF-32 -t UTF-8"),
    (b"\x00\x00\xfe\xff", "UTF-32 text", "convert it: iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8"),
    (b"\x1f\x8b", "gzip-compressed", "unpack it: gunzip -c FILE | overnight enqueue - …"),
    (b"PAR1", "a Parquet file", "convert it to JSON lines first"),
)
"""First bytes, what the file then is, what to do."""

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the dataset."""

    line: int
    fields: dict[str, object]


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no row, and why."""

    line: int
    reason: str


class Dataset:
    """A dataset by its name on the command line: a path, or ``-`` for JSON lines on stdin."""

    def __init__(self, name: str, limits: Limits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self.is_stdin = name == "-"
        self.label = "stdin" if self.is_stdin else name
        """How messages call it."""
        self.path = None if self.is_stdin else Path(name)

    def check(self) -> None:
        """Refuses what can be refused without reading.

        Raises:
            FileAbsent: there is no such file.
            DatasetFault: it is a folder.
        """
        if self.path is None:
            return
        if self.path.is_dir():
            raise DatasetFault(f"{self.label} is a folder; name the dataset file in it")
        if not self.path.exists():
            raise FileAbsent(f"there is no file {self.label}; name a JSON-lines or CSV file, or - for stdin")

    def rows(self) -> Iterator[Row | BadLine]:
        """All rows in order; blank lines at the end are no rows.

        Raises:
            FileAbsent: there is no such file.
            DatasetFault: it cannot be read, holds no row, or is not UTF-8 text in JSON lines or CSV.
        """
        self.check()
        is_csv = self.path is not None and self.path.suffix.lower() == ".csv"
        empty = True
        with self._open() as stream:
            lines = Lines(stream, self._limits.row_bytes, self._refuse_foreign)
            for row in self._csv_rows(lines) if is_csv else self._json_rows(lines):
                empty = False
                yield row
        if empty:
            self._fault("holds no rows" if is_csv else "is empty", "a dataset has at least one row")

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        try:
            if self.path is None:
                yield sys.stdin.buffer
                return
            with open_dataset(self.path, patience_s=PATIENCE_S) as stream:
                yield stream
        except Unreadable as error:
            raise DatasetFault(f"{self.label} {error}") from None
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            raise DatasetFault(f"{self.label} cannot be read: {error.strerror or error}") from error

    def _refuse_foreign(self, beginning: bytes) -> None:
        """Refuses files of another kind by their first bytes."""
        for signature, kind, remedy in _FOREIGN:
            if beginning.startswith(signature):
                self._fault(f"is {kind}, not UTF-8 text", remedy)
        if b"\x00" in beginning:
            remedy = "if it is UTF-16, convert it: iconv -f UTF-16 -t UTF-8"
            self._fault("is not UTF-8 text (line 1 holds zero bytes)", remedy)

    def _json_rows(self, lines: Lines) -> Iterator[Row | BadLine]:
        last = 0
        """The line that was no blank one."""
        while True:
            try:
                line = next(lines)
            except StopIteration:
                return
            except TooLong:
                line = None
            if line is not None and not line.strip():
                continue
            for blank in range(last + 1, lines.number):
                yield BadLine(blank, "it is blank; blank lines are allowed only at the end")
            last = lines.number
            yield self._too_long(last) if line is None else _parse_line(last, line, self._limits)

    def _csv_rows(self, lines: Lines) -> Iterator[Row | BadLine]:
        csv.field_size_limit(2 * self._limits.row_bytes)  # never reached: rows are measured before
        text = RowText(lines, self._limits.row_bytes)
        reader = csv.reader(text, strict=True)
        names = self._csv_header(reader)
        while names is not None:
            text.begin_row()
            line = lines.number + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except TooLong:
                yield self._too_long(line)
                continue
            except csv.Error as error:
                yield BadLine(line, f"it is not valid CSV: {error}")
                continue
            if cells:
                yield _csv_row(line, names, cells)

    def _csv_header(self, reader: Iterator[list[str]]) -> list[str] | None:
        """The names of the fields; None where the file is empty."""
        try:
            names = next(reader, None)
        except csv.Error as error:
            self._fault(f"has no readable header: {error}", "the first line names the fields")
        except TooLong:
            self._fault(f"has a header that is too long: {self._limits.told('row_bytes')}", "shorten it")
        doubled = sorted(name for name, times in Counter(names or []).items() if times > 1)
        if doubled:
            self._fault(
                f"names the field {some_of(doubled[:1])!r} twice in its header", "give each column its own name"
            )
        return names

    def _too_long(self, line: int) -> BadLine:
        return BadLine(line, f"it is too long for a row: {self._limits.told('row_bytes')}")

    def _fault(self, what: str, remedy: str) -> NoReturn:
        raise DatasetFault(f"{self.label} {what}; {remedy}")


def _csv_row(line: int, names: list[str], cells: list[str]) -> Row | BadLine:
    if len(cells) != len(names):
        return BadLine(line, f"it has {len(cells)} cells where the header names {len(names)} fields")
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return BadLine(line, "it is not valid UTF-8")
    return Row(line, dict(zip(names, cells, strict=True)))


def _parse_line(number: int, line: bytes, limits: Limits) -> Row | BadLine:
    if text_is_deeper(line, limits.row_depth):
        return BadLine(number, f"it is nested too deep: {limits.told('row_depth')}")
    try:
        # Without its line end, so that a fault at the end of the line has a column of this line.
        value = _DECODER.decode(line.decode().rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return BadLine(number, f"it is not valid UTF-8 (byte {error.start + 1} of the line)")
    except json.JSONDecodeError as error:
        hint = "; it looks like a JSON array: write one object a line" if line.lstrip()[:1] == b"[" else ""
        return BadLine(number, f"it is not JSON ({error.msg}, column {error.colno}){hint}")
    except ValueError as error:
        return BadLine(number, f"it is not JSON ({error})")
    if not isinstance(value, dict):
        return BadLine(number, f'it is {_kind(value)}, not a JSON object such as {{"prompt": "…"}}')
    if _SURROGATE_ESCAPE.search(line) and not _is_unicode(value):
        return BadLine(number, "it holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return Row(number, value)


def _whole(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:
        raise ValueError(f"a number has {len(digits)} digits; write it as a string") from None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is too large; write it as a string")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value; write null or a number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=_whole, parse_float=_finite)


def _is_unicode(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: object) -> str:
    if value is None:
        return "null"
    kinds = {str: "a string", bool: "true or false", int: "a number", float: "a number", list: "an array"}
    return kinds[type(value)]
