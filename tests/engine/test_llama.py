"""Llama's family against transformers' classes on the same weights, wherever weights, KV cache and activations lie."""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet

from engine import Engine, Generate, Generation, PlanOptions, Request, SamplingParams, Score, Scoring
from engine.devices.host import HostDevice
from engine.devices.simulated import SimulatedDevice
from engine.loading import load_engine
from engine.model.llama import Llama, turn_, waves
from engine.model.llama_sizes import KNOWN
from engine.tokenizer import Tokenizer
from engine.weights.importing import import_checkpoint
from tests.engine.llama_checkpoints import VARIANTS, Oracle, make_checkpoint
from tests.engine.placements import PLACEMENTS, options_of, scattered
from tests.engine.test_half_precision import errors_of_both

NEW_TOKENS = 40
PROMPT_LENGTHS = (1, 30, 70)


@dataclass(frozen=True)
class Imported:
    oracle: Oracle
    model_dir: Path
    tokenizer: Tokenizer


@pytest.fixture(scope="module", params=VARIANTS)
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Imported:
    folder = tmp_path_factory.mktemp("llama")
    model = make_checkpoint(folder / "hf", request.param)
    import_checkpoint(folder / "hf", folder / "model")
    return Imported(Oracle(model), folder / "model", Tokenizer.load(folder / "model" / "tokenizer.json", None))


def prompts(lengths: Sequence[int] = PROMPT_LENGTHS) -> list[str]:
    """Texts of the wanted number of tokens: one letter, one token."""
    rng = np.random.default_rng(7)
    return ["".join(rng.choice(list(string.ascii_letters), length)) for length in lengths]


def requests(texts: Sequence[str], new_tokens: int) -> list[Request]:
    """Each text is generated from, and scored."""
    sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    scored = [Request(("score", index), Score(text, " and so on")) for index, text in enumerate(texts)]
    return [Request(("generate", index), Generate(text, sampling)) for index, text in enumerate(texts)] + scored


def check(engine: Engine, imported: Imported) -> None:
    """Every generated token is the oracle's likeliest after those before it; log-probabilities are the oracle's."""
    outputs = {output.key: output.result for output in engine.run(requests(prompts(), NEW_TOKENS))}
    for index, text in enumerate(prompts()):
        generated, scored = outputs["generate", index], outputs["score", index]
        assert isinstance(generated, Generation)
        assert isinstance(scored, Scoring)
        prompt = imported.tokenizer.encode(text)
        assert len(prompt) == PROMPT_LENGTHS[index]
        ids = (*prompt, *generated.token_ids)
        likeliest = imported.oracle.logprobs(ids).argmax(-1)
        assert list(generated.token_ids) == likeliest[len(prompt) - 1 : -1].tolist()
        assert len(generated.token_ids) == NEW_TOKENS
        context, continuation = imported.tokenizer.encode_pair(text, " and so on")
        logprobs = imported.oracle.logprobs((*context, *continuation))
        wanted = [logprobs[len(context) - 1 + place, token].item() for place, token in enumerate(continuation)]
        np.testing.assert_allclose([token.logprob for token in scored.tokens], wanted, atol=1e-4, rtol=0)


def every_pair() -> list[ParameterSet]:
    """Each variant with each placement, on the devices in turn; the other half of all threes is for ``make soak``."""
    return [
        pytest.param(variant, placement, kind, marks=[pytest.mark.soak] if sum(places) % 2 else [])
        for (places, (variant, placement, kind)) in zip(
            product(range(len(VARIANTS)), range(len(PLACEMENTS)), range(2)),
            product(VARIANTS, PLACEMENTS, ("cpu", "simulated")),
            strict=True,
        )
    ]


@pytest.mark.parametrize(("imported", "placement", "kind"), every_pair(), indirect=["imported"])
def test_tokens_and_scores_are_transformers(imported: Imported, placement: str, kind: str, tmp_path: Path) -> None:
    device = HostDevice() if kind == "cpu" else SimulatedDevice()
    with load_engine(imported.model_dir, options_of(placement, **scattered(tmp_path)), device=device) as engine:
        check(engine, imported)
        engine.check_integrity()
        for tier in engine.tiers.values():
            assert tier.peak <= tier.budget


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("imported", ["llama, llama3 positions", "qwen3"], indirect=True)
def test_chunks_of_prompts_change_nothing(chunk: int, imported: Imported) -> None:
    with load_engine(imported.model_dir, PlanOptions(device="cpu", prefill_chunk=chunk)) as engine:
        check(engine, imported)


@pytest.mark.parametrize("variant", ["llama, llama3 positions", "qwen2, tied", "qwen3"])
def test_bfloat16_errs_no_more_than_transformers(variant: str, tmp_path: Path) -> None:
    """|ours - float32| is at most 1.5 times |transformers' bfloat16 - float32|, in the median and the maximum."""
    make_checkpoint(
        tmp_path / "hf", variant, dtype=torch.bfloat16, hidden_size=128, num_hidden_layers=6, initializer_range=0.1
    )
    import_checkpoint(tmp_path / "hf", tmp_path / "model")
    ours, theirs = errors_of_both(tmp_path / "hf", tmp_path / "model")
    assert np.median(ours) <= 1.5 * np.median(theirs)
    assert ours.max() <= 1.5 * theirs.max()
    assert theirs.max() > 0


def test_norms_are_computed_in_float32() -> None:
    """The half-precision bound over a whole model is too wide to notice; so the norm itself, to the bit."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    family = Llama.from_config(KNOWN["meta-llama/Llama-3.2-1B"])
    hidden = (20 * torch.randn(64, 2048)).to(torch.bfloat16)
    norm = LlamaRMSNorm(2048, family.norm_eps).to(torch.bfloat16)
    norm.weight.data = torch.randn(2048).to(torch.bfloat16)
    with torch.inference_mode():
        expected = norm(hidden)
        found = family._norm({"norm.weight": norm.weight.data}, "norm", hidden)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_angles_are_computed_in_float32(dtype: torch.dtype) -> None:
    """Half precision cannot tell far positions from their neighbours; the small models above have near ones alone."""
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding, apply_rotary_pos_emb

    torch.manual_seed(0)
    family = Llama.from_config(KNOWN["Qwen/Qwen3-0.6B"])
    positions = torch.tensor([0, 1, 255, 257, 1023, 4097, 30001, 40959])
    heads_TNH = torch.randn(len(positions), 2, family.shape.head_size).to(dtype)
    rope = {"rope_type": "default", "rope_theta": family.rope.theta}
    rotary = LlamaRotaryEmbedding(LlamaConfig(head_dim=family.shape.head_size, rope_parameters=rope))
    heads_1NTH = heads_TNH.transpose(0, 1)[None].clone()
    expected, _ = apply_rotary_pos_emb(heads_1NTH, heads_1NTH, *rotary(heads_1NTH, positions[None]))
    turn_(heads_TNH, waves(positions, family.rope, family.shape.head_size, dtype))
    assert torch.equal(heads_TNH, expected[0].transpose(0, 1))
