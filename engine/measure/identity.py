"""What tells one machine from another, as far as its figures depend on it."""

import os
import platform
from pathlib import Path

import torch

from engine.memory.device import Device


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
