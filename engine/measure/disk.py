"""The disk and the links between host and device, and what is left of them while the processor computes."""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import cycle
from pathlib import Path
from statistics import median
from threading import Event, Thread

import torch
from torch import Tensor

from engine.devices.base import Device
from engine.measure.effort import Effort, Points, timed
from engine.memory.lane import LaneName
from engine.memory.spill import DiskTier
from engine.units import MIB
from engine.weights.files import WeightFiles
from engine.weights.manifest import Manifest, UnitEntry

_REPEATS = 3


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
def scratch_units(folder: Path, effort: Effort) -> Iterator[WeightFiles]:
    """A model directory of nothing but units, read as the engine reads weights."""
    path = folder / "units"
    path.mkdir()
    units = [_write_unit(path, name, size) for size in effort.transfers for name in _units_of(size, effort)]
    manifest = Manifest(
        model_type="none", config={}, dtype="bfloat16", units=tuple(units),
        num_bytes=sum(unit.num_bytes for unit in units), source="", created_by="",
    )  # fmt: skip
    try:
        with WeightFiles(path, manifest) as files:
            yield files
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _write_unit(path: Path, name: str, size: int) -> UnitEntry:
    data = os.urandom(MIB) * (size // MIB)
    with (path / name).open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return UnitEntry(name, name, size, f"sha256:{hashlib.sha256(data).hexdigest()}", {})


def _units_of(size: int, effort: Effort) -> list[str]:
    return [f"unit.{size}.{index}" for index in range(max(1, effort.transfer_total // size))]


def disk_reads(files: WeightFiles, device: Device, effort: Effort) -> Points:
    """``(bytes of a transfer, bytes/s)``; each file's first read, which checks it, does not count."""
    out = device.allocate_host(max(effort.transfers))
    points = []
    for size in sorted(
        effort.transfers, reverse=True
    ):  # many disks are faster for a moment: that passes with the first
        names = _units_of(size, effort)
        for name in names:
            files.read_unit(name, out)
        found = []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            for name in names:
                files.read_unit(name, out)
            found.append(size * len(names) / (time.perf_counter() - start))
        points.append((float(size), median(found)))
    return tuple(sorted(points))


def disk_writes(folder: Path, effort: Effort) -> Points:
    """``(bytes, bytes/s)`` of a spill file."""
    size = effort.transfers[-1]
    with closing(DiskTier(2 * size, folder)) as disk:
        extent = disk.allocate(size, "measuring")
        data = torch.ones(size, dtype=torch.uint8)
        extent.write(0, data)
        start = time.perf_counter()
        for _ in range(_REPEATS):
            extent.write(0, data)
        return ((float(MIB), size * _REPEATS / (time.perf_counter() - start)),)


def copies(device: Device, lane: LaneName, effort: Effort) -> Points:
    """One way between host and device, ``(bytes, bytes/s)``."""
    points = []
    for size in effort.transfers:
        host, on_device = device.allocate_host(size), device.allocate(size)
        into, source = (on_device, host) if lane is LaneName.HOST_TO_DEVICE else (host, on_device)
        source.zero_()
        points.append((float(size), size / timed(device, _copy(device, lane, into, source), effort.figure_s)))
    return tuple(points)


def _copy(device: Device, lane: LaneName, into: Tensor, source: Tensor) -> Callable[[], None]:
    return lambda: device.copy(lane, into, source, device.compute_mark()).wait()


class Reading:
    """The disk read over and over by a thread of its own, as the engine reads weights, while something else is done."""

    def __init__(self, files: WeightFiles, device: Device, effort: Effort) -> None:
        self._files = files
        self._effort = effort
        self._names = _units_of(effort.transfers[-1], effort)
        self._out = device.allocate_host(max(effort.transfers))
        self._stop = Event()
        self._done = 0
        self._alone: float | None = None
        self.shares: list[float] = []
        """Of the disk's rate, what was left each time."""

    def share_of(self, compute: Callable[[], float]) -> float:
        """What is left of the rate of ``compute``, which tells how long it took."""
        if self._alone is None:
            self._alone = self._rate_while(lambda: time.sleep(self._effort.busy_s))
        alone_s = compute()
        busy_s: list[float] = []
        rate = self._rate_while(lambda: busy_s.append(compute()))
        self.shares.append(min(1.0, rate / self._alone))
        return min(1.0, alone_s / busy_s[0])

    def _rate_while(self, work: Callable[[], object]) -> float:
        """Bytes/s while ``work`` runs in this thread."""
        self._stop.clear()
        self._done = 0
        start = time.perf_counter()
        thread = Thread(target=self._read)
        thread.start()
        try:
            work()
        finally:
            self._stop.set()
            thread.join()
        return self._done / (time.perf_counter() - start)

    def _read(self) -> None:
        for name in cycle(self._names):
            self._done += self._files.read_unit(name, self._out)
            if self._stop.is_set():
                return
