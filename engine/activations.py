"""Where a pass's hidden states wait between layers: device, host or disk memory, one place for all micro-batches."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from engine.memory.closing import run_all
from engine.memory.memory import Memory
from engine.memory.ring import HostPlace, Item, Place, Ring
from engine.memory.tensors import torch_dtype
from engine.planner.plan import Plan
from engine.tiers import TierName

ACTIVATIONS = "activations"


class Activations:
    """Room for one pass's hidden states ``[tokens, D]``, by micro-batch.

    Where compute cannot address it, micro-batches pass through a ring: one is fetched and another written back while a
    third is computed.
    """

    def __init__(
        self,
        memory: Memory,
        plan: Plan,
        hidden_size: int,
    ) -> None:
        self._hidden_size = hidden_size
        self._dtype = torch_dtype(plan.dtype)
        batch_bytes = plan.micro_batch * hidden_size * self._dtype.itemsize
        num_bytes = batch_bytes * plan.micro_batches
        self._sizes: list[int] = []
        self._ring: Ring | None = None
        begins = range(0, num_bytes, batch_bytes)
        if plan.activations is TierName.DISK:
            room = memory.disk.allocate(num_bytes, ACTIVATIONS)
            self._release = room.release
            self._places: list[Place] = [room.place(begin) for begin in begins]
        else:
            block = memory.allocate(plan.activations, num_bytes, ACTIVATIONS)
            self._release = block.release
            self._places = [HostPlace(block.data[begin : begin + batch_bytes]) for begin in begins]
        if plan.activation_slots:
            try:
                self._ring = Ring(
                    memory,
                    what=ACTIVATIONS,
                    slot_bytes=batch_bytes,
                    num_slots=plan.activation_slots,
                    from_files=plan.activations is TierName.DISK,
                )
            except BaseException:
                self._release()
                raise

    def begin(self, num_rows: Sequence[int], num_layers: int, wanted: Sequence[bool]) -> None:
        """A pass begins.

        Each micro-batch will be entered once to be embedded, once a layer, and at the end, if it is wanted: all of them
        in turn each time.

        Args:
            num_rows: rows of each micro-batch.
            num_layers: how many layers there are.
            wanted: whether a micro-batch's hidden states are looked at after the last layer.
        """
        self._sizes = [rows * self._hidden_size * self._dtype.itemsize for rows in num_rows]
        if self._ring is not None:
            self._ring.begin(self._items(num_layers, wanted))

    def _items(self, num_layers: int, wanted: Sequence[bool]) -> Iterator[Item]:
        batches = list(zip(self._places, self._sizes, strict=False))
        for layer in range(-1, num_layers):
            for place, size in batches:
                yield Item(ACTIVATIONS, place, size if layer >= 0 else 0, slice(0, size))
        for (place, size), is_wanted in zip(batches, wanted, strict=True):
            if is_wanted:
                yield Item(ACTIVATIONS, place, size)

    @contextmanager
    def enter(self, index: int) -> Iterator[Tensor]:
        """Hidden states of micro-batch ``index`` on the device, ``[rows, D]``; what compute writes there is kept."""
        place = self._places[index]
        if self._ring is not None:
            with self._ring.enter(place) as (_, raw):
                yield self._shaped(raw, index)
        else:
            assert isinstance(place, HostPlace)
            yield self._shaped(place.data, index)

    def settle(self) -> None:
        """After a pass: wait until what it moved has arrived."""
        if self._ring is not None:
            self._ring.settle()

    def close(self) -> None:
        """Free the room."""
        run_all([*([self._ring.close] if self._ring is not None else []), self._places.clear, self._release])

    def _shaped(self, raw: Tensor, index: int) -> Tensor:
        return raw[: self._sizes[index]].view(self._dtype).view(-1, self._hidden_size)
