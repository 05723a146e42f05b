"""Where the tensors of a unit lie in its file, and so how large it is: what the writer writes, checks check and plans
count on. No torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Self

from engine.dtypes import DType
from engine.model.family import UnitSpec
from engine.units import align_up
from engine.weights.manifest import PAGE_BYTES, TENSOR_ALIGNMENT, TensorEntry
from engine.weights.stored import StoredWeights


@dataclass(frozen=True, slots=True)
class UnitLayout:
    """Where the tensors of a unit will lie in its file."""

    tensors: Mapping[str, TensorEntry]
    num_bytes: int
    """The file's size, a multiple of ``PAGE_BYTES``."""

    @classmethod
    def of(cls, unit: UnitSpec, dtype: DType) -> Self:
        """The layout of ``unit`` stored in ``dtype``: its tensors in order, each aligned."""
        tensors, end = {}, 0
        for tensor in unit.tensors:
            offset = align_up(end, TENSOR_ALIGNMENT)
            tensors[tensor.name] = TensorEntry(offset, tensor.shape)
            end = offset + prod(tensor.shape) * dtype.num_bytes
        return cls(tensors, max(PAGE_BYTES, align_up(end, PAGE_BYTES)))


def stored_as(units: Iterable[UnitSpec], dtype: DType) -> StoredWeights:
    """How large these units are in a model directory."""
    return StoredWeights(dtype, {unit.name: UnitLayout.of(unit, dtype).num_bytes for unit in units})
