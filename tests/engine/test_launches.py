"""How many kernels a layer launches for a micro-batch: few, and as many for 64 sequences as for 8.

Counted with fake tensors: what is no view and no memory launches a kernel, a custom operator those inside it.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from engine.dtypes import DType
from engine.formats.sizes import Int4
from engine.kvcache.cache import KVCache
from engine.kvcache.segments import MicroBatch, Segment, arrange
from engine.model.registry import family_for
from engine.request import SamplingParams
from engine.schedule.passes import Pass
from engine.sequence import Sequence
from engine.units import MIB
from engine.weights.layout import Storing
from tests.engine.hub_configs import HUB
from tests.engine.test_cuda_fake import GPU, PlainIndexing, make_executor

INSIDE = {"_varlen_attn_out": 1}
"""Kernels in custom operators, which are known by their source alone; who adds one says how many it launches."""
NOT_LAUNCHED = ("device", "empty", "empty_like", "empty_strided", "new_empty")


def tensors_in(values: object) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(values) if isinstance(x, Tensor)]


def memory_of(x: Tensor) -> StorageWeakRef:
    return StorageWeakRef(x.untyped_storage())


class Launches(TorchDispatchMode):
    """Counts kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        before, after = tensors_in((args, kwargs)), tensors_in(result)
        may_be_view = any(each.alias_info and not each.alias_info.is_write for each in func._schema.returns)
        # A cast, or a reshape of what has gaps, says that it may be one, and is none.
        is_view = may_be_view and {*map(memory_of, after)} <= {*map(memory_of, before)}
        if not is_view and name not in NOT_LAUNCHED and any(x.device == GPU for x in (*before, *after)):
            assert func.namespace == "aten" or name in INSIDE, f"how many kernels does {func} launch?"
            self.found[name] += INSIDE.get(name, 1)
        return result


SIZES = {"hidden_size": 64, "num_attention_heads": 8, "vocab_size": 500, "max_position_embeddings": 256}
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "OPT": ({"model_type": "opt", **SIZES, "word_embed_proj_dim": 64, "ffn_dim": 256}, 14),
    "Llama": ({**HUB["meta-llama/Llama-2-7b-hf"], **SIZES, "num_key_value_heads": 8, "intermediate_size": 96}, 20),
    "Llama with groups": (
        {**HUB["meta-llama/Llama-2-7b-hf"], **SIZES, "num_key_value_heads": 2, "intermediate_size": 96}, 21
    ),
    "Qwen2": ({**HUB["Qwen/Qwen2.5-0.5B"], **SIZES, "num_key_value_heads": 2, "intermediate_size": 96}, 21),
}  # fmt: skip
"""The most that a layer may launch for a micro-batch."""
UNPACKING = 6
"""The most that a matrix in four bits launches beside, in each pass."""
PACKED_CACHE = {"OPT": 46, "Llama": 65, "Llama with groups": 78}
"""The most that a layer may launch for a micro-batch with its cache in four bits, where keys are packed by windows or
not."""
PACKED_PART = {"OPT": 8, "Llama": 19, "Llama with groups": 21}
"""The most for each further part of what it attends to that is unpacked by itself."""
MORE_WINDOWS = 47
"""The most that it may launch beside if a prompt is in several windows."""


