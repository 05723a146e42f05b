from pathlib import Path

import pytest

from engine import Engine, PlanOptions
from engine.errors import CheckpointError
from engine.loading import load_engine
from engine.planner.workload import Workload
from worker.residency import Loaded, Residency, Sample, Tell


class Loader:
    """Loads the real engine, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.loaded: list[Engine] = []

    def __call__(self, model_dir: Path, sample: Sample, tell: Tell) -> Loaded:
        self.loaded.append(load_engine(model_dir, PlanOptions(device="cpu")))
        return Loaded(self.loaded[-1])


def test_a_resident_model_is_not_loaded_again(tiny_model: Path) -> None:
    load = Loader()
    residency = Residency(load, lambda: 0.0)

    assert residency.ensure(tiny_model) is residency.ensure(tiny_model)
    assert len(load.loaded) == 1
    residency.unload()


def test_the_old_model_has_left_before_the_new_one_is_loaded(tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.symlink_to(tiny_model)
    seen: list[Path | None] = []
    load = Loader()

    def watching(model_dir: Path, sample: Sample, tell: Tell) -> Loaded:
        seen.append(residency.model_dir)
        return load(model_dir, sample, tell)

    residency = Residency(watching, lambda: 12.0)
    residency.ensure(tiny_model)
    residency.ensure(other)

    assert seen == [None, None]
    assert residency.model_dir == other
    assert residency.left_at == {str(tiny_model): 12.0}
    residency.unload()
    residency.unload()
    assert residency.model_dir is None


def test_a_resident_model_is_loaded_again_where_another_plan_pays(tiny_model: Path) -> None:
    """Only then, and nothing is asked where the plan was made by rules or nothing is known of the work."""
    saved = 0.0
    loaded: list[Engine] = []
    workload: Workload | None = Workload.uniform(10, 10, 10)

    def load(model_dir: Path, sample: Sample, tell: Tell) -> Loaded:
        loaded.append(load_engine(model_dir, PlanOptions(device="cpu")))
        return Loaded(loaded[-1], lambda wanted: saved if wanted is workload else 100.0)

    residency = Residency(load, lambda: 0.0)
    first = residency.ensure(tiny_model, lambda: workload)
    assert residency.ensure(tiny_model, lambda: workload) is first
    assert residency.ensure(tiny_model, lambda: None) is first
    saved = 1.0
    assert residency.ensure(tiny_model, lambda: workload) is not first
    assert len(loaded) == 2
    residency.unload()


def test_a_load_that_fails_leaves_nothing_resident(tiny_model: Path, tmp_path: Path) -> None:
    residency = Residency(Loader(), lambda: 0.0)
    residency.ensure(tiny_model)

    with pytest.raises(CheckpointError):
        residency.ensure(tmp_path)

    assert residency.model_dir is None
