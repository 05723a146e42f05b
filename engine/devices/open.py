"""From a device's name to the device and the memory it has free."""

from pathlib import Path

import torch

from engine.devices.facts import MachineFacts, free_host_memory
from engine.devices.gpu_errors import gpu_errors
from engine.devices.host import HostDevice
from engine.devices.simulated import SimulatedDevice
from engine.errors import DeviceUnavailable
from engine.memory.device import Device
from engine.units import MIB

_NVIDIA = Path("/dev/nvidia0")


def open_device(name: str | None) -> Device:
    """``cpu``, ``cuda`` or ``cuda:N``, ``simulated``; ``None``: the first GPU, or the CPU where there is none.

    Raises:
        DeviceUnavailable: an unknown name, or a GPU that is not there.
    """
    if name is None:
        if not torch.cuda.is_available() and _NVIDIA.exists():
            built = (
                f"which is made for CUDA {torch.version.cuda}" if torch.version.cuda else "which is made without CUDA"
            )
            raise DeviceUnavailable(
                f"this machine has an NVIDIA GPU, and PyTorch {torch.__version__}, {built}, cannot use it: update the "
                "driver (nvidia-smi tells the newest CUDA that it knows) or install another PyTorch; to compute on the "
                "CPU all the same, say --device cpu"
            )
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


LOADED_LATER = 512 * MIB
"""GPU memory that no plan may use: CUDA loads kernels when they are first called, and its libraries take workspaces."""


def facts_of(device: Device) -> MachineFacts:
    """What a plan may count on."""
    host_free = free_host_memory()
    if device.torch_device.type == "cuda":
        with gpu_errors(device.name):
            device_free, _ = torch.cuda.mem_get_info(device.torch_device)
        device_free = max(0, device_free - LOADED_LATER)
        return MachineFacts(
            device_free, host_free, shares_host_memory=False, capability=device.capability,
            gpus=max(1, torch.cuda.device_count()),
        )  # fmt: skip
    if device.shares_host_memory:
        return MachineFacts(host_free, host_free, shares_host_memory=True, attention_threads=torch.get_num_threads())
    return MachineFacts(host_free // 2, host_free // 2, shares_host_memory=False, capability=device.capability)
