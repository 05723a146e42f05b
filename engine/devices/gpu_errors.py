"""What PyTorch raises of a GPU, as errors for people: too little memory, or a device that cannot be gone on with.

Only some of it has a class of its own; what cuBLAS, cuDNN and kernels without an image say is a plain RuntimeError.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine.errors import DeviceFailed, TierFull

_NO_MEMORY = ("out of memory", "_STATUS_ALLOC_FAILED")
_FAILED = ("CUDA error", "CUDA driver error", "CUBLAS_STATUS", "CUDNN_STATUS", "CUSPARSE_STATUS", "CUSOLVER_STATUS")
_NO_KERNEL = ("no kernel image", "no kernel found")


@contextmanager
def gpu_errors(name: str) -> Iterator[None]:
    """While it lasts, errors of the GPU ``name`` become the engine's; others stay as they are.

    Raises:
        TierFull: the GPU's memory is used up.
        DeviceFailed: the GPU is lost, or nobody knows what it did.
    """
    try:
        yield
    except RuntimeError as error:  # every error of PyTorch's is one
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or _any(_NO_MEMORY, text):
            raise TierFull(f"{name} has too little memory left for this; lower --device-memory") from error
        # Since PyTorch 2.8; before, all the others were plain, too.
        lost = getattr(torch, "AcceleratorError", torch.OutOfMemoryError)
        if isinstance(error, lost) or _any(_FAILED, text) or _any(_NO_KERNEL, text):
            raise DeviceFailed(f"{name}: {text.splitlines()[0]}; look at nvidia-smi and at dmesg") from error
        raise


def _any(words: tuple[str, ...], text: str) -> bool:
    return any(word in text for word in words)
