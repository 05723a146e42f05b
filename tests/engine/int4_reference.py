"""Four bits a value in plain NumPy, value by value as the format's description says: the engine's bits are these.

Shapes: R rows, I values of one, P of one that is padded to whole groups, G groups.
"""

import numpy as np
from numpy.typing import NDArray

from engine.dtypes import DType

Floats = NDArray[np.float32]


def packed(values_RI: Floats, group: int) -> bytes:
    """The stored bytes of some rows: codes, scales, minima."""
    width = values_RI.shape[1]
    padded = -(-width // group) * group
    values_RP = np.concatenate([values_RI, np.repeat(values_RI[:, -1:], padded - width, 1)], 1)
    codes, scales, minima = [], [], []
    for row in values_RP:
        its_codes = []
        for first in range(0, padded, group):
            some = row[first : first + group]
            minimum = np.float16(some.min())
            scale = np.float16((some.max() - some.min()) * np.float32(1 / 15))
            step = np.float32(scale) if scale else np.float32(1)
            start = np.float32(0.5) - np.float32(minimum) / step
            its_codes += [int(min(15, max(0, value / step + start))) for value in some]
            scales.append(scale)
            minima.append(minimum)
        half = padded // 2
        codes += [its_codes[place] << 4 | its_codes[place + half] for place in range(half)]
    return bytes(codes) + np.array(scales).tobytes() + np.array(minima).tobytes()


def unpacked(raw: bytes, shape: tuple[int, int], group: int, dtype: DType) -> Floats:
    """The padded rows that stored bytes stand for, computed in float32 and rounded once to a number type."""
    rows, width = shape
    padded = -(-width // group) * group
    codes = np.frombuffer(raw[: rows * padded // 2], np.uint8).reshape(rows, -1)
    scale, minimum = np.frombuffer(raw[rows * padded // 2 :], np.float16).reshape(2, rows, -1).astype(np.float32)
    both = np.concatenate([codes >> 4, codes & 15], 1).reshape(rows, -1, group).astype(np.float32)
    return rounded(both * scale[..., None] + minimum[..., None], dtype).reshape(rows, padded)


def rounded(values: Floats, dtype: DType) -> Floats:
    """To the nearest numbers of a type, ties to even."""
    if dtype is DType.FLOAT32:
        return values
    if dtype is DType.FLOAT16:
        return values.astype(np.float16).astype(np.float32)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
