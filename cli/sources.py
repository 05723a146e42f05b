"""Opens the files that a person names as input, so that none of them hangs the command or fills its memory."""

import os
import select
import stat
from pathlib import Path
from typing import BinaryIO

PATIENCE_S = 5.0
"""How long somebody may take to open, or to fill, the other end of a pipe."""


class Unreadable(Exception):
    """The file is there and is nothing to read from; the text says why, without the file's name."""


def open_dataset(path: Path, *, patience_s: float) -> BinaryIO:
    """A file, or a pipe that somebody writes to (``<(zcat …)``); the caller closes it.

    Raises:
        Unreadable: a device, a socket, or a pipe that nobody wrote to for ``patience_s`` seconds.
        OSError: the file system refused.
    """
    # Without waiting: opening a pipe waits for its writer for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISFIFO(mode):
            _await_writer(descriptor, patience_s)
        elif not stat.S_ISREG(mode):
            raise Unreadable("is a device, not a file; name a file, or - for stdin")
        os.set_blocking(descriptor, True)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_small(path: Path, *, most: int) -> bytes:
    """The whole of a regular file.

    Raises:
        Unreadable: it is a device or a pipe, or has more than ``most`` bytes.
        OSError: the file system refused.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Unreadable("is not a regular file; write the text into one")
        content = stream.read(most + 1)
    if len(content) > most:
        raise Unreadable(f"has more than {most >> 10} KiB; shorten it")
    return content


def _await_writer(descriptor: int, patience_s: float) -> None:
    """Returns when there is something to read, or a writer who has not written yet."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    if poll.poll(1000 * patience_s):
        return
    try:
        os.read(descriptor, 1)
    except BlockingIOError:  # somebody holds the other end
        return
    # No writer, or one that came in this very moment, whose first byte is lost.
    raise Unreadable(f"is a pipe that nobody wrote to for {patience_s:g} s; start its writer first, or use - for stdin")
