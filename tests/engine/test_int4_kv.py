"""A KV cache in four bits: what transformers gives if each key and value is rounded as the format is described."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet
from transformers import OPTForCausalLM

from engine import Engine, Generation, PlanOptions, Scoring
from engine.attention.sizes import kv_bytes_per_token
from engine.devices.host import HostDevice
from engine.dtypes import DType
from engine.loading import load_engine, plan_input
from engine.planner.resolve import resolve_plan
from engine.tiers import TierName
from engine.tokenizer import Tokenizer
from engine.weights.importing import import_checkpoint
from tests.engine.checkpoints import make_checkpoint
from tests.engine.int4_reference import packed, unpacked
from tests.engine.placements import BESIDE_A_DEVICE, PLACEMENTS, options_of, scattered
from tests.engine.test_llama import prompts, requests
from tests.engine.test_placement import make_device

HEADS = (32, 64, 80, 96, 128)
PROMPT_LENGTHS = (1, 30, 58, 70, 150)
NEW_TOKENS = 12
NEAR, FAR, FEW = 6e-3, 0.1, 0.03
"""How far log-probabilities may be off, and how far this share of them: a value that lies in the middle between two
codes may get either of them, since sums are rounded in another order here and there."""


class Oracle(Protocol):
    """What another says of a model whose keys and values are rounded."""

    @property
    def model_dir(self) -> Path:
        """The model directory."""

    def logprobs(self, token_ids: tuple[int, ...], *, rounded: bool = True) -> torch.Tensor:
        """Log-probabilities of every token after each of ``token_ids``, ``[T, V]``."""


@dataclass(frozen=True)
class Rounding:
    """A model, and what transformers says of token ids if keys and values are rounded."""

    model_dir: Path
    model: OPTForCausalLM
    group: int

    def logprobs(self, token_ids: tuple[int, ...], *, rounded: bool = True) -> torch.Tensor:
        """Log-probabilities of every token after each of ``token_ids``, ``[T, V]``."""
        hooks = [hook for layer in self.model.model.decoder.layers for hook in self._hooked(layer)] if rounded else []
        try:
            with torch.no_grad():
                return self.model(torch.tensor([token_ids])).logits[0].float().log_softmax(-1)
        finally:
            for hook in hooks:
                hook.remove()

    def _hooked(self, layer: Any) -> Iterator[Any]:
        head_size = layer.self_attn.head_dim

        def round_heads(_module: object, _given: object, made: torch.Tensor) -> torch.Tensor:
            rows = made.reshape(-1, head_size).numpy()
            shape = (len(rows), head_size)
            back = unpacked(packed(rows, self.group), shape, self.group, DType.FLOAT32)
            return torch.from_numpy(back.copy()).view(made.shape)

        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            yield projection.register_forward_hook(round_heads)


@pytest.fixture(scope="module", params=HEADS, ids=lambda size: f"heads of {size}")
def rounding(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rounding:
    folder = tmp_path_factory.mktemp("int4-kv")
    size = 2 * request.param
    made = make_checkpoint(
        folder / "hf", num_attention_heads=2, hidden_size=size, word_embed_proj_dim=size, ffn_dim=2 * size
    )
    import_checkpoint(folder / "hf", folder / "model")
    return Rounding(folder / "model", made.model, 64 if request.param % 64 == 0 else request.param)


def errors(
    engine: Engine, rounding: Oracle, *, rounded: bool = True, lengths: Sequence[int] = PROMPT_LENGTHS
) -> list[float]:
    """How far log-probabilities are off; and those of generated tokens from the highest."""
    tokenizer = Tokenizer.of_model(rounding.model_dir / "tokenizer.json", engine._stage.family.shape)
    texts = prompts(lengths)
    outputs = {output.key: output.result for output in engine.run(requests(texts, NEW_TOKENS))}
    found: list[float] = []
    for index, text in enumerate(texts):
        generated, scored = outputs["generate", index], outputs["score", index]
        assert isinstance(generated, Generation)
        assert isinstance(scored, Scoring)
        prompt = tokenizer.encode(text)
        assert len(generated.token_ids) == NEW_TOKENS
        logprobs = rounding.logprobs((*prompt, *generated.token_ids), rounded=rounded)[len(prompt) - 1 : -1]
        chosen = logprobs[torch.arange(NEW_TOKENS), list(generated.token_ids)]
        found += (logprobs.max(-1).values - chosen).tolist()
        context, continuation = tokenizer.encode_pair(text, " and so on")
        logprobs = rounding.logprobs((*context, *continuation), rounded=rounded)
        wanted = [logprobs[len(context) - 1 + place, token].item() for place, token in enumerate(continuation)]
        found += [abs(token.logprob - want) for token, want in zip(scored.tokens, wanted, strict=True)]
    return found


def assert_near(found: list[float]) -> None:
    assert np.quantile(found, 1 - FEW) < NEAR
    assert max(found) < FAR


def check(rounding: Oracle, options: PlanOptions, kind: str) -> None:
    """Outputs are near the oracle's, and everything within its budget."""
    with load_engine(rounding.model_dir, options, device=make_device(kind)) as engine:
        assert_near(errors(engine, rounding))
        engine.check_integrity()
        for tier in engine.tiers.values():
            assert tier.peak <= tier.budget


