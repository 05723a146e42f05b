"""Layers streamed from the disk as the engine streams them: what reading is alone, and what both lose together."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from engine.devices.open import facts_of
from engine.dtypes import DType
from engine.measure.disk import read_rate, unit_files
from engine.measure.effort import Effort
from engine.measure.products import family_of
from engine.memory.device import Device
from engine.memory.lane import LaneName
from engine.memory.memory import Memory
from engine.model.family import EMBED, HEAD, NamedWeights, layer_name
from engine.planner.plan import PlanOptions
from engine.planner.plan_input import PlanInput
from engine.planner.resolve import resolve_plan
from engine.tiers import Shares, TierName
from engine.weights.files import WeightFiles
from engine.weights.layout import UnitLayout
from engine.weights.stored import StoredWeights
from engine.weights.stream import WeightStream

MIN_STREAMED = 4
"""Layers: more than the ring has room for."""
_ENDLESS = 1 << 50

Compute = Callable[[NamedWeights], object]
"""One layer with these weights."""


@dataclass(frozen=True, slots=True)
class Streamed:
    """How fast layers of one width are read and computed."""

    layer_bytes: int
    read_rate: float
    """Bytes/s, nothing else being done."""
    read_share: float
    """What is left of it while layers are computed."""
    layer_s: float
    """Seconds of computing a layer while others are read, its weights just having come."""


def streamed(
    device: Device, dtype: DType, hidden_size: int, compute: Compute, folder: Path, effort: Effort
) -> Streamed:
    """Read and compute layers of one width through a weight stream of its own.

    Raises:
        EngineError, OSError: the disk failed, or has no room.
    """
    family = family_of(hidden_size, effort)
    spec = next(unit for unit in family.units() if unit.name == layer_name(0))
    layout = UnitLayout.plain(spec, dtype)
    number = max(MIN_STREAMED, effort.streamed_bytes // layout.num_bytes)
    layers = [layer_name(index) for index in range(number)]
    nothing = UnitLayout({}, UnitLayout.plain(replace(spec, tensors=()), dtype).num_bytes)
    units = {EMBED: nothing, **dict.fromkeys(layers, layout), HEAD: nothing}
    with unit_files(folder / f"width-{hidden_size}", units, dtype, effort) as files:
        alone = read_rate(files, layers, device, effort)
        sizes = {name: unit.num_bytes for name, unit in units.items()}
        rate, layer_s = _together(device, dtype, family.shape.hidden_size, sizes, files, compute, folder, effort)
    return Streamed(layout.num_bytes, alone, min(1.0, rate / alone), layer_s)


def _together(
    device: Device,
    dtype: DType,
    hidden_size: int,
    sizes: dict[str, int],
    files: WeightFiles,
    compute: Compute,
    folder: Path,
    effort: Effort,
) -> tuple[float, float]:
    """Bytes/s of reading and seconds of a layer, side by side."""
    shape = replace(family_of(hidden_size, effort).shape, num_layers=len(sizes) - 2)
    options = PlanOptions(
        device=device.name, dtype=dtype, weights=Shares(0, 0, 100), kv=Shares(100, 0, 0), device_memory=_ENDLESS,
        host_memory=_ENDLESS, disk_space=0, micro_batch=max(effort.tokens),
    )  # fmt: skip
    plan = resolve_plan(
        PlanInput(
            shape=shape,
            stored=StoredWeights.of_one_tensor(dtype, sizes),
            device=device.name,
            facts=facts_of(device),
            options=options,
            disk_dir=folder,
        )
    )
    memory = Memory(device, plan.other_bytes, folder)
    traffic = memory.traffic
    found: list[float] = []
    units = dict.fromkeys(sizes, TierName.DISK) | dict.fromkeys((EMBED, HEAD), TierName.DEVICE)
    opened = WeightStream(files, memory, units=units, dtype=plan.dtype, num_slots=plan.staging_slots)
    with closing(opened) as stream:
        until = time.perf_counter() + effort.busy_s
        for one_pass in range(1000):
            if one_pass == 1:
                found.clear()  # the first compiles, and finds what was read before it
                traffic.take()
            for index in range(shape.num_layers):
                with stream.layer(index) as weights:
                    effort.pause()
                    start = time.perf_counter()
                    compute(weights)
                    device.compute_mark().wait()
                    found.append(time.perf_counter() - start)
            if one_pass and time.perf_counter() > until:
                break
        moved = traffic.take()
    return moved.num_bytes[LaneName.DISK_READ] / moved.seconds[LaneName.DISK_READ], median(found)
