"""A worker's drain, ready to be used."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from storage.database import Database
from worker.settings import Settings

if TYPE_CHECKING:  # most of the worker's tests do without torch
    from tests.worker.bench import Bench


@pytest.fixture
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bench(one_thread: None, database: Database, settings: Settings) -> Iterator["Bench"]:
    from engine import PlanOptions
    from engine.dtypes import DType
    from tests.worker.bench import Bench

    made = Bench(database, settings, PlanOptions(device="cpu", dtype=DType.FLOAT32, micro_batch=64, micro_batches=1))
    yield made
    made.residency.unload()
