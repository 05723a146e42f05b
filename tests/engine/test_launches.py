"""How many kernels a layer launches for a micro-batch: few, and as many for 64 sequences as for 8.

Counted with fake tensors: what is no view and no memory launches a kernel, a custom operator those inside it.
"""

from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from engine.dtypes import DType
from engine.kvcache.segments import Segment, arrange
from engine.model.registry import family_for
from engine.request import SamplingParams
from engine.schedule.passes import Pass
from engine.sequence import Sequence
from tests.engine.hub_configs import HUB
from tests.engine.test_cuda_fake import GPU, PlainIndexing, make_executor

INSIDE = {"_varlen_attn_out": 1}
"""Kernels in custom operators, which are known by their source alone; who adds one says how many it launches."""
NOT_LAUNCHED = ("device", "empty", "empty_like", "empty_strided", "new_empty")


class Launches(TorchDispatchMode):
    """Counts kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_view = any(each.alias_info and not each.alias_info.is_write for each in func._schema.returns)
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        if not is_view and name not in NOT_LAUNCHED and any(x.device == GPU for x in tensors):
            assert func.namespace == "aten" or name in INSIDE, f"how many kernels does {func} launch?"
            self.found[name] += INSIDE.get(name, 1)
        return result


SIZES = {"hidden_size": 64, "num_attention_heads": 8, "vocab_size": 500, "max_position_embeddings": 256}
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "OPT": ({"model_type": "opt", **SIZES, "word_embed_proj_dim": 64, "ffn_dim": 256}, 14),
    "Llama": ({**HUB["meta-llama/Llama-2-7b-hf"], **SIZES, "num_key_value_heads": 8, "intermediate_size": 96}, 22),
    "Llama with groups": (
        {**HUB["meta-llama/Llama-2-7b-hf"], **SIZES, "num_key_value_heads": 2, "intermediate_size": 96}, 22
    ),
    "Qwen2": ({**HUB["Qwen/Qwen2.5-0.5B"], **SIZES, "num_key_value_heads": 2, "intermediate_size": 96}, 22),
}  # fmt: skip
"""The most that a layer may launch for a micro-batch."""


def launches(
    config: dict[str, Any], dtype: DType, capability: tuple[int, int], number: int, folder: Path
) -> Counter[str]:
    """What one layer launches: a pass through two layers, less a pass through one."""
    found = []
    for depth in (1, 2):
        family = family_for({**config, "num_hidden_layers": depth})
        with ExitStack() as stack:
            counted = Launches()
            for mode in (torch.inference_mode(), FakeTensorMode(), PlainIndexing(), counted):
                stack.enter_context(mode)
            executor, cache = make_executor(family, dtype, folder, capability, micro_batch=512)
            sequences = [Sequence([5] * 20, 19, 24, SamplingParams()) for _ in range(number)]
            assert all(cache.admit(sequence) for sequence in sequences)
            segments = [Segment(one, 19, 1, cache.held[one]) for one in sequences[: number // 2]]
            segments += [Segment(one, 0, 8, cache.held[one]) for one in sequences[number // 2 : -2]]
            segments += [Segment(Sequence([5] * 9, 9, 9, score_from=2), 0, 8) for _ in range(2)]
            counted.found.clear()
            executor.run(Pass((arrange(segments),)))
            found.append(counted.found)
    return found[1] - found[0]


@pytest.mark.parametrize(
    ("dtype", "capability"), [(DType.FLOAT16, (7, 5)), (DType.FLOAT16, (8, 0)), (DType.BFLOAT16, (9, 0))], ids=str
)
@pytest.mark.parametrize("name", MODELS)
def test_a_layer_launches_as_much_for_many_as_for_few(
    name: str, dtype: DType, capability: tuple[int, int], tmp_path: Path
) -> None:
    """Decode tokens, whole prompts and scored rows side by side: every kind that a micro-batch can have."""
    config, most = MODELS[name]
    few, many = (launches(config, dtype, capability, number, tmp_path) for number in (8, 64))
    assert few == many
    assert few.total() <= most, dict(few)
