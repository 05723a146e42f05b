"""Opening a device: what is there, what is not, and what it has free."""

from pathlib import Path

import pytest
import torch

from engine.devices import open as opening
from engine.devices.cuda import CudaDevice
from engine.devices.host import HostDevice
from engine.devices.open import facts_of, open_device
from engine.errors import DeviceUnavailable
from engine.units import GIB, MIB
from tests.engine.like_cuda import stubbed_cuda


def test_a_gpu_that_cannot_be_used_is_no_reason_for_a_night_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(opening, "_NVIDIA", tmp_path / "nvidia0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceUnavailable, match=r"cannot use it: update the driver.*say --device cpu"):
        open_device(None)
    assert isinstance(open_device("cpu"), HostDevice)


def test_a_machine_without_a_gpu_computes_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_NVIDIA", tmp_path / "nvidia0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert isinstance(open_device(None), HostDevice)


def test_a_gpu_has_less_free_than_it_says_and_shares_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    device = stubbed_cuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10 * GIB, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    facts = facts_of(device)
    assert facts.device_free == 10 * GIB - 512 * MIB
    assert facts.gpus == 4


def test_a_limit_on_a_gpus_memory_ends_with_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = stubbed_cuda(monkeypatch)
    fractions: list[float] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10 * GIB, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: fractions.append(share))
    device.limit_memory(4 * GIB - 256 * MIB)
    device.limit_memory(100 * GIB)
    device.close()
    assert fractions == [0.25, 1.0, 1.0]


def test_spans_are_counted_from_a_recent_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU tells milliseconds in single precision: after a day they are 8 ms apart."""
    device = stubbed_cuda(monkeypatch)
    assert isinstance(device, CudaDevice)
    first = device._zero
    with device.computing():
        assert device._zero is first
    monkeypatch.setattr("engine.devices.cuda._ZERO_HOLDS_S", 0.0)
    with device.computing():
        assert device._zero is not first
        assert device._zero[1] > first[1]
