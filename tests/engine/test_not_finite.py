"""Models that do not always give finite numbers: which rows are errors, what they say, and what they leave behind."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OPTForCausalLM

from engine import Choose, Engine, Generate, Output, PlanOptions, Rejection, Request, SamplingParams, Score
from engine.dtypes import DType
from engine.loading import load_engine
from engine.weights.importing import import_checkpoint
from tests.engine.checkpoints import make_checkpoint, make_overflowing, token_of
from tests.engine.placements import options_of, scattered
from tests.engine.test_placement import make_device

MakeModel = Callable[[Callable[[OPTForCausalLM], None]], Path]


@pytest.fixture
def model_of(tmp_path: Path) -> MakeModel:
    """A model directory of a small model after some change of its weights."""

    def make(change: Callable[[OPTForCausalLM], None]) -> Path:
        model = make_checkpoint(tmp_path / "hf", num_hidden_layers=2, tie_word_embeddings=False).model
        with torch.no_grad():
            change(model)
        model.save_pretrained(tmp_path / "hf")
        import_checkpoint(tmp_path / "hf", tmp_path / "model")
        return tmp_path / "model"

    return make


def every_task() -> list[Request]:
    works: list[Generate | Score | Choose] = []
    for text in ("ab", "abab", "ababab"):
        works += [Generate(text, SamplingParams(max_new_tokens=3, temperature=hot)) for hot in (0.0, 1.0)]
        works += [Score(text, f"c{letter}d") for letter in "xyz"]
        works.append(Choose(text, ("x", "y", "z")))
    return [Request(index, work) for index, work in enumerate(works)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["a token's embedding", "a token's logit", "a layer"])
def test_nothing_leaves_the_engine_that_json_cannot_say(value: float, where: str, model_of: MakeModel) -> None:
    def spoil(model: OPTForCausalLM) -> None:
        if where == "a token's embedding":
            model.model.decoder.embed_tokens.weight[token_of("y")] = value
        elif where == "a token's logit":
            model.lm_head.weight[token_of("z"), 5] = value  # infinite above or below zero, as the hidden state has it
        else:
            model.model.decoder.layers[1].fc1.weight[3] = value

    with load_engine(model_of(spoil), PlanOptions(device="cpu")) as engine:
        outputs = list(engine.run(every_task()))
    for output in outputs:
        json.dumps(asdict(output.result), allow_nan=False)
    refused = {output.result.code for output in outputs if isinstance(output.result, Rejection)}
    assert refused == {"not_finite"}


POISONED = 30
"""The first position that gives no finite numbers."""


def spoil_letter_and_position(model: OPTForCausalLM) -> None:
    """Sequences with a z, and those that get beyond a position, have no finite numbers; a z is said to nobody."""
    model.model.decoder.embed_tokens.weight[token_of("z")] = math.nan
    model.lm_head.weight[token_of("z")] = 0.0
    model.model.decoder.embed_positions.weight[model.model.decoder.embed_positions.offset + POISONED] = math.inf


def rows() -> list[Request]:
    """Named good or bad, of all tasks, in turn."""

    def generate(prompt: str, count: int) -> Generate:
        return Generate(prompt, SamplingParams(max_new_tokens=count, ignore_eos=True))

    good: list[Generate | Score | Choose] = [
        *(generate("ab" * length, 8) for length in (1, 4, 8)),
        generate("a" * 10, POISONED - 10),  # the last token that it says is computed no more
        *(Score("ab" * length, "cd") for length in (2, 9)),
        Score("ab", "cz"),  # the last token is only looked for
        *(Choose("ab" * length, ("x", "yy", "abc")) for length in (1, 6)),
    ]
    bad: list[Generate | Score | Choose] = [
        *(generate("z" + "ab" * length, 8) for length in (1, 4, 8)),
        generate("z" + "a" * 90, 8),  # in the KV cache over several passes
        generate("a" * 10, POISONED - 9),  # while it decodes
        generate("a" * 90, 8),
        *(Score("z" * length, "cd") for length in (2, 9)),
        Score("ab", "zc"),
        Score("a" * 20, "b" * 20),
        *(Choose("z" * length, ("x", "yy", "abc")) for length in (1, 6)),
        Choose("ab", ("x", "zx", "abc")),  # one of the choices is enough
        Choose("ab", ("x", "b" * 90, "abc")),
    ]
    named = [(("good", index), work) for index, work in enumerate(good)]
    named += [(("bad", index), work) for index, work in enumerate(bad)]
    # One of each in turn, so that they share passes, micro-batches and pieces of the KV cache.
    return [Request(key, work) for key, work in sorted(named, key=lambda each: each[0][1])]


def results_of(engine: Engine, requests: list[Request]) -> dict[Any, dict[str, Any]]:
    """Results by key, one of each request; nothing is left of them in the engine."""
    outputs = list(engine.run(requests))
    assert sorted(map(key_of, outputs)) == sorted(map(key_of, requests))
    assert engine._kv.held_tokens == 0
    engine.check_integrity()
    return {output.key: asdict(output.result) for output in outputs}


def key_of(named: Request | Output) -> Any:
    return named.key


def about(result: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities nearly, since neighbours change how they are rounded; all else exactly."""
    near: dict[str, Any] = {}
    for key in result.keys() & {"logprob", "logprobs"}:
        near[key] = pytest.approx(result[key], abs=1e-4)
    if "tokens" in result:
        near["tokens"] = tuple(about(token) for token in result["tokens"])
    return {**result, **near}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("all-device", "cpu"), ("all-host", "simulated"), ("all-disk", "simulated"), ("attended-on-host", "simulated")],
)
def test_only_the_rows_that_meet_the_fault_are_errors(
    name: str, kind: str, model_of: MakeModel, tmp_path: Path
) -> None:
    model_dir = model_of(spoil_letter_and_position)
    plan_options = options_of(name, dtype="float32", **scattered(tmp_path / "spill"))
    good = [request for request in rows() if key_of(request)[0] == "good"]
    with load_engine(model_dir, plan_options, device=make_device(kind)) as engine:
        alone = {key: about(result) for key, result in results_of(engine, good).items()}
        together = results_of(engine, rows())
        refused = {key for key, result in together.items() if "code" in result}
        assert refused == {key_of(request) for request in rows() if key_of(request)[0] == "bad"}
        assert {together[key]["code"] for key in refused} == {"not_finite"}
        assert {key: result for key, result in together.items() if key not in refused} == alone
        assert results_of(engine, good) == alone, "what was in the room of the KV cache that they got"


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        (DType.FLOAT16, "give the worker --dtype bfloat16 or float32"),
        (DType.BFLOAT16, "give the worker --dtype float32"),
        (DType.FLOAT32, "its weights are at fault: import the model anew"),
    ],
)
@pytest.mark.parametrize("work", [Generate("z", SamplingParams()), Score("z", "a"), Choose("z", ("a", "b"))])
def test_the_error_names_the_number_type_and_what_to_do(
    dtype: DType, advice: str, work: Generate | Score | Choose, model_of: MakeModel
) -> None:
    with load_engine(model_of(spoil_letter_and_position), PlanOptions(device="cpu", dtype=dtype)) as engine:
        (output,) = engine.run([Request("row", work)])
    assert isinstance(output.result, Rejection)
    assert output.result.code == "not_finite"
    assert output.result.message.startswith(f"the model's logits are not finite numbers in {dtype}; {advice}")
    assert (output.prompt_tokens, output.completion_tokens) == (0, 0)


@pytest.mark.parametrize(
    ("dtype", "is_finite"), [(DType.FLOAT16, False), (DType.BFLOAT16, True), (DType.FLOAT32, True)]
)
def test_what_overflows_float16_is_mended_by_the_types_that_the_error_names(
    dtype: DType, is_finite: bool, tmp_path: Path
) -> None:
    make_overflowing(tmp_path / "hf", num_hidden_layers=2)
    import_checkpoint(tmp_path / "hf", tmp_path / "model")
    with load_engine(tmp_path / "model", PlanOptions(device="cpu", dtype=dtype)) as engine:
        refused = [isinstance(output.result, Rejection) for output in engine.run(every_task())]
    assert set(refused) == {not is_finite}
