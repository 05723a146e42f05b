"""How large the units of a model are, as stored and as computed with. No torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from engine.dtypes import DType
from engine.formats.sizes import Plain, TensorFormat
from engine.model.family import EMBED, HEAD
from engine.units import align_up

TENSOR_ALIGNMENT = 256
"""Where a tensor may begin within its unit: what GPU kernels and host vector units like best."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a unit."""

    format: TensorFormat
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredWeights:
    """Bytes of each unit as stored, in which formats, and what they cost to compute with."""

    dtype: DType
    """What the model is computed in unless something else is asked for."""
    unit_bytes: Mapping[str, int]
    unit_tensors: Mapping[str, tuple[StoredTensor, ...]]
    unit_flops: Mapping[str, float]
    """Floating-point operations of one token (of one row of logits, in the head) in each unit but the embedding; empty
    where nothing but sizes is asked for."""

    @classmethod
    def of_one_tensor(cls, dtype: DType, unit_bytes: Mapping[str, int]) -> "StoredWeights":
        """Where nothing but sizes is asked for: units of one plain tensor each."""
        tensors = {name: (StoredTensor(Plain(dtype), (size // dtype.num_bytes,)),) for name, size in unit_bytes.items()}
        return cls(dtype, unit_bytes, tensors, {})

    def is_ready(self, unit: str, dtype: DType) -> bool:
        """Whether a unit's stored bytes are what is computed with in ``dtype``: nothing must be unpacked."""
        return unit in self._ready_in[dtype]

    @cached_property
    def _ready_in(self) -> Mapping[DType, frozenset[str]]:
        """Planning asks for them, and for the bytes below, a million times."""
        units = self.unit_tensors.items()
        return {
            dtype: frozenset(unit for unit, tensors in units if all(each.format.is_ready(dtype) for each in tensors))
            for dtype in DType
        }

    @cached_property
    def weight_format(self) -> str:
        """The format of the layers' matrices."""
        return matrix_format(self._layer_tensors)

    def is_packed(self, unit: str, dtype: DType) -> bool:
        """Whether a unit is smaller as it is stored than as it is computed with."""
        return self.unit_bytes[unit] < self._computed_bytes[dtype][unit]

    def has_packed(self, dtype: DType) -> bool:
        """Whether a layer is."""
        return dtype in self._packed_in

    @cached_property
    def _packed_in(self) -> frozenset[DType]:
        return frozenset(dtype for dtype in DType if any(self.is_packed(unit, dtype) for unit in self._layers))

    def scratch_bytes(self, dtype: DType) -> int:
        """Bytes that unpacking a layer takes beside its result: one tensor is unpacked after the other."""
        return max((each.format.scratch_bytes(each.shape, dtype) for each in self._layer_tensors), default=0)

    @cached_property
    def _layer_tensors(self) -> frozenset[StoredTensor]:
        """The different ones."""
        return frozenset(each for unit in self._layers for each in self.unit_tensors[unit])

    @property
    def _layers(self) -> list[str]:
        return [unit for unit in self.unit_bytes if unit not in (EMBED, HEAD)]

    def computed_bytes(self, unit: str, dtype: DType) -> int:
        """Bytes of a unit as it is computed with: as stored, or each tensor unpacked to the compute dtype."""
        return self._computed_bytes[dtype][unit]

    @cached_property
    def _computed_bytes(self) -> Mapping[DType, Mapping[str, int]]:
        return {dtype: {unit: self._count_computed(unit, dtype) for unit in self.unit_tensors} for dtype in DType}

    def _count_computed(self, unit: str, dtype: DType) -> int:
        if self.is_ready(unit, dtype):
            return self.unit_bytes[unit]
        return sum(unpacked_bytes(tensor.format, tensor.shape, dtype) for tensor in self.unit_tensors[unit])


def matrix_format(tensors: Iterable[StoredTensor]) -> str:
    """The format of the matrices among some tensors, by its name."""
    return min((each.format.name for each in tensors if len(each.shape) == 2), default=Plain.name)


def unpacked_bytes(stored: TensorFormat, shape: tuple[int, ...], dtype: DType) -> int:
    """Bytes that a tensor of this shape takes in a unit that was unpacked, where one begins behind the other."""
    return align_up(prod(stored.unpacked_shape(shape)) * dtype.num_bytes, TENSOR_ALIGNMENT)
