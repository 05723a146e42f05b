"""Models that do not always give finite numbers: which rows are errors, what they say, and what they leave behind."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import OPTForCausalLM

from engine import Choose, Generate, PlanOptions, Rejection, Request, SamplingParams, Score
from engine.loading import load_engine
from engine.weights.importers.huggingface import import_checkpoint
from tests.engine.checkpoints import make_checkpoint, token_of

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
    texts = ["ab" * (1 + index) for index in range(4)]
    works = [
        work
        for text in texts
        for work in (
            Generate(text, SamplingParams(max_new_tokens=3)),
            Generate(text, SamplingParams(max_new_tokens=3, temperature=1.0)),
            *(Score(text, f"c{letter}d") for letter in "xyz"),
            Choose(text, ("x", "y", "z")),
        )
    ]
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
