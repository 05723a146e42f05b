"""How tensors are stored: the formats that a manifest can name, their bytes, and operations from shapes. No torch."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Protocol

from engine.dtypes import DType
from engine.formats.int4_sizes import Int4


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
