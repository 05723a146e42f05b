"""The machine, in the words that a result needs beside it."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_MATRIX_FLAGS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512f", "avx2", "bf16", "asimd")


def describe_machine(cache: Path) -> dict[str, object]:
    """Processor, memory, disk, versions, and how busy it was with other things when this began."""
    load = os.getloadavg()[0]
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "matrix_units": [flag for flag in _MATRIX_FLAGS if flag in _cpuinfo("flags").split()],
        "compared_in": default_dtype(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": _gpu(),
        "disk": _file_system(cache),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("torch", "transformers", "accelerate")},
        "load_average": round(load, 2),
    }


def default_dtype() -> str:
    """What systems are compared in: bfloat16; float16 on a GPU that has no kernels for it; or float32 on a CPU that is
    slow in it, where peers would crawl."""
    import torch

    from engine.attention.table import kernel_for
    from engine.dtypes import DType
    from engine.formats.linear import has_products

    if torch.cuda.is_available():
        return DType.BFLOAT16 if kernel_for(DType.BFLOAT16, torch.cuda.get_device_capability()) else DType.FLOAT16
    return DType.BFLOAT16 if has_products(torch.bfloat16) else DType.FLOAT32


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in fields if name.strip() == key), "")


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _file_system(folder: Path) -> str:
    try:
        mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    inside = [mount for mount in mounts if folder.resolve().is_relative_to(mount[1])]
    device, _, kind = max(inside, key=lambda mount: len(mount[1]), default=["unknown", "", "unknown"])
    return f"{kind} on {device}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
