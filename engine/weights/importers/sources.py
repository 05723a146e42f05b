"""Tensors of a checkpoint's files, read piece by piece, so that memory stays small however large they are."""

import ctypes
import json
import mmap
import os
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.units import MIB

PIECE_BYTES = 16 * MIB
_HEADER_LIMIT = 256 * MIB
_SAFETENSORS_DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a checkpoint's tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    """None: a type that holds no weights (integers, quantised)."""
    dtype_name: str


class CheckpointFile(Protocol):
    """One file of a checkpoint, open."""

    path: Path
    tensors: dict[str, TensorInfo]
    """By the names in the file."""

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The values of one tensor, flat and row-major, in pieces; each is valid until the next is asked for."""

    def close(self) -> None:
        """Gives descriptors and mappings back."""


def open_checkpoint_file(path: Path) -> CheckpointFile:
    """Opens a ``.safetensors`` or ``.bin`` file.

    Raises:
        CheckpointError: absent, damaged, or only a pointer to the real file.
    """
    try:
        with path.open("rb") as file:
            if file.read(24).startswith(b"version https://git-lfs"):
                raise CheckpointError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
        return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def fill(piece: memoryview, fd: int, offset: int, path: Path) -> None:
    """Reads as many bytes as ``piece`` has, from an offset of an open file.

    Raises:
        CheckpointError: the file cannot be read, or is cut short.
    """
    while piece:
        try:
            count = os.preadv(fd, [piece], offset)
        except OSError as error:
            raise CheckpointError(f"reading {path} failed: {error.strerror}") from error
        if count == 0:
            raise CheckpointError(f"{path} ends too early; it is cut short")
        piece, offset = piece[count:], offset + count


class SafetensorsFile:
    """A ``.safetensors`` file, read by byte ranges: nothing is mapped, so nothing but one piece is ever resident."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._ranges: dict[str, tuple[int, int]] = {}
            self.tensors: dict[str, TensorInfo] = {}
            self._read_header()
        except BaseException:
            os.close(self._fd)
            raise

    def pieces(self, name: str) -> Iterator[Tensor]:
        begin, end = self._ranges[name]
        dtype = self.tensors[name].dtype
        assert dtype is not None, "only tensors of a known type are read"
        buffer = bytearray(min(PIECE_BYTES, end - begin))
        while begin < end:
            piece = memoryview(buffer)[: end - begin]
            fill(piece, self._fd, begin, self.path)
            yield torch.frombuffer(piece, dtype=dtype)
            begin += len(piece)

    def close(self) -> None:
        os.close(self._fd)

    def _read_header(self) -> None:
        size = os.fstat(self._fd).st_size
        header_bytes = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        if size < 8 or not 2 <= header_bytes <= min(size - 8, _HEADER_LIMIT):
            raise CheckpointError(f"{self.path} is not a safetensors file, or it is cut short")
        text = bytearray(header_bytes)
        fill(memoryview(text), self._fd, 8, self.path)
        try:
            header = json.loads(text)
            header.pop("__metadata__", None)
            for name, entry in header.items():
                shape = tuple(int(length) for length in entry["shape"])
                begin, end = (8 + header_bytes + int(offset) for offset in entry["data_offsets"])
                dtype = _SAFETENSORS_DTYPES.get(entry["dtype"])
                num_bytes = end - begin if dtype is None else prod(shape) * dtype.itemsize
                if not 8 + header_bytes <= begin <= end <= size or end - begin != num_bytes:
                    raise CheckpointError(f"{self.path} is cut short or damaged: tensor {name} lies outside of it")
                self._ranges[name] = begin, end
                self.tensors[name] = TensorInfo(shape, dtype, str(entry["dtype"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.path} has a damaged safetensors header ({error})") from error


class TorchFile:
    """A ``.bin`` file of ``torch.save``, unpickled with ``weights_only=True`` alone.

    The zip format (PyTorch 1.6 and later) is mapped and its pages are given back piece by piece. The older format
    cannot be mapped: such a file is in memory whole while it is open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped = zipfile.is_zipfile(path)
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=self._mapped)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} is damaged, or holds Python objects besides tensors, which are never run; "
                "save it again with safetensors"
            ) from error
        except (OSError, MemoryError):
            raise
        except Exception as error:  # junk read as a pickle fails in every way there is
            raise CheckpointError(
                f"{path} is not a PyTorch checkpoint, or it is cut short ({_first(error)})"
            ) from error
        if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
            raise CheckpointError(f"{path} holds no dictionary of tensors")
        self._loaded = {name: tensor.detach() for name, tensor in loaded.items() if isinstance(tensor, Tensor)}
        self.tensors = {name: _info(tensor) for name, tensor in self._loaded.items()}

    def pieces(self, name: str) -> Iterator[Tensor]:
        tensor = self._loaded[name]
        flat = tensor.reshape(-1)  # a view, unless the tensor was saved transposed
        step = PIECE_BYTES // flat.dtype.itemsize
        for begin in range(0, flat.numel(), step):
            piece = flat[begin : begin + step]
            yield piece
            if self._mapped and tensor.is_contiguous():
                _forget_pages(piece)

    def close(self) -> None:
        self._loaded.clear()


def _info(tensor: Tensor) -> TensorInfo:
    known = tensor.dtype in _SAFETENSORS_DTYPES.values() and tensor.layout == torch.strided
    return TensorInfo(tuple(tensor.shape), tensor.dtype if known else None, str(tensor.dtype).removeprefix("torch."))


def _forget_pages(piece: Tensor) -> None:
    """Tells the system that the whole pages of a mapped piece are no longer needed: they count as resident memory."""
    begin = -(-piece.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (piece.data_ptr() + piece.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin and hasattr(mmap, "MADV_DONTNEED"):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def _first(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
