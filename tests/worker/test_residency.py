from pathlib import Path

import pytest

from engine import Engine, PlanOptions
from engine.errors import CheckpointError
from worker.residency import Residency, Sample, Tell


class Loader:
    """Loads the real engine, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.loaded: list[Engine] = []

    def __call__(self, model_dir: Path, sample: Sample, tell: Tell) -> Engine:
        self.loaded.append(Engine.load(model_dir, PlanOptions(device="cpu")))
        return self.loaded[-1]


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

    def watching(model_dir: Path, sample: Sample, tell: Tell) -> Engine:
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


def test_a_load_that_fails_leaves_nothing_resident(tiny_model: Path, tmp_path: Path) -> None:
    residency = Residency(Loader(), lambda: 0.0)
    residency.ensure(tiny_model)

    with pytest.raises(CheckpointError):
        residency.ensure(tmp_path)

    assert residency.model_dir is None
