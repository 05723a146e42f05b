"""Whole numbers that a pass needs on a device with memory of its own."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.attention.packed import Folding, Places, Ragged, ragged_numbers, ragged_of
from engine.memory.device import Device


class Upload:
    """All of a pass, sent in two copies. What is asked for is promised, and can be had once it is sent."""

    def __init__(self) -> None:
        self._numbers: dict[torch.dtype, list[int]] = {torch.int32: [], torch.int64: []}
        self._sent: dict[torch.dtype, Tensor] = {}

    def indices(self, values: Sequence[int]) -> Callable[[], Tensor]:
        """In int64."""
        return self._add(torch.int64, values)

    def ragged(self, places: Places, folding: Folding, *, is_part: bool = False) -> Callable[[], Ragged]:
        """In int32, as kernels take them; see ``ragged_numbers``."""
        numbers = self._add(torch.int32, ragged_numbers(places, folding, is_part=is_part))
        return lambda: ragged_of(places, numbers(), folding)

    def send(self, device: Device) -> None:
        """To the device."""
        self._sent = {dtype: device.upload(torch.tensor(each, dtype=dtype)) for dtype, each in self._numbers.items()}

    def _add(self, dtype: torch.dtype, values: Sequence[int]) -> Callable[[], Tensor]:
        numbers = self._numbers[dtype]
        begin = len(numbers)
        numbers += values
        end = len(numbers)
        return lambda: self._sent[dtype][begin:end]
