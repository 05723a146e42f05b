"""oneDNN's compiled kernels: how many it keeps."""

import os
from collections.abc import MutableMapping

import torch

CAPACITY = "64"
"""Kernels: those that a few passes need."""
_NAME = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def limit_kept_kernels(environ: MutableMapping[str, str] = os.environ) -> None:
    """Call before the first product; where the user has chosen, or the processor has no AMX, nothing changes.

    Kernels for AMX take 0.7 MB each, and by default a thousand are kept. Others take so little that keeping them all
    is right.
    """
    if torch.cpu._is_amx_tile_supported():
        environ.setdefault(_NAME, CAPACITY)
