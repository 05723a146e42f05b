"""The number types that weights, keys and values are stored and computed in. No torch."""

from enum import StrEnum


class DType(StrEnum):
    """A number type, by the name that PyTorch and checkpoints give it."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"

    @property
    def num_bytes(self) -> int:
        """Bytes of one value."""
        return 4 if self is DType.FLOAT32 else 2
