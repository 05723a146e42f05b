"""The machine, measured: what the planner needs to know, by running what the engine runs. It takes under a minute.

Shapes: T tokens of a micro-batch, N heads, H head size.
"""

import hashlib
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from threading import Event, Thread

import torch
from torch import Tensor

from engine.devices.base import Device
from engine.devices.open import facts_of
from engine.kvcache.store import KVStore
from engine.memory.lane import LaneName
from engine.memory.spill import DiskTier
from engine.memory.tier import MemoryTier
from engine.memory.traffic import Traffic
from engine.model.family import EMBED, HEAD, ModelShape, NamedWeights, layer_name
from engine.model.linear import padded_rows
from engine.model.opt import OPT
from engine.model.sampling import next_tokens
from engine.passes import MicroBatch, Segment
from engine.planner.default import StoredWeights, kv_bytes_per_token, resolve_plan
from engine.planner.hardware import Figure, Hardware, Rate
from engine.planner.machine import free_disk_space
from engine.planner.plan import DTYPE_BYTES, PlanOptions, Shares, TierName
from engine.request import SamplingParams
from engine.sequence import Sequence as TokenSequence
from engine.units import GIB, MIB
from engine.weights.files import WeightFiles
from engine.weights.manifest import PAGE_BYTES, Manifest, UnitEntry

SOURCE = "measured on this machine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How large and how often: what is measured is the same."""

    hidden_size: int = 2048
    """Of the layer whose products are measured; the feed-forward block is four times as wide."""
    head_size: int = 64
    layers: int = 4
    """With weights of their own, so that they come from memory and not from a cache."""
    tokens: tuple[int, ...] = (1, 32, 64, 128, 256, 512, 1024, 2048)
    few_tokens: tuple[int, ...] = (1, 64, 512)
    """For dtypes other than the machine's best."""
    lengths: tuple[int, ...] = (64, 256, 512, 1024)
    """Tokens of sequences whose attention is measured."""
    sequences: int = 16
    """That decode side by side."""
    transfers: tuple[int, ...] = (4 * MIB, 32 * MIB, 96 * MIB)
    transfer_total: int = 384 * MIB
    repeats: int = 3
    busy_s: float = 2.0


FULL = Effort()
QUICK = Effort(
    hidden_size=64, head_size=16, layers=2, tokens=(1, 32), few_tokens=(1, 32), lengths=(8, 16), sequences=2,
    transfers=(MIB, 2 * MIB), transfer_total=4 * MIB, repeats=1, busy_s=0.05,
)  # fmt: skip
"""For tests."""

Say = Callable[[str], None]


def measure(device: Device, folder: Path, *, effort: Effort = FULL, say: Say = lambda _: None) -> Hardware:
    """What this machine can do with ``device``; ``folder`` is where spill files and models lie.

    Raises:
        EngineError: the disk or the device failed, or the disk has no room for the scratch file.
        OSError: nothing can be written to ``folder``.
    """
    with torch.inference_mode(), device.computing():
        dtypes = _dtypes(device)
        matmul = {}
        for dtype in dtypes:
            say(f"products in {dtype}")
            tokens = effort.tokens if dtype == dtypes[0] else effort.few_tokens
            matmul[dtype] = _products(device, dtype, tokens, effort)
        say("attention")
        prompt_attention, decode_attention = _attention(device, dtypes[0], effort, folder, TierName.DEVICE)
        say("overheads")
        layer_overhead = _layer_overhead(device, dtypes[0])
        pass_overhead = _pass_overhead(device)
        say("disk and links")
        with _scratch(folder, effort) as files:
            reads = _disk_reads(files, device, effort)
            disk_share, compute_share = _together(files, device, dtypes[0], effort)
        writes = _disk_writes(folder, effort)
        to_device, to_host = _copies(device, effort)
    facts = facts_of(device)
    shares = device.shares_host_memory
    return Hardware(
        name="this machine",
        description=f"{device.name} on {platform.node()}, measured {time.strftime('%Y-%m-%d %H:%M')}",
        device=device.torch_device.type,
        shares_host_memory=shares,
        capacity={
            TierName.DEVICE: Figure(facts.device_free, "free when measured"),
            TierName.HOST: Figure(facts.host_free, "free when measured"),
            TierName.DISK: Figure(free_disk_space(folder), "free when measured"),
        },
        matmul={
            dtype: Rate(points, SOURCE, busy_share=compute_share if shares else 1.0) for dtype, points in matmul.items()
        },
        prompt_attention=Rate(prompt_attention, SOURCE),
        decode_attention=Rate(decode_attention, SOURCE),
        host_attention=None,
        lanes={
            LaneName.DISK_READ: Rate(reads, SOURCE, busy_share=disk_share),
            LaneName.DISK_WRITE: Rate(writes, SOURCE, busy_share=disk_share),
            LaneName.HOST_TO_DEVICE: Rate(to_device, SOURCE),
            LaneName.DEVICE_TO_HOST: Rate(to_host, SOURCE),
        },
        layer_overhead=Figure(layer_overhead, SOURCE),
        segment_overhead=Figure(0.0, "contained in the rates of attention"),
        pass_overhead=Figure(pass_overhead, SOURCE),
        identity=identity_of(device, folder),
    )


