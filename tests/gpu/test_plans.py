"""Plans that nobody helped with flags, and the figures they are made from, on a GPU."""

from contextlib import closing
from pathlib import Path
from time import perf_counter

import pytest
import torch

from engine import PlanOptions
from engine.devices.cuda import CudaDevice
from engine.lengths import workload_of
from engine.loading import load_engine
from engine.measure import QUICK, measure
from engine.planner.hardware import LINKS
from engine.planner.rates import Rate
from engine.tiers import TierName
from engine.units import MIB, format_bytes
from tests.gpu.on_gpu import EDGES, KINDS, ON_A_GPU, check, opt_model, requests, results, tell, texts

pytestmark = ON_A_GPU

LARGE = {
    "num_hidden_layers": 24, "hidden_size": 512, "word_embed_proj_dim": 512, "num_attention_heads": 8, "ffn_dim": 2048,
}  # fmt: skip
"""150 MiB of layers in float16."""


def test_a_card_is_measured_in_every_number_type_that_it_has(tmp_path: Path) -> None:
    folder = tmp_path / "spill"
    with closing(CudaDevice(0)) as device:
        hardware = measure(device, folder, effort=QUICK)
    assert hardware.device == "cuda"
    assert not hardware.shares_host_memory
    assert set(hardware.matmul) == {kind.dtype for kind in KINDS if kind.capability is None and kind.kernel is not None}
    figures = hardware.figures()
    assert {f"lanes.{lane}" for lane in LINKS} <= set(figures)
    for place, figure in figures.items():
        if isinstance(figure, Rate):
            assert all(rate > 0 for _, rate in figure.points), place
            assert 0 < figure.busy_share <= 1, place
        else:  # what is left of a difference may be nothing
            assert figure.value > 0 or (place.endswith("overhead") and figure.value == 0), place
    assert list(folder.iterdir()) == []


def test_a_model_larger_than_the_device_is_streamed_with_no_other_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Planned as a worker plans: for the requests that wait, with the rest of the machine as it is."""
    made = opt_model(tmp_path, torch.float16, **LARGE)
    some = texts([length - 1 for length in EDGES])
    asked = PlanOptions(device_memory=128 * MIB)
    begin = perf_counter()
    with load_engine(made.folder, asked, workload=workload_of(made.folder, requests(some))) as engine:
        seconds = perf_counter() - begin
        plan = engine.plan
        assert plan.device == "cuda:0"
        assert 0 < plan.num_layers_in(TierName.DEVICE) < len(plan.layers)
        assert plan.num_layers_in(TierName.DISK) == 0
        found = results(engine, some)
        for tier in engine.tiers.values():
            assert tier.peak <= tier.budget
        on_host = format_bytes(engine.tiers[TierName.HOST].peak)
    tell(capsys, f"loading a streamed model took {seconds:.1f} s, with {on_host} of host memory pinned")
    check(found, made, some, plan.dtype)


def test_a_model_that_fits_leaves_nothing_on_the_host(tmp_path: Path) -> None:
    made = opt_model(tmp_path, torch.float16)
    with load_engine(made.folder) as engine:
        plan = engine.plan
        assert plan.device == "cuda:0"
        assert plan.num_layers_in(TierName.DEVICE) == len(plan.layers)
        assert plan.used_bytes[TierName.HOST] == plan.used_bytes[TierName.DISK] == 0
        found = results(engine, texts())
        assert engine.tiers[TierName.HOST].peak == engine.tiers[TierName.DISK].peak == 0
    check(found, made, texts(), plan.dtype)