def micro_batch(cache: KVCache, number: int) -> MicroBatch:
    """Decode tokens, whole prompts and scored rows side by side: every kind that a micro-batch can have."""
    sequences = [Sequence([5] * 20, 19, 24, SamplingParams()) for _ in range(number)]
    assert all(cache.admit(sequence) for sequence in sequences)
    segments = [Segment(one, 19, 1, cache.held[one]) for one in sequences[: number // 2]]
    segments += [Segment(one, 0, 8, cache.held[one]) for one in sequences[number // 2 : -2]]
    segments += [Segment(Sequence([5] * 9, 9, 9, score_from=2), 0, 8) for _ in range(2)]
    return arrange(segments)


def launches(
    config: dict[str, Any],
    storing: Storing,
    capability: tuple[int, int],
    number: int,
    folder: Path,
    *,
    batches: int = 1,
    make: Callable[[KVCache, int], MicroBatch] = micro_batch,
    **asked: Any,
) -> Counter[str]:
    """What one layer launches for so many micro-batches alike: a pass through two layers, less a pass through one."""
    found = []
    for depth in (1, 2):
        family = family_for({**config, "num_hidden_layers": depth})
        with ExitStack() as stack:
            counted = Launches()
            for mode in (torch.inference_mode(), FakeTensorMode(), PlainIndexing(), counted):
                stack.enter_context(mode)
            executor, cache = make_executor(family, storing, folder, capability, micro_batch=512, **asked)
            this_pass = Pass(tuple(make(cache, number) for _ in range(batches)))
            counted.found.clear()
            executor.run(this_pass)
            found.append(counted.found)
    return found[1] - found[0]


CARDS = pytest.mark.parametrize(
    ("dtype", "capability"), [(DType.FLOAT16, (7, 5)), (DType.FLOAT16, (8, 0)), (DType.BFLOAT16, (9, 0))], ids=str
)


@CARDS
@pytest.mark.parametrize("name", MODELS)
def test_a_layer_launches_as_much_for_many_as_for_few(
    name: str, dtype: DType, capability: tuple[int, int], tmp_path: Path
) -> None:
    config, most = MODELS[name]
    few, many = (launches(config, Storing(dtype), capability, number, tmp_path) for number in (8, 64))
    assert few == many
    assert few.total() <= most, dict(few)


@CARDS
@pytest.mark.parametrize("name", ["OPT", "Llama"])
def test_weights_in_four_bits_are_unpacked_once_a_pass(
    name: str, dtype: DType, capability: tuple[int, int], tmp_path: Path
) -> None:
    """And not once more for another micro-batch. What is no matrix is copied beside them."""
    config = {**MODELS[name][0], "intermediate_size": 128}  # as in real models, whole groups

    def more(batches: int) -> Counter[str]:
        plain, packed = (
            launches(config, Storing(dtype, matrices), capability, 8, tmp_path, batches=batches)
            for matrices in (None, Int4())
        )
        assert plain <= packed
        return packed - plain

    for_one = more(1)
    assert for_one == more(2)
    shapes = [tensor.shape for tensor in family_for({**config, "num_hidden_layers": 1}).units()[1].tensors]
    matrices = sum(len(shape) == 2 for shape in shapes)
    assert for_one["copy_"] == len(shapes) - matrices
    assert 0 < for_one.total() - for_one["copy_"] <= UNPACKING * matrices, dict(for_one)


@CARDS
@pytest.mark.parametrize(("name", "most"), PACKED_CACHE.items())
def test_a_cache_in_four_bits_launches_as_much_for_many_as_for_few(
    name: str, most: int, dtype: DType, capability: tuple[int, int], tmp_path: Path
) -> None:
    """As long as what they attend to is unpacked at once; else some more for each further part of it."""

    def packed(number: int, **asked: Any) -> Counter[str]:
        config, asked = MODELS[name][0], {"kv_format": "int4", "extent_tokens": None, **asked}
        asked["device_memory"] = 256 * MIB  # a window of each sequence is unpacked
        return launches(config, Storing(dtype), capability, number, tmp_path, **asked)

    few, many = packed(8), packed(64)
    assert few == many
    assert few.total() <= most, dict(few)
    # OPT: 32 sequences of 20 tokens and 30 of 8, in four parts. By windows each takes one, and the smallest buffer has
    # room for eleven: six parts.
    group_tokens, more = (256, 3) if name == "OPT" else (1, 5)
    in_parts = packed(64, group_tokens=group_tokens)
    assert 0 < in_parts.total() - many.total() <= more * PACKED_PART[name], dict(in_parts)


@CARDS
def test_windows_of_prompts_launch_as_much_for_many_as_for_few(
    dtype: DType, capability: tuple[int, int], tmp_path: Path
) -> None:
    """Beside what they launch if they have one: what became full is rounded, they attend to it, and both are merged."""

    def of_windows(cache: KVCache, number: int) -> MicroBatch:
        sequence = Sequence([5] * 600, 600, 605, SamplingParams())
        assert cache.admit(sequence)
        return arrange([Segment(sequence, 64, number, cache.held[sequence])])

    config = {**MODELS["Llama with groups"][0], "max_position_embeddings": 1024}
    one, three, eight = (
        launches(config, Storing(dtype), capability, windows * 64, tmp_path, make=of_windows,
                 kv_format="int4", extent_tokens=None, device_memory=256 * MIB)
        for windows in (1, 3, 8)
    )  # fmt: skip
    assert three == eight
    assert 0 < three.total() - one.total() <= MORE_WINDOWS, dict(three - one)
