"""Who waits for whom on a GPU: copies and compute for each other where they must, and the host for results alone."""

import shutil
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from engine import Generate, Request, SamplingParams
from engine.devices.cuda import CudaDevice
from engine.loading import load_engine
from engine.memory.lane import LaneName, Reached
from engine.units import MIB
from tests.engine.placements import BESIDE_A_DEVICE, PLACEMENTS, scattered
from tests.gpu.on_gpu import (
    KINDS,
    ON_A_GPU,
    Arithmetic,
    Model,
    child_command,
    opt_model,
    options,
    results,
    run_child,
    skip_without,
    tell,
    texts,
)

pytestmark = ON_A_GPU

EVERYWHERE = (*PLACEMENTS, *BESIDE_A_DEVICE)
CALLS = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync", "cudaEventRecord")
"""How the names of those calls begin that give the card something to do."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return opt_model(tmp_path_factory.mktemp("opt"), torch.float16)


def test_copies_keep_to_their_events() -> None:
    """A copy in waits for the compute it was told of, compute for the copy, and the host for the copy out."""
    device = CudaDevice(0)
    size = 64 * MIB
    source, back = device.allocate_host(size), device.allocate_host(size)
    assert source.is_pinned()
    memory, seen = device.allocate(size), device.allocate(size)
    with device.computing():
        for value in range(1, 6):
            source.fill_(value)
            copied = device.copy(LaneName.HOST_TO_DEVICE, [(memory, source)], device.compute_mark())
            device.compute_after(copied)
            seen.copy_(memory)
            device.copy(LaneName.DEVICE_TO_HOST, [(back, seen)], device.compute_mark()).wait()
            assert int(back.min()) == int(back.max()) == value
            span = copied.span()
            assert span is not None
            assert span[0] < span[1]
        assert device.download(seen[:1]).item() == 5
    device.close()


def test_weights_are_staged_while_compute_goes_on() -> None:
    """A copy that comes after nothing is over before the compute issued ahead of it."""
    device = CudaDevice(0)
    source, memory = device.allocate_host(MIB), device.allocate(MIB)
    with device.computing():
        x = torch.randn(8192, 8192, device=device.torch_device)
        for _ in range(20):
            x = x @ x
        busy = device.compute_mark()
        copied = device.copy(LaneName.HOST_TO_DEVICE, [(memory, source)], Reached())
        copied.wait()
        assert busy.span() is None
        busy.wait()
    device.close()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("name", EVERYWHERE)
def test_nothing_in_a_pass_waits_for_the_card_but_the_download_of_its_results(
    name: str, model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    download = CudaDevice.download

    def allowed(self: CudaDevice, values: Tensor) -> Tensor:
        torch.cuda.set_sync_debug_mode("default")
        try:
            return download(self, values)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    with load_engine(model.folder, options(name, **scattered(tmp_path))) as engine:
        found = results(engine, texts())  # also what is done once, at the first call
        monkeypatch.setattr(CudaDevice, "download", allowed)
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = results(engine, texts())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert set(again) == set(found)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_debug_mode_sees_a_wait() -> None:
    """Else the test before would hold whatever happens."""
    with closing(CudaDevice(0)) as device, device.computing():
        values = torch.ones(4, device=device.torch_device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            with pytest.raises(RuntimeError, match="synchronizing"):
                values.sum().item()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_pytorchs_sanitizer_finds_no_race(model: Model, tmp_path: Path) -> None:
    """It sees what the thread of compute issues, with all waits; copies of other threads it does not see."""
    said = run_child(child_command("placements", model.folder, tmp_path, *EVERYWHERE), TORCH_CUDA_SANITIZER="1")
    assert said.split() == list(EVERYWHERE)


@pytest.mark.parametrize("name", ["split", "attended-on-host"])
def test_memcheck_finds_no_access_beside_what_is_allocated(name: str, model: Model, tmp_path: Path) -> None:
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer, which comes with the CUDA toolkit, is not installed here")
    checked = [program, "--tool", "memcheck", "--error-exitcode", "9", "--report-api-errors", "no"]
    # Without PyTorch's cache every tensor has borders of its own.
    command = [*checked, *child_command("placements", model.folder, tmp_path, name)]
    assert name in run_child(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1").split()


def calls_of_a_decode_pass(model: Model, kind: Arithmetic, number: int, disk_dir: Path) -> Counter[str]:
    """What a pass of ``number`` sequences, each with one token, asks the CUDA runtime for."""
    sampling = SamplingParams(max_new_tokens=40, ignore_eos=True)
    # Prompts of one length: below a block of keys, no kernel splits them over several blocks.
    some = iter([Request(index, Generate("a" * 19, sampling)) for index in range(number)])
    chosen = options("all-device", disk_dir)
    with (
        load_engine(model.folder, chosen, device=kind.device()) as engine,
        closing(engine.passes(some)) as run,
    ):
        for report in run:
            if report.stats.decode_tokens == number and not report.stats.prefill_tokens:
                break
        for _ in range(2):  # the first also sees how the profiler sets itself up
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
                report = next(run)
                torch.cuda.synchronize()
    assert report.stats.decode_tokens == number
    assert not report.stats.prefill_tokens
    events = profiled.events()
    assert events is not None
    names = [event.name for event in events]
    return Counter(next(each for each in CALLS if name.startswith(each)) for name in names if name.startswith(CALLS))


@pytest.mark.filterwarnings("default")  # a profiler without CUPTI says so in a warning
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_layer_of_a_decode_pass_asks_for_as_much_whatever_the_number_of_sequences(
    kind: Arithmetic, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Counted as the difference between a model of six layers and one of two."""
    skip_without(kind)
    monkeypatch.setattr("engine.devices.cuda._ZERO_HOLDS_S", float("inf"))  # else a pass now and then has an event more
    deep, shallow = (opt_model(tmp_path / str(layers), kind.torch_dtype, num_hidden_layers=layers) for layers in (6, 2))
    found = {}
    for number in (8, 64):
        more = calls_of_a_decode_pass(deep, kind, number, tmp_path)
        more.subtract(calls_of_a_decode_pass(shallow, kind, number, tmp_path))
        found[number] = {name: count / 4 for name, count in sorted(more.items()) if count}
    if not found[8].get("cudaLaunchKernel") and not found[8].get("cuLaunchKernel"):
        pytest.skip("PyTorch's profiler sees no launches on this machine: CUPTI is not there, or may not be used")
    tell(capsys, f"{kind}, a layer of a decode pass: {', '.join(f'{count:g} {n}' for n, count in found[8].items())}")
    assert found[8] == found[64]
