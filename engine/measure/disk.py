"""The disk, and the links between host and device."""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median

import torch

from engine.dtypes import DType
from engine.measure.effort import Effort, Points
from engine.measure.timing import Timed, curve, in_turns, one_turn
from engine.memory.device import Device
from engine.memory.lane import LaneName
from engine.memory.spill import DiskTier
from engine.memory.tensors import torch_dtype
from engine.units import MIB
from engine.weights.files import WeightFiles
from engine.weights.layout import UnitLayout
from engine.weights.manifest import Manifest, UnitEntry

_REPEATS = 3
_UNDER_WAY, _UNDER_WAY_BYTES = 16, 16 * MIB
"""Pieces that are copied one right after the other, as a group's keys and values are, and their bytes together, or
one."""


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """A new folder within ``folder``, gone afterwards.

    Raises:
        OSError: nothing can be written there.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix=".measure-", dir=folder))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def unit_files(path: Path, units: Mapping[str, UnitLayout], dtype: DType, effort: Effort) -> Iterator[WeightFiles]:
    """A model directory of nothing but units, gone afterwards.

    Raises:
        OSError: it cannot be written.
        Interrupted: somebody wants an end of it.
    """
    path.mkdir()
    try:
        entries = [_write_unit(path, name, layout, dtype, effort) for name, layout in units.items()]
        manifest = Manifest(
            model_type="none", config={}, dtype=dtype, units=tuple(entries),
            num_bytes=sum(unit.num_bytes for unit in entries), source="", created_by="",
        )  # fmt: skip
        with WeightFiles(path, manifest) as files:
            yield files
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _write_unit(path: Path, name: str, layout: UnitLayout, dtype: DType, effort: Effort) -> UnitEntry:
    digest = hashlib.sha256()
    values = torch.randn(MIB // 4).mul_(0.02).to(torch_dtype(dtype))
    piece = values.view(torch.uint8).numpy().tobytes()
    with (path / name).open("wb") as file:
        for first in range(0, layout.num_bytes, len(piece)):
            effort.pause()
            part = piece[: layout.num_bytes - first]
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return UnitEntry(name, name, layout.num_bytes, f"sha256:{digest.hexdigest()}", layout.tensors)


def read_rate(files: WeightFiles, names: Sequence[str], device: Device, effort: Effort) -> float:
    """Bytes/s of reading units one after the other, into two buffers in turn, as staging does.

    A file's first read, which checks it, does not count; nor does the first half of the time, in which many disks are
    faster than they can go on being.
    """
    size = max(files.num_bytes(name) for name in names)
    buffers = cycle([device.allocate_host(size) for _ in range(2)])

    def read(name: str) -> int:
        effort.pause()
        return files.read_unit(name, next(buffers))

    for name in names:
        read(name)
    found: list[float] = []
    until = time.perf_counter() + effort.busy_s
    while len(found) < 2 or time.perf_counter() < until:
        start = time.perf_counter()
        done = sum(map(read, names))
        found.append(done / (time.perf_counter() - start))
    return median(found[len(found) // 2 :])


def small_reads(folder: Path, dtype: DType, device: Device, effort: Effort) -> tuple[float, float]:
    """``(bytes, bytes/s)`` of units that are smaller than any layer."""
    number = max(2, effort.streamed_bytes // 4 // effort.small_transfer)
    units = {f"unit.{index}": UnitLayout({}, effort.small_transfer) for index in range(number)}
    with unit_files(folder / "small-units", units, dtype, effort) as files:
        return float(effort.small_transfer), read_rate(files, list(units), device, effort)


def disk_writes(folder: Path, effort: Effort) -> Points:
    """``(bytes, bytes/s)`` of a spill file."""
    size = effort.copies[-1]
    with closing(DiskTier(2 * size, folder)) as disk:
        extent = disk.allocate(size, "measuring")
        data = torch.ones(size, dtype=torch.uint8)
        extent.place(0).write(0, data)
        start = time.perf_counter()
        for _ in range(_REPEATS):
            effort.pause()
            extent.place(0).write(0, data)
        return ((float(MIB), size * _REPEATS / (time.perf_counter() - start)),)


def copies(device: Device, lane: LaneName, effort: Effort) -> Points:
    """One way between host and device, ``(bytes of a piece, bytes/s)``."""
    totals = [size * copied_at_once(size) for size in effort.copies]
    host, on_device = device.allocate_host(max(totals)), device.allocate(max(totals))
    into, source = (on_device, host) if lane is LaneName.HOST_TO_DEVICE else (host, on_device)
    for memory in (into, source):
        memory.zero_()  # untouched memory comes from the kernel page by page

    def copied(size: int, total: int) -> Timed:
        pieces = list(zip(torch.split(into[:total], size), torch.split(source[:total], size), strict=True))
        return partial(one_turn, device, lambda: device.copy(lane, pieces, device.compute_mark()).wait(), effort)

    (seconds,) = in_turns(effort, [copied(size, total) for size, total in zip(effort.copies, totals, strict=True)])
    return curve(effort.copies, totals, seconds)


def copied_at_once(size: int) -> int:
    """How many pieces of ``size`` bytes are under way together."""
    return max(1, min(_UNDER_WAY, _UNDER_WAY_BYTES // size))
