"""How large the units of a model are, as stored and as computed with. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from engine.dtypes import DType


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """Bytes of each unit as stored, the dtype they are stored in, and what they cost to compute with."""

    dtype: DType
    unit_bytes: Mapping[str, int]
    unit_flops: Mapping[str, float]
    """Floating-point operations of one token (of one row of logits, in the head) in each unit but the embedding; empty
    where nothing but sizes is asked for."""

    def computed_bytes(self, unit: str, dtype: DType) -> int:
        """Bytes of a unit once it is cast to the compute dtype."""
        return self.unit_bytes[unit] * dtype.num_bytes // self.dtype.num_bytes
