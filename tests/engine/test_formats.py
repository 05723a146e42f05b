"""A format for each tensor: sizes go by every tensor's own."""

import pytest

from engine.dtypes import DType
from engine.formats.int4_sizes import Int4
from engine.formats.sizes import Plain
from engine.planner.known_models import KNOWN_MODELS
from engine.weights.layout import Storing, in_format, stored_as
from engine.weights.stored import StoredTensor, StoredWeights, unpacked_bytes


def test_a_unit_is_unpacked_where_one_of_its_tensors_is_not_ready() -> None:
    """Norms may be stored wider than products, or one layer in another way than the rest."""
    wide, narrow = Plain(DType.FLOAT32), Plain(DType.BFLOAT16)
    stored = StoredWeights(
        dtype=DType.BFLOAT16,
        unit_bytes={"layer.0": 4096, "layer.1": 8192},
        unit_tensors={
            "layer.0": (StoredTensor(narrow, (100, 10)), StoredTensor(narrow, (10,))),
            "layer.1": (StoredTensor(narrow, (100, 10)), StoredTensor(wide, (10,))),
        },
        unit_flops={},
    )
    assert stored.is_ready("layer.0", DType.BFLOAT16)
    assert stored.computed_bytes("layer.0", DType.BFLOAT16) == 4096
    assert not stored.is_ready("layer.1", DType.BFLOAT16)
    unpacked = unpacked_bytes(narrow, (100, 10), DType.BFLOAT16) + unpacked_bytes(wide, (10,), DType.BFLOAT16)
    assert stored.computed_bytes("layer.1", DType.BFLOAT16) == unpacked
    assert not any(stored.is_ready(unit, DType.FLOAT32) for unit in stored.unit_bytes)


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_a_model_in_another_format_is_what_an_import_would_store(name: str) -> None:
    sizes = KNOWN_MODELS[name].sizes
    plain, four = (stored_as(sizes, Storing(DType.FLOAT16, matrices)) for matrices in (None, Int4()))
    assert in_format(plain, Int4()) == four
    assert in_format(four, None) == plain
    assert (plain.weight_format, four.weight_format) == ("plain", "int4")
    layers = [unit for unit in plain.unit_bytes if unit.startswith("layer.")]
    values = sum(plain.unit_bytes[unit] for unit in layers) / 2
    bits = 8 * sum(four.unit_bytes[unit] for unit in layers) / values
    assert 4.5 <= bits < 4.5 * 1.02
