"""The machine, measured: what the planner needs to know, by running what the engine runs. It takes under a minute."""

import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from engine.devices.base import Device
from engine.devices.open import facts_of
from engine.measure.attention import attention, spilled
from engine.measure.disk import copies, disk_reads, disk_writes, scratch_folder, scratch_units, together
from engine.measure.effort import FULL, QUICK, SOURCE, Effort
from engine.measure.identity import identity_of
from engine.measure.overheads import overheads
from engine.measure.products import small_layer_seconds, widths_of
from engine.memory.lane import LaneName
from engine.planner.hardware import Figure, Hardware, Rate
from engine.planner.machine import free_disk_space
from engine.planner.plan import TierName

Say = Callable[[str], None]


def measure(device: Device, folder: Path, *, effort: Effort = FULL, say: Say = lambda _: None) -> Hardware:
    """What this machine can do with ``device``; ``folder`` is where spill files and models lie.

    Raises:
        EngineError: the disk or the device failed, or the disk has no room for the scratch files.
        OSError: nothing can be written to ``folder``.
    """
    facts = facts_of(device)
    dtypes = _dtypes(device)
    with scratch_folder(folder) as scratch:
        say("overheads")
        found = overheads(device, dtypes[0], scratch, effort)
        with torch.inference_mode(), device.computing():
            say("products")
            widths = widths_of(device, dtypes, small_layer_seconds(device, dtypes[0], effort), effort)
            say("attention")
            attends = attention(device, dtypes[0], found, scratch, effort)
            say("disk and links")
            with scratch_units(scratch, effort) as files:
                reads = disk_reads(files, device, effort)
                disk_share, compute_share = together(files, device, dtypes[0], effort)
            kv_lanes = spilled(device, dtypes[0], scratch, effort)
            writes = disk_writes(scratch, effort)
            to_device, to_host = (
                copies(device, lane, effort) for lane in (LaneName.HOST_TO_DEVICE, LaneName.DEVICE_TO_HOST)
            )
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
            # Only a processor that reads and computes with the same cores and memory is slowed by reading.
            dtype: Rate(rate.points, rate.source, busy_share=compute_share if shares else 1.0)
            for dtype, rate in widths[-1].matmul.items()
        },
        prompt_attention=attends.prompt,
        decode_attention=attends.decode,
        host_attention=None,
        lanes={
            LaneName.DISK_READ: Rate(reads, SOURCE, busy_share=disk_share),
            LaneName.DISK_WRITE: Rate(writes, SOURCE, busy_share=disk_share),
            LaneName.HOST_TO_DEVICE: Rate(to_device, SOURCE),
            LaneName.DEVICE_TO_HOST: Rate(to_host, SOURCE),
        },
        layer_overhead=Figure(found.of_layer, SOURCE),
        segment_overhead=Figure(found.of_segment, SOURCE),
        pass_overhead=Figure(found.of_pass, SOURCE),
        sequence_overhead=Figure(found.of_sequence, SOURCE),
        widths=widths,
        kv_lanes=kv_lanes,
        identity=identity_of(device, folder),
    )


def _dtypes(device: Device) -> tuple[str, ...]:
    """The best first."""
    if device.torch_device.type == "cuda":
        return ("float16", "bfloat16", "float32")
    return ("bfloat16", "float32")


__all__ = ["FULL", "QUICK", "Effort", "identity_of", "measure"]
