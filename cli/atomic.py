"""Output files that appear whole or not at all, and never replace what a job was made from."""

import os
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

from cli.errors import FileAbsent, OutputNotWritten, OutputRefused
from cli.terminal import TerminalStream


def check_output(name: str, *, keep: Iterable[Path], option: str = "-o") -> None:
    """Refuses an output path before any work is done for it; ``-`` is stdout and always fine.

    Raises:
        FileAbsent: its folder does not exist.
        OutputRefused: it is a folder, or one of the files in ``keep`` (the dataset, the database).
    """
    if name == "-":
        return
    path = Path(name)
    if path.is_dir():
        raise OutputRefused(f"{option} {name} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise FileAbsent(f"the folder {path.parent} of {option} {name} does not exist; make it first")
    for kept in keep:
        if _same_file(path, kept):
            raise OutputRefused(f"{option} {name} would overwrite {kept}, which the job needs; choose another name")


@contextmanager
def open_output(name: str) -> Iterator[BinaryIO]:
    """A binary stream to stdout or to a file that appears, readable by its owner only, when the block ends well.

    An existing file keeps its permissions; a link's target is replaced, not the link; a device or pipe is written as it
    goes. On a terminal, what would command it is spelt out.

    Raises:
        OutputNotWritten: the file system refused; an existing file is as it was.
    """
    path = Path(name).resolve()
    try:
        if name == "-":
            yield cast(BinaryIO, TerminalStream(sys.stdout.buffer)) if sys.stdout.isatty() else sys.stdout.buffer
            sys.stdout.buffer.flush()
            return
        if path.exists() and not path.is_file():
            with path.open("wb") as stream:
                yield stream
            return
        with _replacement(path) as stream:
            yield stream
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputNotWritten(
            f"{'stdout' if name == '-' else name} could not be written: {error.strerror or error}; the outputs are "
            "safe in the database, fetch them again to another place"
        ) from error


@contextmanager
def _replacement(path: Path) -> Iterator[BinaryIO]:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as stream:
            if path.exists():
                os.fchmod(handle, stat.S_IMODE(path.stat().st_mode))
            yield stream
            stream.flush()
            os.fsync(handle)
        Path(temporary).replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return one.resolve() == other.resolve()
