"""The engine against transformers' ``OPTForCausalLM`` on the same weights."""

import string
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import OPTForCausalLM

from engine import Choose, Generate, Generation, PlanOptions, Request, SamplingParams, Score, Scoring
from engine.loading import load_engine
from engine.tokenizer import Tokenizer
from engine.weights.importing import import_checkpoint
from tests.engine.checkpoints import VARIANTS, Checkpoint, make_checkpoint

NEW_TOKENS = 40
PROMPT_LENGTHS = (1, 2, 5, 17, 64, 65, 130, 300)


@pytest.fixture(scope="module", params=VARIANTS)
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = make_checkpoint(folder / "hf", **VARIANTS[request.param])
    import_checkpoint(folder / "hf", folder / "model")
    return checkpoint, folder / "model"


def prompts() -> list[str]:
    """Texts of the wanted number of tokens (BOS included): one letter, one token."""
    rng = np.random.default_rng(7)
    return ["".join(rng.choice(list(string.ascii_letters), length - 1)) for length in PROMPT_LENGTHS]


@pytest.fixture(scope="module")
def expected(imported: tuple[Checkpoint, Path]) -> list[tuple[list[int], list[int], list[float]]]:
    """(prompt ids, greedy ids, log-probability of each greedy id) by the oracle."""
    checkpoint, model_dir = imported
    tokenizer = Tokenizer.load(model_dir / "tokenizer.json", 2)
    found = []
    for text in prompts():
        ids = tokenizer.encode(text)
        found.append((ids, *greedy_by_oracle(checkpoint.model, ids, NEW_TOKENS)))
    return found


@torch.no_grad()
def greedy_by_oracle(model: OPTForCausalLM, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    ids = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None
    )[0].tolist()
    logprobs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    generated = ids[len(prompt) :]
    return generated, [logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(generated)]


@pytest.mark.parametrize("chunk", [None, 1, 7, 64])
def test_greedy_tokens_are_transformers(
    imported: tuple[Checkpoint, Path],
    expected: list[tuple[list[int], list[int], list[float]]],
    chunk: int | None,
) -> None:
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    with load_engine(imported[1], PlanOptions(device="cpu", prefill_chunk=chunk)) as engine:
        outputs = {o.key: o for o in engine.run(Request(i, Generate(p, sampling)) for i, p in enumerate(prompts()))}
        engine.check_integrity()
    assert len(outputs) == len(PROMPT_LENGTHS)
    for index, (ids, generated, _) in enumerate(expected):
        result = outputs[index].result
        assert isinstance(result, Generation)
        assert outputs[index].prompt_tokens == len(ids) == PROMPT_LENGTHS[index]
        assert list(result.token_ids) == generated


def scored_requests(
    model_dir: Path, expected: list[tuple[list[int], list[int], list[float]]]
) -> Iterator[tuple[Request, list[int], int]]:
    """Requests whose continuation is a text of its own, with all their ids and how many of them are context."""
    tokenizer = Tokenizer.load(model_dir / "tokenizer.json", 2)
    for index, text in enumerate(prompts()):
        continuation = " " + "".join(chr(ord("a") + (3 * i + index) % 26) for i in range(12))
        context_ids, continuation_ids = tokenizer.encode_pair(text, continuation)
        yield Request(index, Score(text, continuation)), context_ids + continuation_ids, len(context_ids)


@pytest.mark.parametrize("chunk", [None, 1, 7, 64])
def test_scores_are_transformers(
    imported: tuple[Checkpoint, Path],
    expected: list[tuple[list[int], list[int], list[float]]],
    chunk: int | None,
) -> None:
    checkpoint, model_dir = imported
    wanted = list(scored_requests(model_dir, expected))
    with load_engine(model_dir, PlanOptions(device="cpu", prefill_chunk=chunk)) as engine:
        outputs = {output.key: output for output in engine.run(request for request, _, _ in wanted)}
    for request, ids, num_context in wanted:
        with torch.no_grad():
            logprobs = checkpoint.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        targets = [logprobs[i - 1, ids[i]].item() for i in range(num_context, len(ids))]
        greedy = all(logprobs[i - 1].argmax().item() == ids[i] for i in range(num_context, len(ids)))
        result = outputs[request.key].result
        assert isinstance(result, Scoring)
        assert [token.id for token in result.tokens] == ids[num_context:]
        np.testing.assert_allclose([token.logprob for token in result.tokens], targets, atol=1e-4, rtol=0)
        assert result.logprob == pytest.approx(sum(targets), abs=1e-3)
        assert result.is_greedy == greedy


@torch.no_grad()
def test_the_token_that_greedy_decoding_says_is_called_greedy(imported: tuple[Checkpoint, Path]) -> None:
    """And no other is: over prompts whose next token has a text that encodes back to it."""
    checkpoint, model_dir = imported
    tokenizer = Tokenizer.load(model_dir / "tokenizer.json", 2)
    requests = []
    for text in (a + b for a in "acegikmoqsuwy" for b in string.ascii_lowercase):
        ids = tokenizer.encode(text)
        greedy = int(checkpoint.model(torch.tensor([ids])).logits[0, -1].argmax())
        continuation = tokenizer.token_text(greedy)
        if continuation and tokenizer.encode_pair(text, continuation) == (ids, [greedy]):
            requests.append(Request((text, True), Score(text, continuation)))
            requests.append(Request((text, False), Score(text, "Z" if continuation != "Z" else "Y")))
    assert requests, "no greedy token of these prompts has a text of its own: widen the prompts"
    with load_engine(model_dir, PlanOptions(device="cpu")) as engine:
        found = {output.key: output.result for output in engine.run(requests)}
    for key, result in found.items():
        assert isinstance(result, Scoring)
        assert result.is_greedy == key[1]


def test_choices_are_ranked_by_summed_logprob(imported: tuple[Checkpoint, Path]) -> None:
    checkpoint, model_dir = imported
    tokenizer = Tokenizer.load(model_dir / "tokenizer.json", 2)
    choices = ("yes", " no", "perhaps not")
    with load_engine(model_dir, PlanOptions(device="cpu")) as engine:
        (output,) = engine.run([Request("row", Choose("Is it so?", choices))])
    sums = {}
    for choice, joined in zip(choices, (" yes", " no", " perhaps not"), strict=True):
        context_ids, continuation_ids = tokenizer.encode_pair("Is it so?", joined)
        ids = context_ids + continuation_ids
        with torch.no_grad():
            logprobs = checkpoint.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        sums[choice] = sum(logprobs[i - 1, ids[i]].item() for i in range(len(context_ids), len(ids)))
    assert output.result.label == max(sums, key=lambda choice: sums[choice])
    assert output.result.logprobs == pytest.approx(sums, abs=1e-3)
