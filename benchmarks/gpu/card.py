"""This machine's first GPU, in words; and why there is none that can be used. Nothing is allocated on it."""

import subprocess
import warnings
from dataclasses import dataclass

import torch

from engine.devices.open import open_device
from engine.errors import DeviceUnavailable

_DRIVER = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


@dataclass(frozen=True, slots=True)
class Card:
    """What a result of a GPU needs beside it."""

    name: str
    driver: str
    torch: str
    """The version of PyTorch, with that of the CUDA it is made for."""


def why_not() -> str | None:
    """Why nothing can be run on a GPU here, as a sentence; ``None``: it can."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a driver that is too old is told of below
        if torch.cuda.is_available():
            return None
    try:
        open_device(None).close()
    except DeviceUnavailable as error:
        return str(error)
    return (
        "this machine shows no NVIDIA GPU that PyTorch could use, so nothing was run; please run it where nvidia-smi "
        "lists one"
    )


def this_card() -> Card:
    """The first GPU; only where there is one."""
    return Card(torch.cuda.get_device_name(0), _driver(), f"{torch.__version__}, CUDA {torch.version.cuda}")


def _driver() -> str:
    try:
        said = subprocess.run(_DRIVER, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return next(iter(said.splitlines()), "").strip() or "unknown"
