"""A format for each tensor: sizes go by every tensor's own."""

from engine.dtypes import DType
from engine.formats.sizes import Plain
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
