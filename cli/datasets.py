"""Reads a dataset row by row, in constant memory: JSON lines from a file or stdin, or CSV by its suffix.

A fault of one line, one that is too long for a row among them, becomes a `BadLine`, so that the caller decides whether
it refuses the dataset; a fault of the whole file (absent, another encoding, another format) is an error at once. Lines
count from 1.
"""

import csv
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn

from cli.display import some_of
from cli.errors import DatasetFault, FileAbsent
from cli.lines import Lines, RowText, TooLong
from cli.rows import BadLine, Row, csv_row, json_row
from cli.sources import PATIENCE_S, Unreadable, open_dataset
from worker.limits import DEFAULT_LIMITS, Limits

__all__ = ["BadLine", "Dataset", "Row"]

_FOREIGN = (
    (b"\xff\xfe\x00\x00", "UTF-32 text", "convert it: iconv -f UTF-32 -t UTF-8"),
    (b"\x00\x00\xfe\xff", "UTF-32 text", "convert it: iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8"),
    (b"\x1f\x8b", "gzip-compressed", "unpack it: gunzip -c FILE | overnight enqueue - …"),
    (b"PAR1", "a Parquet file", "convert it to JSON lines first"),
)
"""First bytes, what the file then is, what to do."""


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
            yield self._too_long(last) if line is None else json_row(last, line, self._limits)

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
                yield csv_row(line, names, cells)

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
