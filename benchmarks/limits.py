"""What this machine can do, measured: the matrix peak at the shapes used, and each lane alone and beside the others."""

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from typing import Any

import torch

from benchmarks.bound import COMPUTE, DISK_READ, HOST_TO_DEVICE, UNPACKING
from benchmarks.jobs import Job
from benchmarks.shapes import layer_products, shape_of
from engine.formats.int4 import pack, unpack
from engine.formats.int4_sizes import Int4
from engine.units import MIB
from engine.weights.files import READ_BYTES
from engine.weights.manifest import read_manifest

_WINDOW_S = 1.5
_TINY_WINDOW_S = 0.1
_READERS = (1, 4)
"""How many threads read at once: a disk's full speed may need several, a small machine has few cores to spare."""
_TOKENS = (512, 1024, 2048)
_COPY_BYTES = 64 * MIB

Step = Callable[[], float]
"""One piece of a lane's work; returns bytes, or floating-point operations."""


def run(job: Job) -> dict[str, Any]:
    """``{"alone": {lane: rate}, "busy": {lane: rate}, "readers": n, "tokens": n}`` in bytes/s and operations/s.

    Where ``job.until`` names a file: ``{"samples": [[tokens, begin, end, operations], …]}`` of products alone.
    """
    if job.until is not None:
        return {"samples": list(_samples(job, Path(job.until)))}
    model_dir = Path(job.model_dir)
    window_s = _TINY_WINDOW_S if job.shape == "tiny" else _WINDOW_S
    products = {tokens: _compute(job, tokens) for tokens in _TOKENS}
    speeds = {tokens: _rates({COMPUTE: [step]}, window_s)[COMPUTE] for tokens, step in products.items()}
    tokens = max(speeds, key=lambda each: speeds[each])
    reads = {number: _rates({DISK_READ: _readers(model_dir, number)}, window_s)[DISK_READ] for number in _READERS}
    readers = max(reads, key=lambda each: reads[each])
    copied = _rates({HOST_TO_DEVICE: [_copy(job.device)]}, window_s)
    if job.disk_rate is not None:
        reads[readers] = min(reads[readers], float(job.disk_rate))
    alone = {COMPUTE: speeds[tokens], DISK_READ: reads[readers], **copied}
    if job.plain_dir is not None:
        alone |= _rates({UNPACKING: [_unpacking(job)]}, window_s)
    used: dict[str, list[Step]] = {COMPUTE: [products[tokens]]}
    if job.weights in ("disk", "planned"):
        used[DISK_READ] = _readers(model_dir, readers)
    if job.weights != "device" and job.device != "cpu":
        used[HOST_TO_DEVICE] = [_copy(job.device)]
    # A lane that this run does not use keeps nobody busy, and nobody it.
    busy = alone | _rates(used, window_s) if len(used) > 1 else alone
    if job.disk_rate is not None:
        busy |= {DISK_READ: min(busy[DISK_READ], float(job.disk_rate)), COMPUTE: alone[COMPUTE]}
    return {"alone": alone, "busy": busy, "readers": readers, "tokens": tokens}


def _samples(job: Job, until: Path) -> Iterator[tuple[int, float, float, float]]:
    products = {tokens: _compute(job, tokens) for tokens in _TOKENS}
    while not until.exists():
        for tokens, step in products.items():
            begin = perf_counter()
            flops = step()
            yield tokens, begin, perf_counter(), flops


def _rates(lanes: dict[str, list[Step]], window_s: float) -> dict[str, float]:
    """Run all steps over and over, a thread each, for a while; what each lane did in a second."""
    for steps in lanes.values():
        steps[0]()  # whatever the first time costs
    stop, begin = Event(), Event()
    done: dict[str, list[tuple[float, float]]] = {lane: [] for lane in lanes}

    def work(lane: str, step: Step) -> None:
        begin.wait()
        start = perf_counter()
        amount = 0.0
        while not stop.is_set():
            amount += step()
        done[lane].append((amount, perf_counter() - start))

    threads = [Thread(target=work, args=(lane, step)) for lane, steps in lanes.items() for step in steps]
    for thread in threads:
        thread.start()
    begin.set()
    stop.wait(window_s)
    stop.set()
    for thread in threads:
        thread.join()
    missing = [lane for lane, steps in lanes.items() if len(done[lane]) != len(steps)]
    if missing:
        raise RuntimeError(f"measuring {', '.join(missing)} failed")
    return {lane: sum(amount / seconds for amount, seconds in found) for lane, found in done.items()}


def _compute(job: Job, tokens: int) -> Step:
    """The four products of one layer for ``tokens`` tokens."""
    dtype, device = getattr(torch, job.dtype), torch.device(job.device)
    sizes = layer_products(shape_of(job.shape))
    weights = [torch.randn(size, dtype=dtype, device=device) for size in sizes]
    inputs = [torch.randn(tokens, into, dtype=dtype, device=device) for _, into in sizes]
    flops = 2.0 * tokens * sum(out * into for out, into in sizes)

    def step() -> float:
        with torch.inference_mode():
            for weight, value in zip(weights, inputs, strict=True):
                torch.nn.functional.linear(value, weight)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return flops

    return step


def _unpacking(job: Job) -> Step:
    """The matrices of one layer, from four bits."""
    dtype, device, stored = getattr(torch, job.dtype), torch.device(job.device), Int4()
    sizes = layer_products(shape_of(job.shape))
    parts = [pack(stored, torch.randn(size)) for size in sizes]
    packed = [torch.cat([part.flatten().view(torch.uint8) for part in each]).to(device) for each in parts]
    outs = [torch.empty(stored.unpacked_shape(size), dtype=dtype, device=device) for size in sizes]
    number = float(sum(out.numel() for out in outs))

    def step() -> float:
        with torch.inference_mode():
            for raw, out in zip(packed, outs, strict=True):
                unpack(stored, raw, out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return number

    return step


def _readers(model_dir: Path, number: int) -> list[Step]:
    """Threads that read the layers' files as the engine does: large direct reads into memory that is there already."""
    manifest = read_manifest(model_dir)
    paths = [model_dir / unit.file for unit in manifest.units if unit.name.startswith("layer.")]
    pieces = [(path, offset) for path in paths for offset in range(0, path.stat().st_size, READ_BYTES)]
    # Each its own pieces, so that no read finds what another has just brought in.
    return [_reader(cycle(pieces[index::number] or pieces)) for index in range(number)]


def _reader(pieces: Iterator[tuple[Path, int]]) -> Step:
    buffer = mmap.mmap(-1, READ_BYTES)
    direct = getattr(os, "O_DIRECT", 0)

    def step() -> float:
        nonlocal direct
        path, offset = next(pieces)
        try:
            return _read(path, offset, buffer, direct)
        except OSError as error:
            if error.errno != errno.EINVAL or not direct:
                raise
            direct = 0  # this file system has only buffered reads
            return _read(path, offset, buffer, direct)

    return step


def _read(path: Path, offset: int, buffer: mmap.mmap, direct: int) -> float:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | direct)
    try:
        num_bytes = os.preadv(fd, [buffer], offset)
        if not direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, offset, num_bytes, os.POSIX_FADV_DONTNEED)
        return float(num_bytes)
    finally:
        os.close(fd)


def _copy(device: str) -> Step:
    """Host memory to the device's, or from one place in memory to another."""
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, pin_memory=device != "cpu")
    target = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)

    def step() -> float:
        target.copy_(source, non_blocking=True)
        if device != "cpu":
            torch.cuda.synchronize()
        return float(_COPY_BYTES)

    return step
