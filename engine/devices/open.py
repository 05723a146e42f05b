"""From a device's name to the device and the memory it has free."""

import torch

from engine.devices.facts import MachineFacts, free_host_memory
from engine.devices.host import HostDevice
from engine.devices.simulated import SimulatedDevice
from engine.errors import DeviceUnavailable
from engine.memory.device import Device


def open_device(name: str | None) -> Device:
    """``cpu``, ``cuda`` or ``cuda:N``, ``simulated``; ``None``: the first GPU, or the CPU where there is none.

    Raises:
        DeviceUnavailable: an unknown name, or a GPU that is not there.
    """
    if name is None:
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return HostDevice()
    if name == "simulated":
        return SimulatedDevice()
    kind, _, index = name.partition(":")
    if kind == "cuda" and (not index or index.isdecimal()):
        from engine.devices.cuda import CudaDevice

        return CudaDevice(int(index or 0))
    raise DeviceUnavailable(f"{name!r} is not a device; use cpu, cuda:0 (or another number) or simulated")


def facts_of(device: Device) -> MachineFacts:
    """What a plan may count on."""
    host_free = free_host_memory()
    if device.torch_device.type == "cuda":
        device_free, _ = torch.cuda.mem_get_info(device.torch_device)
        capability = torch.cuda.get_device_capability(device.torch_device)
        return MachineFacts(device_free, host_free, shares_host_memory=False, capability=capability)
    if device.shares_host_memory:
        return MachineFacts(host_free, host_free, shares_host_memory=True, attention_threads=torch.get_num_threads())
    return MachineFacts(host_free // 2, host_free // 2, shares_host_memory=False)
