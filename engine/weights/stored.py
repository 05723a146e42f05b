"""How large the units of a model are, as stored and as computed with. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from engine.dtypes import DType
from engine.units import align_up

TENSOR_ALIGNMENT = 256
"""Where a tensor may begin within its unit: what GPU kernels and host vector units like best."""


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """Bytes of each unit as stored, the dtype they are stored in, and what they cost to compute with."""

    dtype: DType
    unit_bytes: Mapping[str, int]
    unit_values: Mapping[str, tuple[int, ...]]
    """How many values each of a unit's tensors has."""
    unit_flops: Mapping[str, float]
    """Floating-point operations of one token (of one row of logits, in the head) in each unit but the embedding; empty
    where nothing but sizes is asked for."""

    @classmethod
    def of_one_tensor(cls, dtype: DType, unit_bytes: Mapping[str, int]) -> "StoredWeights":
        """Where nothing but sizes is asked for: units of one plain tensor each."""
        return cls(dtype, unit_bytes, {name: (size // dtype.num_bytes,) for name, size in unit_bytes.items()}, {})

    def is_ready(self, dtype: DType) -> bool:
        """Whether the stored bytes are what is computed with in ``dtype``: nothing must be unpacked."""
        return dtype is self.dtype

    def computed_bytes(self, unit: str, dtype: DType) -> int:
        """Bytes of a unit as it is computed with: as stored, or each tensor unpacked to the compute dtype."""
        if self.is_ready(dtype):
            return self.unit_bytes[unit]
        return sum(unpacked_bytes(values, dtype) for values in self.unit_values[unit])


def unpacked_bytes(num_values: int, dtype: DType) -> int:
    """Bytes that a tensor takes in a unit that was unpacked, where one begins behind the other."""
    return align_up(num_values * dtype.num_bytes, TENSOR_ALIGNMENT)
