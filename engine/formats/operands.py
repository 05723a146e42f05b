"""From stored bytes to what is computed with, whatever the format: each format's module does it for its own."""

from importlib import import_module
from types import ModuleType

from torch import Tensor

from engine.formats.sizes import TensorFormat


def operand(stored: TensorFormat, raw: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What products take that need no unpacking, over the stored bytes, which stay where they are.

    Args:
        stored: the format.
        raw: the tensor's bytes, ``uint8 [stored.num_bytes(shape)]``, on any device.
        shape: the tensor's.
    """
    found: Tensor = _module(stored).operand(stored, raw, shape)
    return found


def unpack(stored: TensorFormat, raw: Tensor, out: Tensor) -> None:
    """The values of the stored bytes, into ``out``, which has the tensor's shape and the compute dtype."""
    _module(stored).unpack(stored, raw, out)


def _module(stored: TensorFormat) -> ModuleType:
    return import_module(f"{__package__}.{stored.name}")