def identity_of(device: Device, folder: Path) -> dict[str, str]:
    """What a profile is of; it holds as long as this does."""
    name = torch.cuda.get_device_name(device.torch_device) if device.torch_device.type == "cuda" else _cpu_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "device": device.name,
        "processor": name,
        "cores": str(cores),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "disk": _file_system(folder),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _file_system(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    stats = os.statvfs(folder)
    return f"device {folder.stat().st_dev}, blocks of {stats.f_frsize}"


def _dtypes(device: Device) -> tuple[str, ...]:
    """The best first."""
    if device.torch_device.type == "cuda":
        return ("float16", "bfloat16", "float32")
    return ("bfloat16", "float32")


def _timed(device: Device, work: Callable[[], object], repeats: int) -> float:
    """Seconds of one call, the median; the first is thrown away, since it allocates and compiles."""
    work()
    device.compute_mark().wait()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        device.compute_mark().wait()
        found.append(time.perf_counter() - start)
    return median(found)


def _family(hidden_size: int, head_size: int) -> OPT:
    return OPT.from_config(
        {
            "hidden_size": hidden_size,
            "num_attention_heads": hidden_size // head_size,
            "ffn_dim": 4 * hidden_size,
            "num_hidden_layers": 2,
            "vocab_size": 50272,
        }
    )


def _layer_weights(family: OPT, device: Device, dtype: str) -> NamedWeights:
    """Random weights of one layer, in device memory."""
    unit = next(unit for unit in family.units() if unit.name == layer_name(0))
    kind: torch.dtype = getattr(torch, dtype)
    return {
        tensor.name: (torch.randn(tensor.shape) * 0.02).to(dtype=kind, device=device.torch_device)
        for tensor in unit.tensors
    }


def _layer_seconds(
    device: Device, family: OPT, weights: Sequence[NamedWeights], dtype: str, tokens: int, repeats: int
) -> float:
    """One whole layer without attention: norms and residuals are in proportion to tokens, as products are."""
    kind: torch.dtype = getattr(torch, dtype)
    rows = padded_rows(tokens, kind, device.torch_device)
    hidden_TD = torch.randn(rows, family.shape.hidden_size).to(dtype=kind, device=device.torch_device)

    def layers() -> None:
        for each in weights:
            family.layer(each, hidden_TD, _first)

    return _timed(device, layers, repeats) / len(weights)


def _first(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: ARG001
    """Instead of attention, which is measured by itself."""
    return query


def _products(device: Device, dtype: str, tokens: Sequence[int], effort: Effort) -> tuple[tuple[float, float], ...]:
    """``(tokens, FLOP/s)``: of a layer's products, everything else in it counted as their time."""
    family = _family(effort.hidden_size, effort.head_size)
    weights = [_layer_weights(family, device, dtype) for _ in range(effort.layers)]
    values = sum(tensor.numel() for tensor in weights[0].values())
    return tuple(
        (float(count), 2.0 * values * count / _layer_seconds(device, family, weights, dtype, count, effort.repeats))
        for count in tokens
    )


def _layer_overhead(device: Device, dtype: str) -> float:
    """Seconds of a layer that is too small to compute anything, products and the division of attention."""
    family = _family(64, 16)
    weights = [_layer_weights(family, device, dtype) for _ in range(8)]
    return _layer_seconds(device, family, weights, dtype, 1, 5)


def _pass_overhead(device: Device) -> float:
    """Embedding ids up, tokens chosen, and down again."""
    logits = torch.randn(16, 50272, device=device.torch_device)
    params = [SamplingParams()] * 16
    ids = torch.zeros(512, dtype=torch.int64)

    def ends() -> None:
        device.upload(ids)
        device.download(next_tokens(logits, params, [0.0] * 16, device.upload))

    return _timed(device, ends, 3)


def _attention(
    device: Device, dtype: str, effort: Effort, folder: Path, tier: TierName
) -> tuple[tuple[tuple[float, float], ...], tuple[tuple[float, float], ...]]:
    """``(tokens of a prompt, FLOP/s)`` and ``(bytes of a sequence's layer, bytes/s)``: the KV cache itself, timed."""
    family = _family(effort.hidden_size, effort.head_size)
    shape = family.shape
    prompts, decodes = [], []
    item = DTYPE_BYTES[dtype]
    with _kv_store(device, shape, dtype, effort, folder, tier) as store:
        for length in effort.lengths:
            sequences = [_sequence(length) for _ in range(effort.sequences)]
            for sequence in sequences:
                assert store.admit(sequence)
            few = MicroBatch(tuple(Segment(each, 0, length, keeps_kv=True) for each in sequences[:2]))
            seconds = _attend_seconds(device, store, shape, dtype, few, effort) / 2
            prompts.append((float(length), 4.0 * shape.num_heads * shape.head_size * length**2 / seconds))
            step = MicroBatch(tuple(Segment(each, length - 1, 1, keeps_kv=True) for each in sequences))
            seconds = _attend_seconds(device, store, shape, dtype, step, effort) / len(sequences)
            num_bytes = 2.0 * shape.num_kv_heads * shape.head_size * item * length
            decodes.append((num_bytes, num_bytes / seconds))
            for sequence in sequences:
                store.release(sequence)
    return tuple(prompts), tuple(decodes)


def _attend_seconds(
    device: Device, store: KVStore, shape: ModelShape, dtype: str, batch: MicroBatch, effort: Effort
) -> float:
    kind: torch.dtype = getattr(torch, dtype)
    qkv_T3NH = torch.randn(batch.num_tokens, 3, shape.num_heads, shape.head_size).to(
        dtype=kind, device=device.torch_device
    )
    q, k, v = (qkv_T3NH[:, index] for index in range(3))

    def layers() -> None:
        for layer in range(shape.num_layers):
            store.attend(layer, batch, q, k, v)

    return _timed(device, layers, effort.repeats) / shape.num_layers


def _sequence(length: int) -> TokenSequence:
    return TokenSequence([1] * length, length, length + 1, SamplingParams())


@contextmanager
def _kv_store(
    device: Device, shape: ModelShape, dtype: str, effort: Effort, folder: Path, tier: TierName
) -> Iterator[KVStore]:
    """A KV cache with room for what is measured, in one tier."""
    tokens = effort.sequences * max(effort.lengths)
    room = kv_bytes_per_token(shape, dtype) * (tokens + 1) + GIB
    units = dict.fromkeys((EMBED, HEAD, *(layer_name(i) for i in range(shape.num_layers))), PAGE_BYTES)
    shares = Shares(*(100 if each is tier else 0 for each in TierName))
    plan = resolve_plan(
        PlanOptions(
            device=device.name, dtype=dtype, kv=shares, device_memory=room, host_memory=room, disk_space=room,
            weights=Shares(100, 0, 0), micro_batch=2 * max(effort.lengths),
        ),
        shape=shape, stored=StoredWeights(dtype, units), device=device.name, facts=facts_of(device), disk_dir=folder,
    )  # fmt: skip
    tiers = {
        TierName.DEVICE: MemoryTier(TierName.DEVICE, room, device.allocate),
        TierName.HOST: MemoryTier(TierName.HOST, room, device.allocate_host),
    }
    with (
        closing(DiskTier(room, folder)) as disk,
        closing(KVStore(plan, shape, device, tiers, disk, Traffic())) as store,
    ):
        yield store


@contextmanager
def _scratch(folder: Path, effort: Effort) -> Iterator[WeightFiles]:
    """A model directory of nothing but units, read as the engine reads weights; gone afterwards."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix=".measure-", dir=folder))
    try:
        units = [_write_unit(path, name, size) for size in effort.transfers for name in _units_of(size, effort)]
        manifest = Manifest(
            model_type="none", config={}, dtype="bfloat16", units=tuple(units),
            num_bytes=sum(unit.num_bytes for unit in units), source="", created_by="",
        )  # fmt: skip
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


def _disk_reads(files: WeightFiles, device: Device, effort: Effort) -> tuple[tuple[float, float], ...]:
    """``(bytes of a transfer, bytes/s)``; each file's first read, which checks it, does not count."""
    out = device.allocate_host(max(effort.transfers))
    points = []
    for size in effort.transfers:
        names = _units_of(size, effort)
        for name in names:
            files.read_unit(name, out)
        found = []
        for _ in range(effort.repeats):
            start = time.perf_counter()
            for name in names:
                files.read_unit(name, out)
            found.append(size * len(names) / (time.perf_counter() - start))
        points.append((float(size), median(found)))
    return tuple(points)


def _disk_writes(folder: Path, effort: Effort) -> tuple[tuple[float, float], ...]:
    """``(bytes, bytes/s)`` of a spill file."""
    size = effort.transfers[-1]
    with closing(DiskTier(2 * size, folder)) as disk:
        extent = disk.allocate(size, "measuring")
        data = torch.ones(size, dtype=torch.uint8)
        extent.write(0, data)
        start = time.perf_counter()
        for _ in range(effort.repeats):
            extent.write(0, data)
        return ((float(MIB), size * effort.repeats / (time.perf_counter() - start)),)


def _copies(device: Device, effort: Effort) -> tuple[tuple[tuple[float, float], ...], tuple[tuple[float, float], ...]]:
    """Both ways between host and device, ``(bytes, bytes/s)``."""
    both: list[tuple[tuple[float, float], ...]] = []
    for lane in (LaneName.HOST_TO_DEVICE, LaneName.DEVICE_TO_HOST):
        points = []
        for size in effort.transfers:
            host, on_device = device.allocate_host(size), device.allocate(size)
            into, source = (on_device, host) if lane is LaneName.HOST_TO_DEVICE else (host, on_device)
            source.zero_()
            points.append((float(size), size / _copy_seconds(device, lane, into, source, effort.repeats)))
        both.append(tuple(points))
    return both[0], both[1]


def _copy_seconds(device: Device, lane: LaneName, into: Tensor, source: Tensor, repeats: int) -> float:
    if device.shares_host_memory:
        return _timed(device, lambda: into.copy_(source), repeats)
    return _timed(device, lambda: device.copy(lane, into, source, device.compute_mark()).wait(), repeats)


def _together(files: WeightFiles, device: Device, dtype: str, effort: Effort) -> tuple[float, float]:
    """What is left of the disk's and of compute's rate while the other is busy, each at most 1."""
    family = _family(effort.hidden_size, effort.head_size)
    weights = [_layer_weights(family, device, dtype) for _ in range(effort.layers)]
    tokens = min(512, max(effort.tokens))
    out = device.allocate_host(max(effort.transfers))
    names = _units_of(effort.transfers[-1], effort)
    stop = Event()
    done = [0]

    def read() -> None:
        while not stop.is_set():
            for name in names:
                done[0] += files.read_unit(name, out)
                if stop.is_set():
                    return

    def rate_while(work: Callable[[], object]) -> float:
        """Bytes/s of the disk while ``work`` runs in this thread."""
        stop.clear()
        done[0] = 0
        start = time.perf_counter()
        thread = Thread(target=read)
        thread.start()
        try:
            work()
        finally:
            stop.set()
            thread.join()
        return done[0] / (time.perf_counter() - start)

    alone_s = _layer_seconds(device, family, weights, dtype, tokens, effort.repeats)
    disk_alone = rate_while(lambda: time.sleep(effort.busy_s))
    busy: list[float] = []

    def compute() -> None:
        until = time.perf_counter() + effort.busy_s
        while time.perf_counter() < until or not busy:
            busy.append(_layer_seconds(device, family, weights, dtype, tokens, 1))

    disk_busy = rate_while(compute)
    return min(1.0, disk_busy / disk_alone), min(1.0, alone_s / median(busy))


__all__ = ["FULL", "QUICK", "Effort", "identity_of", "measure"]
