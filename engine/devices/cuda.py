"""An NVIDIA GPU: streams for lanes, events for order, pinned host memory."""

import ctypes
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import get_ident
from time import perf_counter

import torch
from torch import Tensor

from engine.devices.gpu_errors import gpu_errors
from engine.devices.pinned import cpus_near, pinned_empty
from engine.errors import DeviceUnavailable
from engine.memory.device import Pieces
from engine.memory.lane import Event, LaneName
from engine.units import MIB

_Zero = tuple[torch.cuda.Event, float]
"""A point that the GPU has passed, and ``perf_counter`` at it."""


_ZERO_HOLDS_S = 10.0
"""Seconds after which spans are counted from a new point: the GPU tells them as single-precision milliseconds, which
are 8 ms apart after a day."""


_ROUNDED_UP = 256 * MIB
"""Bytes that the allocator may hold beyond what was asked of it: it hands out whole blocks."""


def timed_event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """The end of what the stream was given so far."""
    event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


class CudaEvent:
    """A point on a CUDA stream, and where the work before it began."""

    def __init__(
        self, name: str, stream: torch.cuda.Stream, zero: _Zero, began: torch.cuda.Event | None = None
    ) -> None:
        self._name = name
        self.event = timed_event(stream)
        self._began = began or self.event
        self._zero = zero

    def wait(self) -> None:
        """Block the host until the stream has passed the point.

        Raises:
            DeviceFailed: the GPU failed before.
        """
        with gpu_errors(self._name), torch.cuda.device(self._name):
            self.event.synchronize()

    def span(self) -> tuple[float, float] | None:
        """Never blocks."""
        event, seconds = self._zero
        with gpu_errors(self._name), torch.cuda.device(self._name):
            if not self.event.query():  # type: ignore[no-untyped-call]
                return None
            return seconds + event.elapsed_time(self._began) / 1000, seconds + event.elapsed_time(self.event) / 1000


