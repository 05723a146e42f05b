"""How tensors are stored: the formats that a manifest can name, their bytes, and operations from shapes. No torch."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Protocol

from engine.dtypes import DType
from engine.units import align_up


class TensorFormat(Protocol):
    """How one tensor is stored. The module of this package that has the format's name reads it, with torch."""

    @property
    def name(self) -> str:
        """The name that a manifest gives it."""

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this shape, as it is stored."""

    def unpacked_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what a tensor of this shape is unpacked to: at its end an axis may be padded."""

    def scratch_bytes(self, shape: tuple[int, ...], dtype: DType) -> int:
        """Bytes that unpacking a tensor of this shape to ``dtype`` takes beside its result."""

    def is_ready(self, dtype: DType) -> bool:
        """Whether the stored bytes are what is computed with in ``dtype``: nothing must be unpacked."""

    def fields(self) -> dict[str, Any]:
        """What a manifest says of it: its name and its parameters; the other way is ``format_from``."""


@dataclass(frozen=True, slots=True)
class Plain:
    """The values one after another, row-major and without gaps."""

    dtype: DType
    name: ClassVar[str] = "plain"

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this shape, as it is stored."""
        return prod(shape) * self.dtype.num_bytes

    def unpacked_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The same shape."""
        return shape

    def scratch_bytes(self, shape: tuple[int, ...], dtype: DType) -> int:
        """None."""
        del shape, dtype
        return 0

    def is_ready(self, dtype: DType) -> bool:
        """Whether it is stored in the number type that is computed in."""
        return dtype is self.dtype

    def fields(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {"name": self.name, "dtype": self.dtype}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "Plain":
        """See ``format_from``."""
        name = fields["dtype"]
        if name not in tuple(DType):
            raise ValueError(f"its dtype {name!r} is not one of {', '.join(DType)}")
        return cls(DType(name))


GROUPS = (32, 64, 128)
"""How many values may share a scale and a minimum."""
BLOCK_VALUES = 1 << 20
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
        """Scales and minima in that type, and on the CPU the codes of a block, a byte each."""
        values = prod(self.unpacked_shape(shape))
        return 2 * dtype.num_bytes * (values // self.group) + min(values, max(BLOCK_VALUES, shape[-1] + self.group))

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


TENSOR_FORMATS = (Plain.name, Int4.name)
"""In which formats a person may ask for matrices, or keys and values, to be stored."""
_FORMATS: Mapping[str, Callable[[Mapping[str, Any]], TensorFormat]] = {
    Plain.name: Plain.from_fields,
    Int4.name: Int4.from_fields,
}


def format_from(fields: Mapping[str, Any]) -> TensorFormat:
    """The format that an object of a manifest describes.

    Raises:
        KeyError: a field is missing.
        ValueError: a value is none that this version knows; the text is a sentence fragment for people.
    """
    name = fields["name"]
    if name not in tuple(_FORMATS):
        raise ValueError(f"its format {name!r} is not one of {', '.join(_FORMATS)}; upgrade overnight")
    return _FORMATS[name](fields)


def token_flops(shapes: Iterable[tuple[int, ...]]) -> float:
    """Floating-point operations of one token in the products with these tensors: a multiplication and an addition for
    each value of a matrix, however it is stored. Vectors (biases, norms) count nothing."""
    return 2.0 * sum(prod(shape) for shape in shapes if len(shape) == 2)
