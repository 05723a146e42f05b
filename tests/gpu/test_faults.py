"""What goes wrong on a GPU, and what the engine makes of it: too little memory, a lost device, the wrong card."""

import logging
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.devices.cuda import CudaDevice
from engine.devices.pinned import _REFUSED
from engine.dtypes import DType
from engine.errors import TierFull
from engine.loading import load_engine
from engine.units import GIB, MIB
from tests.engine.placements import scattered
from tests.gpu.on_gpu import (
    GPU,
    ON_A_GPU,
    ROOT,
    Model,
    check,
    child_command,
    opt_model,
    options,
    results,
    run_child,
    texts,
)

pytestmark = ON_A_GPU

CONTEXT = 64 * MIB
"""Bytes of a card that even the smallest context takes."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return opt_model(tmp_path_factory.mktemp("opt"), torch.float16)


class RefusingRuntime:
    """CUDA's runtime, on a system that lets nobody pin memory: each try fails in CUDA, too, which remembers that."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self.asked = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.asked += 1
        assert int(self._runtime.cudaHostRegister(0, size, flags)) != 0
        return min(_REFUSED)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)


def test_memory_that_cannot_be_pinned_only_makes_copies_slower(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """And what was refused disturbs neither this model's kernels nor those of the next, which fits."""
    refusing = RefusingRuntime(torch.cuda.cudart())
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(torch.cuda, "cudart", lambda: refusing)
        with load_engine(model.folder, options("all-host", **scattered(tmp_path))) as engine:
            found = results(engine, texts())
    assert refusing.asked > 0
    assert "cannot be pinned" in caplog.text
    check(found, model, texts(), DType.FLOAT16)
    with load_engine(model.folder, options("all-device", tmp_path)) as engine:
        check(results(engine, texts()), model, texts(), DType.FLOAT16)


def beyond_the_limit(device: CudaDevice) -> None:
    device.limit_memory(64 * MIB)
    with device.computing():
        torch.empty(GIB, dtype=torch.uint8, device=device.torch_device)


def beyond_the_card(device: CudaDevice) -> None:
    total = torch.cuda.get_device_properties(GPU).total_memory
    device.limit_memory(total)
    device.allocate(2 * total)


@pytest.mark.parametrize("ask", [beyond_the_limit, beyond_the_card])
def test_too_little_memory_is_said_in_a_sentence_and_the_card_goes_on(ask: Callable[[CudaDevice], None]) -> None:
    with closing(CudaDevice(0)) as device:
        with pytest.raises(TierFull, match=r"cuda:0 has too little memory.*--device-memory"):
            ask(device)
        with device.computing():
            assert device.download(torch.ones(3, device=device.torch_device)).tolist() == [1, 1, 1]


def test_an_assertion_on_the_card_is_a_lost_device(model: Model, tmp_path: Path) -> None:
    """In a process of its own: nothing in it can use the card afterwards."""
    said = run_child(child_command("lost", model.folder, tmp_path)).splitlines()
    assert [line.partition(":")[0] for line in said] == ["run", "close"]
    assert all("cuda:0: CUDA error" in line and "look at nvidia-smi" in line for line in said)


def test_another_card_leaves_the_first_alone(model: Model, tmp_path: Path) -> None:
    """While it computes and once it is closed: a context of the first card would take some hundred megabytes of it."""
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has one GPU")
    torch.ones(1, device=GPU)  # this process has a context there, from which it is watched
    before = torch.cuda.mem_get_info(GPU)[0]
    with subprocess.Popen(
        child_command("other-card", model.folder, tmp_path), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    ) as child:  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None
        for moment in ("running", "closed"):
            assert child.stdout.readline().strip() == moment
            taken = before - torch.cuda.mem_get_info(GPU)[0]
            assert taken < CONTEXT, f"{moment}: {taken} bytes of cuda:0 are taken"
            child.stdin.write("\n")
            child.stdin.flush()
    assert child.returncode == 0
