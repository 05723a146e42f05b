"""What four bits do to answers: each way to store a model is measured, or says why it cannot be."""

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.accuracy import VARIANTS, of_numbering
from tests.engine import checkpoints, llama_checkpoints

ROWS = [{"text": text, "label": "positive"} for text in ("A fine film.", "It is far too long, and nothing happens.")]
MODELS: dict[str, Callable[[Path], object]] = {
    "opt": checkpoints.make_checkpoint,
    "llama": lambda folder: llama_checkpoints.make_checkpoint(folder, "llama, grouped queries"),
}


@pytest.mark.parametrize("model", MODELS)
def test_each_way_to_store_a_model_is_measured_or_refused(model: str, tmp_path: Path) -> None:
    MODELS[model](tmp_path / "original")
    figures, refused = of_numbering(tmp_path / "original", 1, ROWS, tmp_path, lambda text: None)
    assert figures.keys() | refused.keys() == VARIANTS.keys()
    assert {name for name in refused if VARIANTS[name].kv_format == "plain"} == set()
    plain = figures.pop("plain")
    assert plain["token_drift"] == plain["drift"] == 0
    for name, its in figures.items():
        assert min(its["token_drift"], its["drift"]) > 1e-4, name
        assert ("weight_error" in its) == (VARIANTS[name].matrices is not None)
