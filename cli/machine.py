"""What a worker on this machine will find: the device, and the memory that is free."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.devices.facts import MachineFacts


def may_have_gpu(devices: Path = Path("/dev")) -> bool:
    """Whether torch may find a GPU: one of NVIDIA's, or Windows' behind Linux."""
    return any(devices.glob("nvidia[0-9]*")) or (devices / "dxg").exists()


def cautious_cpu_facts() -> "MachineFacts":
    """What a CPU worker will find, with at least as many threads as torch will start: each takes workspace.

    Imports no torch, which takes longer than all the rest of a command.
    """
    from engine.devices.facts import MachineFacts, free_host_memory

    free = free_host_memory()
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = max(os.cpu_count() or 1, int(asked) if asked.isdecimal() else 1)
    return MachineFacts(free, free, shares_host_memory=True, attention_threads=threads)


def exact_facts(name: str | None) -> "tuple[str, MachineFacts]":
    """The device's full name and just what its worker will find.

    Raises:
        DeviceUnavailable: there is no such device.
    """
    from engine.devices.open import facts_of, open_device

    device = open_device(name)
    try:
        return device.name, facts_of(device)
    finally:
        device.close()
