"""A GPU's memory stays what it was: through passes, loading, closing, and closing in the middle of a run."""

import gc
import random
from collections.abc import Iterator
from contextlib import closing
from itertools import count, islice
from pathlib import Path

import pytest
import torch

from engine import Generate, Request, SamplingParams, Score
from engine.devices import cuda
from engine.devices.pinned import Register, Unregister, pinned_empty
from engine.dtypes import DType
from engine.loading import load_engine
from engine.tiers import TierName
from engine.units import MIB, format_bytes
from tests.engine.placements import scattered
from tests.gpu.on_gpu import (
    CONTINUATION,
    GPU,
    ON_A_GPU,
    Model,
    check,
    engine_threads,
    free_memory,
    opt_model,
    options,
    requests,
    results,
    tell,
    texts,
)

pytestmark = ON_A_GPU

PASSES, LOADS = 200, 40
LEFT_OVER = 64 * MIB
"""Bytes that may be missing after many loads: what CUDA itself takes for what is first used late."""
SPREAD = ("all-device", "all-host", "all-disk", "split", "attended-on-host", "split-and-attended-on-host")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return opt_model(tmp_path_factory.mktemp("opt"), torch.float16)


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Bytes that are pinned at this moment, by address."""
    held: dict[int, int] = {}

    def noted(num_bytes: int, name: str, cpus: set[int] | None, register: Register, unregister: Unregister) -> object:
        def pin(address: int, size: int) -> int:
            error = register(address, size)
            if not error:
                held[address] = size
            return error

        def unpin(address: int) -> object:
            del held[address]
            return unregister(address)

        return pinned_empty(num_bytes, name, cpus, pin, unpin)

    monkeypatch.setattr(cuda, "pinned_empty", noted)
    return held


def endless(seed: int) -> Iterator[Request]:
    """Requests of every kind and of lengths that nobody foresaw."""
    rng = random.Random(seed)
    for index in count():
        text = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 1000)))
        drawn = SamplingParams(max_new_tokens=rng.randint(1, 60), temperature=rng.choice((0.0, 0.9)), seed=index)
        yield Request(index, rng.choice((Generate(text, drawn), Score(text, CONTINUATION))))


@pytest.mark.parametrize("name", ["all-device", "split", "all-disk"])
def test_passes_stay_within_the_budget_and_the_allocators_rounding(
    name: str, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    free_memory()
    torch.cuda.reset_peak_memory_stats(GPU)
    before = torch.cuda.memory_reserved(GPU)
    with load_engine(model.folder, options(name, tmp_path, micro_batch=512, micro_batches=2)) as engine:
        budget = engine.plan.budgets[TierName.DEVICE]
        with closing(engine.passes(endless(seed=0))) as run:
            assert len(list(islice(run, PASSES))) == PASSES
        engine.check_integrity()
    most = torch.cuda.max_memory_reserved(GPU) - before
    tell(capsys, f"{name}: {format_bytes(most)} reserved at most, of a budget of {format_bytes(budget)}")
    assert most <= budget + cuda._ROUNDED_UP


def test_loading_and_closing_again_and_again_leaves_nothing(
    model: Model, pinned: dict[int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def once(index: int) -> int:
        name = SPREAD[index % len(SPREAD)]
        with load_engine(model.folder, options(name, **scattered(tmp_path))) as engine:
            results(engine, texts((9, 40)))
            return sum(pinned.values())

    # The first of each kind load kernels and libraries, which stay.
    most_pinned = max(once(index) for index in range(len(SPREAD)))
    assert most_pinned > 0
    before = free_memory()
    for index in range(LOADS):
        once(index)
    lost = before - free_memory()
    tell(capsys, f"{LOADS} loads: {format_bytes(lost)} less free than before")
    assert lost <= LEFT_OVER
    assert pinned == {}
    assert engine_threads() == []


def test_closing_gives_the_memory_back(model: Model, tmp_path: Path) -> None:
    load_engine(model.folder, options("all-host", tmp_path)).close()
    gc.collect()
    before = torch.cuda.memory_reserved(GPU)
    with load_engine(model.folder, options("all-device", tmp_path)) as engine:
        results(engine, texts())
        assert torch.cuda.memory_allocated(GPU) <= engine.plan.budgets[TierName.DEVICE]
    assert torch.cuda.memory_reserved(GPU) <= before


@pytest.mark.parametrize("name", SPREAD)
def test_closing_in_the_middle_of_a_run_gives_everything_back(
    name: str, model: Model, pinned: dict[int, int], tmp_path: Path
) -> None:
    """And the card can be used as before: nothing that was under way wrote where it no longer should."""
    chosen = options(name, **scattered(tmp_path))
    load_engine(model.folder, chosen).close()
    gc.collect()
    before = torch.cuda.memory_reserved(GPU)
    engine = load_engine(model.folder, chosen)
    run = engine.passes(iter(requests(texts())))
    assert len(list(islice(run, 3))) == 3
    engine.close()
    run.close()
    assert all(tier.used == 0 for tier in engine.tiers.values())
    assert engine_threads() == []
    del engine, run
    gc.collect()
    assert pinned == {}
    assert torch.cuda.memory_reserved(GPU) <= before
    with load_engine(model.folder, chosen) as another:
        check(results(another, texts()), model, texts(), DType.FLOAT16)
