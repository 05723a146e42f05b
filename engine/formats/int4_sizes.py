"""Bytes of tensors in four bits: see ``engine.formats.int4``. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

from engine.dtypes import DType
from engine.units import align_up

GROUPS = (32, 64, 128)
"""How many values may share a scale and a minimum."""
BLOCK_VALUES = 1 << 19
"""Values that are unpacked together on the CPU: few enough that the next step finds cached what one step wrote."""
_FLOAT16_BYTES = 2


@dataclass(frozen=True, slots=True)
class Int4:
    """Four bits a value. Some neighbours along the last axis are a group, and share a scale and a minimum in float16.

    The last axis is padded to whole groups. First come the codes, two a byte, then all scales, then all minima; each
    row-major. See ``engine.formats.int4``.
    """

    group: int = 64
    name: ClassVar[str] = "int4"

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this shape, as it is stored: 4.5 bits a value where groups of 64 need no padding."""
        values = prod(self.unpacked_shape(shape))
        return values // 2 + 2 * _FLOAT16_BYTES * (values // self.group)

    def unpacked_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The same, the last axis padded to whole groups."""
        return (*shape[:-1], align_up(shape[-1], self.group))

    def scratch_bytes(self, shape: tuple[int, ...], dtype: DType) -> int:
        """Scales and minima in float32, and on the CPU the codes of a block: as bytes, and as numbers in float32."""
        values = prod(self.unpacked_shape(shape))
        block = min(values, max(BLOCK_VALUES, shape[-1] + self.group))
        in_float32 = 2 * (values // self.group) + (0 if dtype is DType.FLOAT32 else block)
        return block + DType.FLOAT32.num_bytes * in_float32

    def is_ready(self, dtype: DType) -> bool:
        """Never: products are made with what it is unpacked to."""
        del dtype
        return False

    def fields(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {"name": self.name, "group": self.group}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "Int4":
        """See ``format_from``."""
        group = fields["group"]
        if type(group) is not int or group not in GROUPS:
            raise ValueError(f"its group of {group!r:.40} values is not one of {', '.join(map(str, GROUPS))}")
        return cls(group)
