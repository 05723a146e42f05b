"""The machine, measured in a minute or two: what the planner needs to know, by running what the engine runs."""

import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from engine.attention.table import kernel_for
from engine.devices.facts import MachineFacts, free_disk_space
from engine.devices.open import facts_of
from engine.dtypes import DType
from engine.measure.attention import OnHost
from engine.measure.disk import copies, disk_writes, scratch_folder, small_reads
from engine.measure.effort import FULL, ON_GPU, QUICK, SOURCE, Effort, Points
from engine.measure.identity import identity_of
from engine.measure.overheads import overheads
from engine.measure.room import measuring_budgets, within
from engine.measure.unpacking import packed_per_s, unpacked_per_s
from engine.measure.widths import OfWidth, least_segment_s, width_of
from engine.memory.device import Device
from engine.memory.lane import LaneName
from engine.planner.hardware import CONTAINED, Hardware
from engine.planner.plan import PlanOptions
from engine.planner.rates import Figure, Rate
from engine.tiers import TierName

Say = Callable[[str], None]


def measure(
    device: Device,
    folder: Path,
    *,
    options: PlanOptions | None = None,
    effort: Effort | None = None,
    stop: Callable[[], bool] = lambda: False,
    say: Say = lambda _: None,
) -> Hardware:
    """What this machine can do with ``device``; ``folder`` is where spill files and models lie.

    Without an ``effort``, what is worth measuring of such a device. Never more of a tier is held than the budgets of
    ``options`` allow, where those are given. ``stop`` is asked between small steps whether it shall end.

    Raises:
        Unmeasurable: the budgets are too small to measure anything of use; nothing was done.
        Interrupted: ``stop`` said so; nothing is left behind.
        EngineError: the disk or the device failed, or the disk has no room for the scratch files.
        OSError: nothing can be written to ``folder``.
    """
    facts = facts_of(device)
    effort = effort or (ON_GPU if device.torch_device.type == "cuda" else FULL)
    dtypes = _dtypes(facts)
    if options is not None:
        effort = within(effort, measuring_budgets(options, facts, folder), dtypes, facts, device.name)
    effort = replace(effort, stopped=stop)
    with scratch_folder(folder) as scratch:
        say("overheads")
        found = overheads(device, dtypes[0], scratch, effort)
        with torch.inference_mode(), device.computing():
            found = replace(found, of_segment=least_segment_s(device, dtypes[0], found, scratch, effort))
            say("disk")
            reads = [small_reads(scratch, dtypes[0], device, effort)]
            measured: list[OfWidth] = []
            share = 1.0
            for width in effort.widths:
                say(f"layers of width {width[0]}")
                measured.append(width_of(device, width, dtypes, found, share, scratch, effort))
                share = measured[-1].width.matmul[dtypes[0]].busy_share
            say("unpacking")
            unpacking = unpacked_per_s(device, dtypes[0], effort.widths[-1][0], effort)
            packing = packed_per_s(device, dtypes[0], effort)
            say("links")
            to_device, to_host = (
                copies(device, lane, effort) for lane in (LaneName.HOST_TO_DEVICE, LaneName.DEVICE_TO_HOST)
            )
        writes = disk_writes(scratch, effort)
    widths, spills = [each.width for each in measured], [each.spilled for each in measured]
    from_disk = [each.streamed for each in measured if each.streamed is not None]
    reads += [(float(each.layer_bytes), each.read_rate) for each in from_disk]
    disk_share = median(each.read_share for each in from_disk)
    hosts = [each.host for each in measured if each.host is not None]
    packed = [each.packed for each in measured if each.packed is not None]
    packed_hosts = [each.packed_host for each in measured if each.packed_host is not None]
    return Hardware(
        name="this machine",
        description=f"{device.name} on {platform.node()}, measured {time.strftime('%Y-%m-%d %H:%M')}",
        device=device.torch_device.type,
        shares_host_memory=device.shares_host_memory,
        capacity={
            TierName.DEVICE: Figure(facts.device_free, "free when measured"),
            TierName.HOST: Figure(facts.host_free, "free when measured"),
            TierName.DISK: Figure(free_disk_space(folder), "free when measured"),
        },
        matmul=widths[-1].matmul,
        prompt_attention=widths[-1].prompt_attention,
        decode_attention=widths[-1].decode_attention,
        host_attention=_on_host(hosts) if hosts else None,
        lanes={
            LaneName.DISK_READ: Rate(tuple(reads), SOURCE, busy_share=disk_share),
            LaneName.DISK_WRITE: Rate(writes, SOURCE, busy_share=disk_share),
            LaneName.HOST_TO_DEVICE: Rate(to_device, SOURCE),
            LaneName.DEVICE_TO_HOST: Rate(to_host, SOURCE),
        },
        layer_overhead=Figure(found.of_layer, SOURCE),
        segment_overhead=Figure(found.of_segment, SOURCE),
        pass_overhead=Figure(found.of_pass, SOURCE),
        sequence_overhead=Figure(found.of_sequence, SOURCE),
        host_overhead=Figure(min(each.beside_s for each in hosts), SOURCE) if hosts else CONTAINED,
        widths=tuple(widths),
        # One call attends to a whole group elsewhere, as it does on the device.
        scratch_attention=_merged(each.attention for each in spills) if device.shares_host_memory else None,
        kv_lanes={
            LaneName.DISK_READ: _merged(each.reads for each in spills),
            LaneName.DISK_WRITE: _merged(each.writes for each in spills),
        },
        unpacking=Figure(unpacking, SOURCE),
        packing=Figure(packing, SOURCE),
        packed_decode=_merged(packed) if packed else None,
        packed_host_attention=_on_host(packed_hosts) if packed_hosts else None,
        identity=identity_of(device, folder),
    )


def _merged(curves: Iterable[Points]) -> Rate:
    """One curve through the points of several; what they have in common, the last one says."""
    return Rate(tuple(sorted({size: rate for points in curves for size, rate in points}.items())), SOURCE)


def _on_host(hosts: Sequence[OnHost]) -> Rate:
    return replace(_merged(each.points for each in hosts), busy_share=median(each.busy_share for each in hosts))


def _dtypes(facts: MachineFacts) -> tuple[DType, ...]:
    """Those that the device computes in, the best first: a card's begin with float16."""
    of_gpus = (DType.FLOAT16, DType.BFLOAT16, DType.FLOAT32)
    dtypes = of_gpus if facts.capability is not None else (DType.BFLOAT16, DType.FLOAT32)
    return tuple(dtype for dtype in dtypes if kernel_for(dtype, facts.capability) is not None)


__all__ = ["FULL", "QUICK", "Effort", "identity_of", "measure"]
