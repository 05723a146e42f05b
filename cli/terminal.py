"""Outputs on a terminal: control characters that a model or a dataset wrote are shown, and have no effect."""

from typing import BinaryIO

from worker.printable import printable


class TerminalStream:
    """Passes UTF-8 text on with its control characters spelt out; rows of JSON stay the same JSON.

    Each write holds whole characters, as rows do.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def write(self, text: bytes) -> int:
        """All of ``text``; returns its length."""
        shown = printable(text.decode(errors="backslashreplace"), keep="\n\t")
        self._stream.write(shown.encode())
        return len(text)

    def flush(self) -> None:
        """Send on what was written so far."""
        self._stream.flush()
