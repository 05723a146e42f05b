"""What a GPU's failures become: too little memory, or a device that the process must leave."""

from collections.abc import Callable

import pytest
import torch

from engine.devices.cuda import CudaDevice, CudaEvent
from engine.errors import DeviceFailed, EngineError, TierFull
from engine.memory.lane import LaneName, Reached, ThreadLane
from engine.memory.tier import MemoryTier
from engine.tiers import TierName
from tests.engine.like_cuda import Recorded, stubbed_cuda

NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]
LOST = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be late"),
    torch.AcceleratorError("anything"),
    RuntimeError("CUDA error: unspecified launch failure\nand more lines"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"),
    RuntimeError("CUDA error: no kernel image is available for execution on the device"),
    RuntimeError("cutlassF: no kernel found to launch!"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
]
OURS = [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("no"), EngineError("a sentence")]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    return stubbed_cuda(monkeypatch)


def fail_with(error: BaseException) -> Callable[..., object]:
    def fail(*_: object, **__: object) -> object:
        raise error

    return fail


@pytest.mark.parametrize("error", NO_MEMORY, ids=str)
def test_too_little_memory(error: Exception, device: CudaDevice) -> None:
    with pytest.raises(TierFull, match=r"cuda:0 has too little memory.*--device-memory") as caught, device.computing():
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", LOST, ids=str)
def test_a_lost_device(error: Exception, device: CudaDevice) -> None:
    with pytest.raises(DeviceFailed, match=r"^cuda:0: ") as caught, device.computing():
        raise error
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", OURS, ids=str)
def test_whatever_is_no_failure_of_the_gpu_stays_what_it_is(error: Exception, device: CudaDevice) -> None:
    with pytest.raises(type(error)) as caught, device.computing():
        raise error
    assert caught.value is error


@pytest.mark.parametrize("error", LOST[:3], ids=str)
def test_a_lane_on_a_lost_device_says_so(error: Exception, device: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    into, source = torch.zeros(4), torch.ones(4)
    lane = ThreadLane(LaneName.DISK_READ)
    monkeypatch.setattr(torch.Tensor, "record_stream", fail_with(error))
    try:
        copied = lane.submit(lambda: device.copy(LaneName.HOST_TO_DEVICE, [(into, source)], Reached()) and None)
        with pytest.raises(DeviceFailed):
            copied.wait()
    finally:
        lane.close()


def test_whoever_waits_for_a_lost_device_hears_of_it(device: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = fail_with(LOST[0])
    mark = device.compute_mark()
    assert isinstance(mark, CudaEvent)
    assert mark.span() is not None
    for name, use in {"synchronize": mark.wait, "query": mark.span, "elapsed_time": mark.span}.items():
        with monkeypatch.context() as patch:
            patch.setattr(Recorded, name, lost)
            with pytest.raises(DeviceFailed):
                use()
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(torch.cuda, "stream", lost)
    values = torch.ones(1)
    for use in (
        device.synchronize,
        device.close,
        lambda: device.allocate(1),
        lambda: device.upload(values),
        lambda: device.download(values),
    ):
        with pytest.raises(DeviceFailed):
            use()


def test_a_tier_says_what_it_had_no_room_for(device: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "stream", fail_with(NO_MEMORY[0]))
    tier = MemoryTier(TierName.DEVICE, 1024, device.allocate)
    with pytest.raises(TierFull, match="left for weights"):
        tier.allocate(1000, "weights")
    assert tier.used == 0
