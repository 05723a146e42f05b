"""Reading a model directory's weight files with large direct reads, past the page cache."""

import errno
import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from engine.errors import CheckpointError, LaneFailed
from engine.formats.operands import operand, unpack
from engine.units import MIB
from engine.weights.manifest import PAGE_BYTES, Manifest, TensorEntry, UnitEntry, read_manifest

READ_BYTES = 8 * MIB
"""One read request: large enough for a disk's full speed, small enough that a layer's last ones end together."""
READERS = 4
"""Requests under way at a time: one leaves most of a fast disk idle."""


class WeightFiles:
    """The files of one model directory; owns their descriptors and the threads that read them.

    Different units may be read at once.
    """

    def __init__(self, model_dir: Path, manifest: Manifest) -> None:
        self._dir = model_dir
        self._units = {unit.name: unit for unit in manifest.units}
        self._lock = Lock()  # guards the two below
        self._open: dict[str, _File] = {}
        self._verified: set[str] = set()
        self._closed = False
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="overnight-reader")

    @classmethod
    def open(cls, model_dir: Path) -> Self:
        """The files of a model directory.

        Raises:
            CheckpointError: absent, half-written or damaged.
        """
        return cls(model_dir, read_manifest(model_dir))

    def num_bytes(self, name: str) -> int:
        """How much room ``read_unit`` needs for this unit."""
        return self._units[name].num_bytes

    def entries(self, name: str) -> Mapping[str, TensorEntry]:
        """Where each tensor of a unit lies in its file."""
        return self._units[name].tensors

    def read_unit(self, name: str, out: Tensor) -> int:
        """Reads a unit's whole file into host memory; the first time, verifies its checksum.

        Args:
            name: which unit.
            out: contiguous ``uint8 [>= num_bytes]`` on the host that begins on a page of 4096.

        Returns:
            The bytes read.

        Raises:
            CheckpointError: the file is missing, short, or not what was imported.
            LaneFailed: the disk failed.
        """
        unit = self._units[name]
        if out.dtype != torch.uint8 or not out.is_contiguous() or out.numel() < unit.num_bytes:
            raise ValueError(f"unit {name} needs {unit.num_bytes} contiguous bytes, not {tuple(out.shape)} {out.dtype}")
        if out.data_ptr() % PAGE_BYTES:
            raise ValueError(f"the buffer for unit {name} does not begin on a page")
        file = self._file(unit)
        with self._lock:
            digest = None if name in self._verified else hashlib.sha256()
        view = out.numpy().data[: unit.num_bytes]
        pieces = [(begin, view[begin : begin + READ_BYTES]) for begin in range(0, unit.num_bytes, READ_BYTES)]
        reads = [self._readers.submit(file.read, begin, piece) for begin, piece in pieces]
        try:
            for read, (_, piece) in zip(reads, pieces, strict=True):
                read.result()
                if digest is not None:
                    digest.update(piece)  # while the next ones are read
        finally:
            for read in reads:
                read.cancel()
            wait(reads)  # nobody writes into the caller's memory once this has raised
        if digest is not None:
            if unit.checksum != f"sha256:{digest.hexdigest()}":
                raise CheckpointError(f"{file.path} is damaged: its checksum is wrong; import the model again")
            with self._lock:
                self._verified.add(name)
        return unit.num_bytes

    def tensors(self, name: str, raw: Tensor) -> dict[str, Tensor]:
        """A unit's tensors over its file's bytes, ``uint8 [>= num_bytes]`` on any device; nothing is copied.

        For units whose tensors are all stored as they are computed with.
        """
        return {
            tensor_name: operand(entry.format, raw[entry.offset : entry.offset + entry.num_bytes], entry.shape)
            for tensor_name, entry in self._units[name].tensors.items()
        }

    def unpack(self, name: str, raw: Tensor, out: Mapping[str, Tensor]) -> None:
        """The values of some of a unit's tensors, from its file's bytes into tensors of the compute dtype."""
        for tensor_name, tensor in out.items():
            entry = self._units[name].tensors[tensor_name]
            unpack(entry.format, raw[entry.offset : entry.offset + entry.num_bytes], tensor)

    def close(self) -> None:
        """Ends the threads and closes every file; no read may be under way."""
        self._readers.shutdown()
        with self._lock:
            self._closed = True
            while self._open:
                self._open.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _file(self, unit: UnitEntry) -> "_File":
        with self._lock:
            if self._closed:
                raise ValueError("these weight files are closed")
            file = self._open.get(unit.name)
            if file is None:
                file = self._open[unit.name] = _File(self._dir / unit.file)
            return file


class _File:
    """One file, read directly where the file system allows it, else through the page cache, which is then told to
    forget what was read: weights are read once a pass, and would only push out what others keep there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()  # guards falling back to buffered reads
        self._direct = hasattr(os, "O_DIRECT")
        self._fd = -1
        self._refused: list[int] = []
        if self._direct:
            try:
                self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise self._failed(error) from error
                self._direct = False
        if not self._direct:
            self._open_buffered()

    def read(self, offset: int, piece: memoryview) -> None:
        """Fills ``piece`` from ``offset``, both whole pages."""
        num_read = 0
        while num_read < len(piece):
            with self._lock:
                fd, direct = self._fd, self._direct
            try:
                count = os.preadv(fd, [piece[num_read:]], offset + num_read)
            except OSError as error:
                if error.errno == errno.EINVAL and direct:
                    self._read_buffered()
                    continue
                raise self._failed(error) from error
            num_read += count
            if count == 0 or (direct and num_read % PAGE_BYTES):
                raise CheckpointError(
                    f"{self.path} ends after {offset + num_read} bytes, short of its manifest; import the model again"
                )
        if not direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, offset, len(piece), os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        for fd in (self._fd, *self._refused):
            os.close(fd)

    def _read_buffered(self) -> None:
        """Some layered file systems accept the flag at open and refuse it at the first read."""
        with self._lock:
            if self._direct:
                self._refused.append(self._fd)  # other threads may be about to read from it
                self._direct = False
                self._open_buffered()

    def _open_buffered(self) -> None:
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> CheckpointError | LaneFailed:
        if isinstance(error, FileNotFoundError | PermissionError):
            return CheckpointError(f"{self.path} cannot be opened ({error.strerror}); import the model again")
        return LaneFailed(f"reading {self.path} failed: {error.strerror}")
