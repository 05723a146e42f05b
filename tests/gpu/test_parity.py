"""The engine on a GPU against transformers on the same weights: every placement, length, head size and number type."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from engine.dtypes import DType
from engine.errors import PlanDoesNotFit
from engine.loading import load_engine
from tests.engine.placements import BESIDE_A_DEVICE, PLACEMENTS, scattered
from tests.gpu.on_gpu import (
    EDGES,
    ON_A_GPU,
    TURING,
    Arithmetic,
    Model,
    about,
    check,
    found_in,
    llama_model,
    opt_model,
    options,
    requests,
    results,
    texts,
)

pytestmark = ON_A_GPU

EVERYWHERE = {**PLACEMENTS, **BESIDE_A_DEVICE}
KV_TIERS = ("all-device", "kv-on-host", "kv-on-disk", "split", "attended-on-host")
"""The KV cache in each tier, in all of them, and attended to where it lies."""


@pytest.fixture(scope="module")
def model(kind: Arithmetic, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return opt_model(tmp_path_factory.mktemp("opt"), kind.torch_dtype)


def edges() -> list[str]:
    """OPT's prompts begin with a token of their own."""
    return texts([length - 1 for length in EDGES])


@pytest.mark.parametrize("name", EVERYWHERE)
def test_every_placement_says_what_transformers_says(name: str, kind: Arithmetic, model: Model, tmp_path: Path) -> None:
    with load_engine(model.folder, options(name, **scattered(tmp_path)), device=kind.device()) as engine:
        assert engine.plan.dtype is kind.dtype
        found = results(engine, texts())
        engine.check_integrity()
        for tier in engine.tiers.values():
            assert tier.peak <= tier.budget
        again = list(engine.passes(iter(requests(texts()))))
    # Spill files aside, resident weights are never read again.
    streams = sum(report.stats.weight_bytes for report in again) > 0
    assert streams == (EVERYWHERE[name]["weights"] != "100/0/0")
    if kind.dtype is DType.FLOAT32:
        assert found_in(output for report in again for output in report.outputs) == about(found)
    check(found, model, texts(), kind.dtype)


@pytest.mark.parametrize("chunk", [None, 100])
@pytest.mark.parametrize("name", KV_TIERS)
def test_prompts_of_every_length_come_whole_and_in_chunks(
    name: str, chunk: int | None, kind: Arithmetic, model: Model, tmp_path: Path
) -> None:
    more = {} if chunk is None else {"prefill_chunk": chunk, "micro_batch": 128, "micro_batches": 4}
    with load_engine(model.folder, options(name, tmp_path, **more), device=kind.device()) as engine:
        found = results(engine, edges())
        engine.check_integrity()
    assert [len(model.tokenizer.encode(text)) for text in edges()] == list(EDGES)
    check(found, model, edges(), kind.dtype)


@pytest.mark.parametrize("name", ["all-device", "split"])
@pytest.mark.parametrize("head_size", [64, 80, 128])
def test_heads_of_every_size_that_models_have(head_size: int, name: str, kind: Arithmetic, tmp_path: Path) -> None:
    size = 4 * head_size
    made = opt_model(
        tmp_path, kind.torch_dtype, num_hidden_layers=5, hidden_size=size, word_embed_proj_dim=size, ffn_dim=2 * size
    )  # fmt: skip
    with load_engine(made.folder, options(name, **scattered(tmp_path)), device=kind.device()) as engine:
        found = results(engine, texts())
    check(found, made, texts(), kind.dtype)


GROUPED = {
    "llama, two queries a key": ("llama, grouped queries", {}),
    "llama, eight queries a key": ("llama, one key head, another activation", {"num_attention_heads": 8}),
    "llama, heads of 128": ("llama, grouped queries", {"num_attention_heads": 8, "head_dim": 128}),
    "qwen3": ("qwen3", {"num_attention_heads": 8, "head_dim": 64}),
}


@pytest.mark.parametrize("name", KV_TIERS)
@pytest.mark.parametrize("variant", GROUPED)
def test_queries_that_share_their_keys(variant: str, name: str, kind: Arithmetic, tmp_path: Path) -> None:
    base, changes = GROUPED[variant]
    made = llama_model(tmp_path, base, kind.torch_dtype, **changes)
    some: Sequence[str] = texts((1, 40, 257, 1024))
    with load_engine(made.folder, options(name, **scattered(tmp_path)), device=kind.device()) as engine:
        found = results(engine, some)
    check(found, made, some, kind.dtype)


@pytest.mark.parametrize("name", [name for name in EVERYWHERE if name != "all-device"])
def test_placements_agree_in_float32(name: str, tmp_path: Path) -> None:
    made = opt_model(tmp_path, torch.float32, num_hidden_layers=10, hidden_size=64, word_embed_proj_dim=64, ffn_dim=128)
    found = []
    for placement in ("all-device", name):
        with load_engine(made.folder, options(placement, **scattered(tmp_path))) as engine:
            found.append(results(engine, texts()))
    assert found[1] == about(found[0])


def test_bfloat16_is_refused_where_the_card_has_no_kernels_for_it(tmp_path: Path) -> None:
    """And is no default there: the same weights are computed in float16."""
    made = opt_model(tmp_path, torch.bfloat16, num_hidden_layers=3)
    old = Arithmetic(DType.BFLOAT16, TURING)
    with pytest.raises(PlanDoesNotFit, match=r"no bfloat16 kernels.*--dtype float16"):
        load_engine(made.folder, options("all-device", tmp_path, dtype="bfloat16"), device=old.device())
    with load_engine(made.folder, options("all-device", tmp_path), device=old.device()) as engine:
        assert engine.plan.dtype is DType.FLOAT16
        found = results(engine, texts())
    check(found, made, texts(), DType.FLOAT16)
