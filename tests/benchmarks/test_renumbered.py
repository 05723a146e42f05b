"""Channels in another order: other weights share a group, and the model says the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.renumbered import along_outputs, error, load, renumbered, save
from engine.formats.sizes import Int4
from tests.engine import checkpoints, llama_checkpoints

MODELS = {
    "opt": checkpoints.make_checkpoint,
    "llama, three query heads a key head": lambda folder: llama_checkpoints.make_checkpoint(
        folder, "llama, grouped queries", num_attention_heads=6, num_key_value_heads=2, hidden_size=48
    ),
    "llama, tied": lambda folder: llama_checkpoints.make_checkpoint(folder, "llama, three heads, tied"),
}


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    MODELS[request.param](tmp_path / "hf")
    return tmp_path / "hf"


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    return torch.as_tensor(model(torch.arange(5, 45)[None]).logits)


@pytest.mark.parametrize("seed", [1, 2])
def test_another_order_changes_the_weights_and_nothing_else(folder: Path, seed: int) -> None:
    state, config = load(folder), json.loads((folder / "config.json").read_text())
    other = renumbered(state, config, seed)
    save(other, folder, folder.parent / "other")
    torch.testing.assert_close(logits(folder.parent / "other"), logits(folder), rtol=1e-4, atol=1e-4)
    assert other.keys() == state.keys()
    # Each tensor, norms and biases too, has the values it had, elsewhere.
    for name, tensor in state.items():
        assert torch.equal(other[name].flatten().sort().values, tensor.flatten().sort().values)
        assert not torch.equal(other[name], tensor), name


def test_what_was_rounded_is_not_off_any_more_but_along_the_other_axis(folder: Path) -> None:
    state = load(folder)
    assert 0.05 < error(state, Int4(32)) < error(state, Int4(64)) < 0.15
    rounded = along_outputs(state, 32)
    turned = {name: tensor.T if tensor.ndim == 2 else tensor for name, tensor in rounded.items()}
    assert error(turned, Int4(32)) < 1e-3
    assert error(rounded, Int4(32)) > 0.05
