"""Lines of a stream in little memory, however long the lines are."""

from collections.abc import Callable
from typing import BinaryIO, Self

from engine.units import KIB

_SKIP_BYTES = 64 * KIB
_UTF8_BOM = b"\xef\xbb\xbf"


class TooLong(Exception):
    """A line, or a row of several, is longer than a row may be; the rest of it will be skipped."""

    def __init__(self, num_quotes: int = 0) -> None:
        super().__init__()
        self.num_quotes = num_quotes
        """Quotes in the part of the line that was read."""


class Lines:
    """The lines with their ends, without a byte-order mark; those above the limit raise, and the next follows.

    ``number`` is that of the line that was read last; they count from 1.
    """

    def __init__(self, stream: BinaryIO, limit: int, look: Callable[[bytes], None]) -> None:
        """``look`` sees the beginning of the first line and may refuse the whole stream."""
        self._stream = stream
        self._limit = limit
        self._look = look
        self._inside = False
        self.number = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        """The next line.

        Raises:
            TooLong: it has more than ``limit`` bytes without its end. It is skipped when the next is asked for, so
                that a line without any end is refused at once.
        """
        self.skip_rest()
        line = self._stream.readline(self._limit + 2)  # with its end
        if not line:
            raise StopIteration
        self.number += 1
        if self.number == 1:
            self._look(line)
            line = line.removeprefix(_UTF8_BOM)
        ended = line.endswith(b"\n")
        if len(line.rstrip(b"\r\n")) > self._limit or (not ended and len(line) > self._limit):
            self._inside = not ended
            raise TooLong(line.count(b'"'))
        return line

    def skip_rest(self) -> int:
        """Skips what is left of a line that was too long; how many quotes were in it."""
        num_quotes = 0
        while self._inside:
            piece = self._stream.readline(_SKIP_BYTES)
            self._inside = bool(piece) and not piece.endswith(b"\n")
            num_quotes += piece.count(b'"')
        return num_quotes


class RowText:
    """The text of CSV rows, for `csv.reader`: a row that spans lines may be as long as a line, and no longer.

    Bytes that are no UTF-8 travel as surrogates, so that one bad row does not end the reading.
    """

    def __init__(self, lines: Lines, limit: int) -> None:
        self._lines = lines
        self._limit = limit
        self._size = 0
        self._num_quotes = 0
        self._is_cut = False

    def begin_row(self) -> None:
        """The next line begins a row: what is left of one that was too long is skipped, to the end of its last cell."""
        if self._is_cut:
            self._skip_rest()
        self._size = self._num_quotes = 0
        self._is_cut = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        """The next line.

        Raises:
            TooLong: it would make the row too long.
        """
        try:
            line = next(self._lines)
            self._num_quotes += line.count(b'"')
            # Line ends within the row count, for a cell may hold nothing else; the last one does not.
            if self._size + len(line.rstrip(b"\r\n")) > self._limit:
                raise TooLong
            self._size += len(line)
        except TooLong as error:
            self._num_quotes += error.num_quotes
            self._is_cut = True
            raise
        return line.decode("utf-8", "surrogateescape")

    def _skip_rest(self) -> None:
        """A line end within a cell has an odd number of quotes before it."""
        self._num_quotes += self._lines.skip_rest()
        while self._num_quotes % 2:
            try:
                self._num_quotes += next(self._lines).count(b'"')
            except TooLong as error:
                self._num_quotes += error.num_quotes + self._lines.skip_rest()
            except StopIteration:
                return
