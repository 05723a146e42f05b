"""A flight recorder: what a worker was doing, for whoever finds out why it died.

One small file a worker, in the home folder, says which model is being loaded and which rows are in a pass. The worker
holds a lock on it, which the kernel releases however it dies: a file that nobody holds proves a death, and tells what
was in hand. It survives any death of the process; a power cut may lose it, and then no row is blamed.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from engine.units import MIB
from worker.rows import RowKey

_COMPACT_BYTES = MIB


@dataclass(frozen=True, slots=True)
class Death:
    """What a worker was doing when it died."""

    worker_id: int
    loading: str | None
    """The model that it was loading, as its job names it."""
    running: tuple[RowKey, ...]
    """Rows that were in a pass, or on their way into it."""
    is_alone: bool = False
    """It was one run's own worker, with that run's budgets: how it loads says nothing of others."""


class BlackBox:
    """Records for one worker. Use from the drain's thread; close it at an orderly end, which leaves no file."""

    def __init__(self, home: Path, database_url: str, worker_id: int, *, is_alone: bool = False) -> None:
        """Raises OSError where the file cannot be made."""
        folder = _folder(home)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = folder / f"{_mark(database_url)}-{worker_id}"
        # Locked before it has its name, so that nobody takes it for a dead worker's.
        unnamed = folder / f".{self._path.name}"
        self._file = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        unnamed.rename(self._path)
        self._running: dict[RowKey, None] = {}
        self._size = 0
        self._is_alone = is_alone
        self._empty()

    @property
    def running(self) -> tuple[RowKey, ...]:
        """The rows that are in hand now."""
        return tuple(self._running)

    def loads(self, model: str | None) -> None:
        """A model is being loaded; None: no longer."""
        self._write(f"load {quote(model or '')}\n")

    def begins(self, key: RowKey) -> None:
        """A row goes into the engine."""
        self._running[key] = None
        self._write(f"+ {key.job_id} {key.index} {key.attempt}\n")

    def ends(self, keys: Iterable[RowKey]) -> None:
        """Rows have left the engine, whatever became of them."""
        gone = [key for key in keys if self._running.pop(key, 0) is None]
        if not gone:
            return
        self._write("".join(f"- {key.job_id} {key.index} {key.attempt}\n" for key in gone))
        if self._size > _COMPACT_BYTES:
            self._empty()
            self._write("".join(f"+ {key.job_id} {key.index} {key.attempt}\n" for key in self._running))

    def clear(self) -> None:
        """Nothing is in hand."""
        self._running.clear()
        self._empty()

    def forgive(self) -> None:
        """Somebody asked for the end: however it comes now, it is nobody's crash. Any thread may call it."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """The end was orderly: there is nothing to tell. A second call does nothing."""
        self._running.clear()
        if self._file >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1

    def _empty(self) -> None:
        with suppress(OSError):
            os.ftruncate(self._file, 0)
        self._size = 0
        if self._is_alone:
            self._write("alone\n")

    def _write(self, text: str) -> None:
        # A full disk must not end the work: then nobody will be blamed.
        with suppress(OSError):
            self._size += os.write(self._file, text.encode())


def deaths(home: Path, database_url: str) -> Iterator[Death]:
    """The workers of this home and database that died; each is told once more until the caller has taken its next.

    A file is removed when the iterator goes on behind it: whoever is interrupted before that is told again.
    """
    try:
        paths = sorted(_folder(home).glob(f"{_mark(database_url)}-*"))
    except OSError:
        return
    paths = [path for path in paths if _number(path.name.rpartition("-")[2]) is not None]
    for path in paths:
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists():  # another worker was faster
                continue
            yield _read(path, os.fstat(file).st_size, file)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            continue  # it lives
        finally:
            os.close(file)


def _read(path: Path, size: int, file: int) -> Death:
    loading: str | None = None
    is_alone = False
    running: dict[RowKey, None] = {}
    for line in os.pread(file, size, 0).decode(errors="replace").splitlines():
        match line.split(" "):
            case ["load", name]:
                loading = unquote(name) or None
            case ["alone"]:
                is_alone = True
            case [("+" | "-") as sign, job_id, index, attempt]:
                numbers = [_number(each) for each in (job_id, index, attempt)]
                if None in numbers:
                    continue
                key = RowKey(*(each or 0 for each in numbers))
                if sign == "+":
                    running[key] = None
                else:
                    running.pop(key, None)
    return Death(_number(path.name.rpartition("-")[2]) or 0, loading, tuple(running), is_alone)


def _number(text: str) -> int | None:
    """As it was written by us: the file is anybody's who may write to the folder."""
    return int(text) if text.isdecimal() and text.isascii() and len(text) <= 10 else None


def _folder(home: Path) -> Path:
    return home / "inflight"


def _mark(database_url: str) -> str:
    """Worker numbers belong to a database, and one home may be used with several."""
    return hashlib.sha256(database_url.encode()).hexdigest()[:12]
