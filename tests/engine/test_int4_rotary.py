"""A KV cache in four bits where positions turn keys: what transformers gives if its attention sees what ours should."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from engine import PlanOptions
from engine.attention.int4_sizes import head_group
from engine.dtypes import DType
from engine.loading import load_engine
from engine.tiers import Shares
from engine.weights.importing import import_checkpoint
from tests.engine import llama_checkpoints
from tests.engine.placements import BESIDE_A_DEVICE, BUDGETS, PLACEMENTS, options_of, scattered
from tests.engine.test_int4_kv import FEW, NEAR, assert_near, check, errors
from tests.engine.test_int4_windows import expected
from tests.engine.test_placement import make_device

BY_WINDOWS = "keys rounded by windows"
VARIANTS = (
    "llama, a key head a query head", "llama, grouped queries", "llama, three heads, tied", "llama, llama3 positions",
    "qwen2, tied", "qwen3",
)  # fmt: skip


def attend_by_windows(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_more: object
) -> tuple[Tensor, None]:
    """For transformers: one sequence, heads first."""
    del module, attention_mask
    q_TNH, k_TKH, v_TKH = (each[0].transpose(0, 1).contiguous() for each in (query, key, value))
    group = head_group(q_TNH.shape[2], turned=True)
    return expected(q_TNH, k_TKH, v_TKH, group, DType.FLOAT32)[None], None


AttentionInterface.register(BY_WINDOWS, attend_by_windows)


@dataclass(frozen=True)
class WindowRounding:
    """A model, and what transformers says of token ids if keys and values are rounded."""

    model_dir: Path
    model: PreTrainedModel

    def logprobs(self, token_ids: tuple[int, ...], *, rounded: bool = True) -> Tensor:
        """Log-probabilities of every token after each of ``token_ids``, ``[T, V]``."""
        self.model.set_attn_implementation(BY_WINDOWS if rounded else "eager")
        with torch.no_grad():
            logits: Tensor = self.model(torch.tensor([token_ids]), use_cache=False).logits
        return logits[0].float().log_softmax(-1)


@pytest.fixture(scope="module", params=VARIANTS)
def rounding(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> WindowRounding:
    folder = tmp_path_factory.mktemp("int4-rotary")
    model = llama_checkpoints.make_checkpoint(folder / "hf", request.param)
    import_checkpoint(folder / "hf", folder / "model")
    return WindowRounding(folder / "model", model)


CASES = [
    pytest.param(variant, name, kind, marks=[pytest.mark.soak] if index % 7 else [])
    for index, (variant, (name, kind)) in enumerate(
        product(
            VARIANTS,
            [
                *product(PLACEMENTS, ["cpu", "simulated", "like-cuda"]),
                *product(BESIDE_A_DEVICE, ["simulated", "like-cuda"]),
            ],
        )
    )
]
"""Each variant under each placement on each device; a seventh of it, the rest is for ``make soak``."""


@pytest.mark.parametrize(("rounding", "name", "kind"), CASES, indirect=["rounding"])
def test_log_probabilities_are_those_of_rounded_keys_and_values(
    rounding: WindowRounding, name: str, kind: str, tmp_path: Path
) -> None:
    check(rounding, options_of(name, kv_format="int4", **scattered(tmp_path)), kind)


@pytest.mark.parametrize("rounding", ["llama, grouped queries"], indirect=True)
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("kind", ["cpu", "simulated"])
@pytest.mark.parametrize("kv", ["100/0/0", "0/0/100"])
def test_chunks_of_prompts_change_nothing(
    kv: str, kind: str, chunk: int, rounding: WindowRounding, tmp_path: Path
) -> None:
    options = PlanOptions(prefill_chunk=chunk, kv_format="int4", kv=Shares.parse(kv), disk_dir=tmp_path, **BUDGETS)
    with load_engine(rounding.model_dir, options, device=make_device(kind)) as engine:
        assert_near(errors(engine, rounding))


@pytest.mark.parametrize("rounding", ["llama, grouped queries"], indirect=True)
def test_a_plain_cache_gives_something_else(rounding: WindowRounding, tmp_path: Path) -> None:
    """Else the test above would see nothing."""
    with load_engine(rounding.model_dir, options_of("all-device", **scattered(tmp_path))) as engine:
        assert np.quantile(errors(engine, rounding), 1 - FEW) > 3 * NEAR
        assert max(errors(engine, rounding, rounded=False)) < 1e-4


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> WindowRounding:
    """A model of more positions than buffers have room for."""
    folder = tmp_path_factory.mktemp("int4-rotary-long")
    model = llama_checkpoints.make_checkpoint(folder / "hf", "llama, grouped queries", max_position_embeddings=1024)
    import_checkpoint(folder / "hf", folder / "model")
    return WindowRounding(folder / "model", model)


@pytest.mark.parametrize("micro_batch", [16, 160])
@pytest.mark.parametrize("kind", ["cpu", "simulated", "like-cuda"])
@pytest.mark.parametrize("kv", ["100/0/0", "40/30/30", "0/100/0", "0/0/100"])
def test_sequences_longer_than_buffers_come_in_parts(
    kv: str, kind: str, micro_batch: int, long: WindowRounding, tmp_path: Path
) -> None:
    """Several parts, whether new tokens are in one window or in several."""
    options = PlanOptions(
        micro_batch=micro_batch, group_tokens=1, kv_format="int4", kv=Shares.parse(kv), disk_dir=tmp_path, **BUDGETS
    )
    with load_engine(long.model_dir, options, device=make_device(kind)) as engine:
        assert engine.plan.group_tokens < 800
        assert_near(errors(engine, long, lengths=(1, 70, 400, 900)))