class CudaDevice:
    """Implements ``engine.memory.device.Device`` for one GPU. Nothing here counts on the calling thread's stream."""

    shares_host_memory = False

    def __init__(self, index: int) -> None:
        if not torch.cuda.is_available():
            raise DeviceUnavailable("no CUDA device is usable here; look at nvidia-smi, or use --device cpu")
        count = torch.cuda.device_count()
        if index >= count:
            raise DeviceUnavailable(f"there is no cuda:{index}; this machine has {count} CUDA device(s)")
        self.name = f"cuda:{index}"
        self.torch_device = torch.device("cuda", index)
        with gpu_errors(self.name):
            self.capability: tuple[int, int] | None = torch.cuda.get_device_capability(self.torch_device)
            self._cpus = cpus_near(_pci_address(index))
        self._streams: defaultdict[tuple[LaneName, int], torch.cuda.Stream] = defaultdict(
            lambda: torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        )
        with gpu_errors(self.name):
            self._compute = self._streams[LaneName.DEVICE_COMPUTE, 0]
            self._zero = self._now()

    def limit_memory(self, num_bytes: int) -> None:
        """Held by PyTorch's allocator, which counts whole blocks of its own."""
        with gpu_errors(self.name):
            _, total = torch.cuda.mem_get_info(self.torch_device)
            torch.cuda.set_per_process_memory_fraction(min(1.0, (num_bytes + _ROUNDED_UP) / total), self.torch_device)

    def allocate(self, num_bytes: int) -> Tensor:
        """Memory from PyTorch's caching allocator, which hands memory out in the order of the compute stream."""
        with self._on(self._compute):
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.torch_device)

    def allocate_host(self, num_bytes: int) -> Tensor:
        """Pinned, so that copies are asynchronous and at full link speed, and page-aligned for direct reads."""
        with gpu_errors(self.name), torch.cuda.device(self.torch_device):
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]

            def register(address: int, size: int) -> int:
                error = int(runtime.cudaHostRegister(address, size, 0))
                if error:
                    _forget_error()  # else the next kernel would be told of it
                return error

            def unregister(address: int) -> None:
                with torch.cuda.device(self.torch_device):  # whoever drops the last view, on whichever thread
                    runtime.cudaHostUnregister(address)

            return pinned_empty(num_bytes, self.name, self._cpus, register, unregister)

    def copy(self, lane: LaneName, pieces: Pieces, after: Event) -> Event:
        """Asynchronous, on a stream of the lane's. Threads have streams of their own: a layer's weights that wait for
        a free buffer hold up no keys and values that compute needs first."""
        with gpu_errors(self.name):
            stream = self._streams[lane, get_ident()]
            self._order(stream, after)
            began = timed_event(stream)
            with self._on(stream):
                for destination, source in pieces:
                    destination.copy_(source, non_blocking=True)
            # The allocator must not hand the memory to compute again before this stream is done with it.
            for destination, source in pieces:
                (destination if destination.is_cuda else source).record_stream(stream)
            return CudaEvent(self.name, stream, self._zero, began)

    def compute_after(self, event: Event) -> None:
        """The compute stream waits on the GPU; the host goes on. Work of the host itself is waited for here."""
        with gpu_errors(self.name):
            self._order(self._compute, event)

    def _order(self, stream: torch.cuda.Stream, event: Event) -> None:
        if isinstance(event, CudaEvent):
            stream.wait_event(event.event)
        else:
            event.wait()

    def compute_mark(self) -> Event:
        """A point on the compute stream."""
        with gpu_errors(self.name):
            return CudaEvent(self.name, self._compute, self._zero)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The thread's operations go to the compute stream; failures of the GPU become errors for people."""
        with self._on(self._compute):
            if perf_counter() - self._zero[1] > _ZERO_HOLDS_S:
                self._zero = self._now()
            yield

    @contextmanager
    def _on(self, stream: torch.cuda.Stream) -> Iterator[None]:
        """The thread's operations go to a stream. The device is made current first, or leaving the stream would make
        another the current one, and a context on it: some hundred megabytes of a GPU that is somebody else's."""
        with gpu_errors(self.name), torch.cuda.device(self.torch_device), torch.cuda.stream(stream):
            yield

    def _now(self) -> _Zero:
        """A point on the compute stream, and when it was reached."""
        with torch.cuda.device(self.torch_device):
            event = timed_event(self._compute)
            event.synchronize()
        return event, perf_counter()

    def upload(self, values: Tensor) -> Tensor:
        """Through pinned memory, in order with compute."""
        with self._on(self._compute):
            return values.pin_memory().to(self.torch_device, non_blocking=True)

    def download(self, values: Tensor) -> Tensor:
        """Blocks the host until compute has made the values: on an event, since a copy's own wait takes a core."""
        self.compute_mark().wait()
        with self._on(self._compute):
            return values.cpu()

    def synchronize(self) -> None:
        """Wait for all streams of the GPU.

        Raises:
            DeviceFailed: it failed before.
        """
        with gpu_errors(self.name):
            torch.cuda.synchronize(self.torch_device)

    def close(self) -> None:
        """Wait for what is under way, and give what is free back to whoever uses the GPU next."""
        self.synchronize()
        with gpu_errors(self.name), torch.cuda.device(self.torch_device):
            torch.cuda.set_per_process_memory_fraction(1.0, self.torch_device)
            # Products keep workspaces for each stream they ever ran on, up to 32 MiB each.
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()


def _pci_address(index: int) -> str:
    """``0000:3b:00.0``; empty where this PyTorch does not tell."""
    found = torch.cuda.get_device_properties(index)
    parts = [getattr(found, f"pci_{name}_id", None) for name in ("domain", "bus", "device")]
    if None in parts:
        return ""
    domain, bus, device = map(int, parts)  # type: ignore[arg-type]
    return f"{domain:04x}:{bus:02x}:{device:02x}.0"


def _forget_error() -> None:
    """The runtime keeps its last error until somebody asks for it, and PyTorch asks after each kernel."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(f"libcudart.so.{str(torch.version.cuda).partition('.')[0]}").cudaGetLastError()
