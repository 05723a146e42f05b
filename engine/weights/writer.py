"""Writing a model directory: one aligned file a unit, whole or not at all.

Everything goes into a hidden sibling, ``.<name>.partial-<pid>``, which becomes the model directory by one rename after
its files and manifest are on the disk. The writer holds a lock on that directory, which the system releases when the
process ends however it ends; so the next writer can tell leftovers from an import that is under way.
"""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from engine.errors import CheckpointError, DiskFull
from engine.units import format_bytes
from engine.weights.layout import UnitLayout
from engine.weights.manifest import (
    MANIFEST_NAME,
    PARTIAL_NAME,
    Manifest,
    UnitEntry,
)

Buffer = bytes | bytearray | memoryview


class ModelWriter:
    """Writes one model directory; a context manager that removes what it wrote unless ``commit`` was reached.

    Raises:
        CheckpointError: the destination exists, or cannot be made.
        DiskFull: there is less than ``num_bytes`` of room, at the start or on the way.
    """

    def __init__(self, destination: Path, num_bytes: int) -> None:
        self._destination = destination = destination.absolute()
        self._num_bytes = num_bytes
        self._units: list[UnitEntry] = []
        if destination.exists() and not _is_empty_directory(destination):
            raise CheckpointError(f"{destination} exists already; choose another destination, or remove it first")
        with self._explained():
            destination.parent.mkdir(parents=True, exist_ok=True)
            sweep_leftovers(destination.parent)
            free = shutil.disk_usage(destination.parent).free
            if free < num_bytes:
                raise self._disk_full(f"only {format_bytes(free)} is free")
            self.directory = destination.parent / f".{destination.name}.partial-{os.getpid()}"
            self._lock_fd = _make_locked(self.directory)

    def write_unit(self, name: str, layout: UnitLayout, contents: Iterable[tuple[str, Iterable[Buffer]]]) -> UnitEntry:
        """Writes one unit's file.

        Args:
            name: the unit.
            layout: where its tensors lie.
            contents: for each tensor of the layout, in its order, the name and the bytes in pieces.
        """
        path = self.directory / f"{name}.bin"
        digest = hashlib.sha256()
        position = 0
        with self._explained():
            file = path.open("xb", buffering=0)

        def put(piece: Buffer) -> None:
            nonlocal position
            view = memoryview(piece)
            digest.update(view)
            position += len(view)
            with self._explained():
                while view:
                    view = view[file.write(view) :]

        with file:
            for tensor_name, pieces in contents:
                put(bytes(layout.tensors[tensor_name].offset - position))
                for piece in pieces:
                    put(piece)
            put(bytes(layout.num_bytes - position))
            with self._explained():
                os.fsync(file.fileno())
        entry = UnitEntry(name, path.name, layout.num_bytes, f"sha256:{digest.hexdigest()}", layout.tensors)
        self._units.append(entry)
        return entry

    def write_file(self, name: str, content: bytes) -> None:
        """Writes a small file (tokenizer and the like)."""
        with self._explained(), (self.directory / name).open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def commit(self, manifest: Manifest) -> None:
        """Writes the manifest last and gives the directory its name.

        Raises:
            CheckpointError: another import has taken the destination meanwhile.
        """
        self.write_file(MANIFEST_NAME, manifest.to_json().encode())
        with self._explained():
            os.fsync(self._lock_fd)
            try:
                self.directory.rename(self._destination)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                raise CheckpointError(f"{self._destination} was made by another process meanwhile") from error
            _fsync_directory(self._destination.parent)

    @property
    def units(self) -> tuple[UnitEntry, ...]:
        """The entries of the units written so far."""
        return tuple(self._units)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.directory.exists():
            shutil.rmtree(self.directory, ignore_errors=True)
        os.close(self._lock_fd)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._disk_full("the disk is full now") from error
            raise CheckpointError(f"{self._destination} cannot be written: {error.strerror or error}") from error

    def _disk_full(self, found: str) -> DiskFull:
        return DiskFull(
            f"{self._destination.parent} has no room for the model: "
            f"{format_bytes(self._num_bytes)} is needed, {found}; free some or choose another destination"
        )


def sweep_leftovers(parent: Path) -> None:
    """Removes partial imports in ``parent`` whose writers are dead."""
    for path in parent.iterdir():
        if not PARTIAL_NAME.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            continue
        with suppress(OSError):  # its writer lives and holds the lock, or another process sweeps too
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(fd)


def _make_locked(path: Path) -> int:
    while True:
        try:
            path.mkdir()
        except FileExistsError:
            raise CheckpointError(f"{path} exists: another import to this place is under way") from None
        # Between the two lines above and below another process may sweep the directory, not yet locked, away.
        with suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_EX)
            if path.exists():
                return fd
            os.close(fd)


def _is_empty_directory(path: Path) -> bool:
    return path.is_dir() and next(path.iterdir(), None) is None


def _fsync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
