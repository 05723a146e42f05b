"""Half precision: as near to float32 as transformers' own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine import PlanOptions, Request, Score
from engine.loading import load_engine
from engine.model.registry import sizes_for
from engine.tokenizer import Tokenizer
from engine.weights.importing import import_checkpoint
from engine.weights.manifest import read_manifest
from tests.engine.checkpoints import make_checkpoint
from tests.engine.test_parity import prompts


def errors_of_both(folder: Path, model_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """How far log-probabilities in bfloat16 are from transformers' in float32: ours, and transformers' own."""
    shape = sizes_for(read_manifest(model_dir).config).shape
    tokenizer = Tokenizer.of_model(model_dir / "tokenizer.json", shape)
    # Many tokens: the maximum of few is chance.
    texts = [text[skip:] for text in prompts() for skip in range(8) if skip < len(text) < 200]
    continuation = " the quick brown fox jumps over the lazy dog, and then it runs all the way home again"
    pairs = [tokenizer.encode_pair(text, continuation) for text in texts]
    # Loaded anew: a model that is cast rounds what it computes positions with, too.
    exact, theirs = (
        _by_oracle(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), pairs)
        for dtype in (torch.float32, torch.bfloat16)
    )
    with load_engine(model_dir, PlanOptions(device="cpu")) as engine:
        assert engine.plan.dtype == "bfloat16"
        outputs = {o.key: o for o in engine.run(Request(i, Score(t, continuation)) for i, t in enumerate(texts))}
    ours = np.array([token.logprob for i in range(len(pairs)) for token in outputs[i].result.tokens])
    return abs(ours - exact), abs(theirs - exact)


@pytest.mark.parametrize("changes", [{}, {"do_layer_norm_before": False, "word_embed_proj_dim": 32}])
def test_bfloat16_errs_no_more_than_transformers(changes: dict[str, object], tmp_path: Path) -> None:
    """|ours - float32| is at most 1.5 times |transformers' bfloat16 - float32|, in the median and the maximum."""
    make_checkpoint(tmp_path / "hf", dtype=torch.bfloat16, hidden_size=128, num_hidden_layers=6, **changes)
    import_checkpoint(tmp_path / "hf", tmp_path / "model")
    our_error, their_error = errors_of_both(tmp_path / "hf", tmp_path / "model")
    assert np.median(our_error) <= 1.5 * np.median(their_error)
    assert our_error.max() <= 1.5 * their_error.max()
    assert their_error.max() > 0


@torch.no_grad()
def _by_oracle(model: PreTrainedModel, pairs: list[tuple[list[int], list[int]]]) -> np.ndarray:
    found = []
    for context, continuation in pairs:
        ids = context + continuation
        logprobs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        found += [logprobs[i - 1, ids[i]].item() for i in range(len(context), len(ids))]
    return np.array(found)
