"""Byte sizes, for the engine and all that imports it, and the two integer roundings.

The only place where 1024 bytes become a unit, but for ``storage``, which imports nothing of ours.
"""

import re

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB

_FACTORS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d{1,30})(?:\.(\d{1,30}))?\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str) -> int:
    """``4GiB``, ``500MB`` or plain bytes as a number of bytes.

    Raises:
        ValueError: not a size, or a negative one; the text is a sentence for people.
    """
    match = _SIZE.fullmatch(text)
    factor = _FACTORS.get(match[3].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a size; write for example 4GiB, 500MB or a plain number of bytes")
    # In integers: a float would round plain bytes beyond 2**53.
    fraction = match[2] or "0"
    scale: int = 10 ** len(fraction)
    return int(match[1]) * factor + int(fraction) * factor // scale


def format_bytes(num_bytes: int) -> str:
    """``3435973837`` as ``3.2 GiB``."""
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(num_bytes) >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes} B"


def div_ceil(numerator: int, denominator: int) -> int:
    """The quotient rounded up."""
    return -(-numerator // denominator)


def align_up(value: int, alignment: int) -> int:
    """The least multiple of ``alignment`` that is not below ``value``."""
    return div_ceil(value, alignment) * alignment