def every_case() -> list[ParameterSet]:
    """Each size of heads under each placement on each device; a seventh of it, the rest is for ``make soak``."""
    placed = [
        *product(PLACEMENTS, ["cpu", "simulated", "like-cuda"]), *product(BESIDE_A_DEVICE, ["simulated", "like-cuda"]),
    ]  # fmt: skip
    return [
        pytest.param(size, name, kind, marks=[pytest.mark.soak] if index % 7 else [])
        for index, (size, (name, kind)) in enumerate(product(HEADS, placed))
    ]


@pytest.mark.parametrize(("rounding", "name", "kind"), every_case(), indirect=["rounding"])
def test_log_probabilities_are_those_of_rounded_keys_and_values(
    rounding: Rounding, name: str, kind: str, tmp_path: Path
) -> None:
    options = options_of(name, kv_format="int4", **scattered(tmp_path))
    check(rounding, options, kind)


def test_a_plain_cache_gives_something_else(rounding: Rounding, tmp_path: Path) -> None:
    """Else the test above would see nothing."""
    with load_engine(rounding.model_dir, options_of("all-device", **scattered(tmp_path))) as engine:
        assert np.quantile(errors(engine, rounding), 1 - FEW) > 3 * NEAR
        assert max(errors(engine, rounding, rounded=False)) < 1e-4


@pytest.mark.parametrize("rounding", [64], indirect=True)
@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("kind", ["cpu", "simulated"])
def test_chunks_of_prompts_change_nothing(kind: str, chunk: int, rounding: Rounding) -> None:
    options = PlanOptions(prefill_chunk=chunk, kv_format="int4", device_memory=64 << 20, host_memory=64 << 20)
    with load_engine(rounding.model_dir, options, device=make_device(kind)) as engine:
        assert_near(errors(engine, rounding))


@pytest.mark.parametrize("rounding", [64], indirect=True)
def test_three_and_a_half_times_the_sequences_find_room(rounding: Rounding) -> None:
    device = HostDevice()
    plans = []
    for name in ("plain", "int4"):
        given = plan_input(rounding.model_dir, PlanOptions(kv_format=name, dtype=DType.BFLOAT16), device)
        plans.append((resolve_plan(given), kv_bytes_per_token(given.shape, given.kv_format)))
    (plain, plain_bytes), (four, four_bytes) = plans
    assert plain_bytes / four_bytes == 128 / 36
    tokens = [plan.kv_tokens(given.shape)[TierName.DEVICE] for plan, _ in plans]
    assert tokens[1] / tokens[0] > 3.5
    assert four.kv_format.name == "int4" != plain.kv_format.name
