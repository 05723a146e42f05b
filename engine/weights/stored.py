"""How large the units of a model are, as stored and as computed with. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from engine.dtypes import DType


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """Bytes of each unit as stored, and the dtype they are stored in."""

    dtype: DType
    unit_bytes: Mapping[str, int]

    def computed_bytes(self, unit: str, dtype: DType) -> int:
        """Bytes of a unit once it is cast to the compute dtype."""
        return self.unit_bytes[unit] * dtype.num_bytes // self.dtype.num_bytes
