"""Tests on a GPU: one at a time, and with the allocator as a worker has it."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu.on_gpu import KINDS, Arithmetic, gpu_is_usable, skip_without

if gpu_is_usable() and not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & set(os.environ):
    # As ``engine.process.tune`` does; it is read at the first allocation. Newer PyTorch has it by the second name.
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


@pytest.fixture(scope="module", params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> Arithmetic:
    """What is computed in, if this card can."""
    assert isinstance(request.param, Arithmetic)
    skip_without(request.param)
    return request.param


@pytest.fixture(autouse=True)
def one_at_a_time() -> Iterator[None]:
    """Beside another test, in a process of its own, a card's free memory would change, or there would be none."""
    path = Path(tempfile.gettempdir()) / f"overnight-gpu-tests-{os.getuid()}.lock"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
