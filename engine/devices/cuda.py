"""An NVIDIA GPU: streams for lanes, events for order, pinned host memory. Compute runs on the current stream."""

from time import perf_counter

import torch
from torch import Tensor

from engine.errors import DeviceUnavailable
from engine.memory.lane import Event, LaneName


class CudaClock:
    """Places the GPU's time on ``perf_counter``'s clock."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._zero = timed_event(stream)
        self._zero.synchronize()
        self._zero_s = perf_counter()

    def seconds(self, event: torch.cuda.Event) -> float:
        """When the GPU reached an event that it has passed."""
        milliseconds: float = self._zero.elapsed_time(event)
        return self._zero_s + milliseconds / 1000


def timed_event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """The end of what the stream was given so far."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


class CudaEvent:
    """A point on a CUDA stream, and where the work before it began."""

    def __init__(self, stream: torch.cuda.Stream, clock: CudaClock, began: torch.cuda.Event | None = None) -> None:
        self.event = timed_event(stream)
        self._began = began or self.event
        self._clock = clock

    def wait(self) -> None:
        """Block the host until the stream has passed the point."""
        self.event.synchronize()

    def span(self) -> tuple[float, float] | None:
        """Never blocks."""
        if not self.event.query():  # type: ignore[no-untyped-call]
            return None
        return self._clock.seconds(self._began), self._clock.seconds(self.event)


class CudaDevice:
    """Implements ``engine.devices.base.Device`` for one GPU."""

    shares_host_memory = False

    def __init__(self, index: int) -> None:
        if not torch.cuda.is_available():
            raise DeviceUnavailable("no CUDA device is usable here; look at nvidia-smi, or use --device cpu")
        count = torch.cuda.device_count()
        if index >= count:
            raise DeviceUnavailable(f"there is no cuda:{index}; this machine has {count} CUDA device(s)")
        self.name = f"cuda:{index}"
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(self.torch_device)
        self._compute = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(self._compute)
        self._clock = CudaClock(self._compute)
        self._lanes = {
            lane: torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
            for lane in (LaneName.HOST_TO_DEVICE, LaneName.DEVICE_TO_HOST)
        }

    def allocate(self, num_bytes: int) -> Tensor:
        """From PyTorch's caching allocator."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.torch_device)

    def allocate_host(self, num_bytes: int) -> Tensor:
        """Pinned, so that copies are asynchronous and at full link speed; pinned pages are aligned for direct reads."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, lane: LaneName, destination: Tensor, source: Tensor) -> Event:
        """An asynchronous copy on the lane's stream, after the compute issued so far."""
        stream = self._lanes[lane]
        stream.wait_stream(self._compute)
        began = timed_event(stream)
        with torch.cuda.stream(stream):
            destination.copy_(source, non_blocking=True)
        for tensor in (destination, source):
            if tensor.is_cuda:
                # The allocator must not hand the memory to compute again before this stream is done with it.
                tensor.record_stream(stream)
        return CudaEvent(stream, self._clock, began)

    def compute_after(self, event: Event) -> None:
        """The compute stream waits on the GPU; the host goes on. Work of the host itself is waited for here."""
        if isinstance(event, CudaEvent):
            self._compute.wait_event(event.event)
        else:
            event.wait()

    def compute_mark(self) -> Event:
        """A point on the compute stream."""
        return CudaEvent(self._compute, self._clock)

    def upload(self, values: Tensor) -> Tensor:
        """Through pinned memory, in order with compute."""
        return values.pin_memory().to(self.torch_device, non_blocking=True)

    def download(self, values: Tensor) -> Tensor:
        """Blocks the host until compute has made the values."""
        return values.cpu()

    def close(self) -> None:
        """Wait for what is under way."""
        torch.cuda.synchronize(self.torch_device)
