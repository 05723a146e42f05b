"""The shipped model is a real, small OPT checkpoint that labels reviews; transformers is the judge, not our engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoTokenizer, OPTForCausalLM

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "reviews"
CHOICES = ("positive", "negative")
BOS, PAD = 2, 1


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def sample() -> list[dict[str, str]]:
    with (FOLDER / "sample.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def prompt_of(row: dict[str, str]) -> str:
    return f"Review: {row['text']}\nSentiment:"


def test_weights_are_small_and_bfloat16() -> None:
    path = FOLDER / "model.safetensors"
    assert path.stat().st_size <= 8 * 2**20
    with safe_open(path, framework="pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_config_is_a_plain_opt_with_opts_special_tokens(tokenizer: Tokenizer) -> None:
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "opt"
    assert config["architectures"] == ["OPTForCausalLM"]
    assert config["do_layer_norm_before"] is True
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (BOS, BOS, PAD)
    assert config["vocab_size"] == tokenizer.get_vocab_size()
    assert [tokenizer.id_to_token(token) for token in range(4)] == ["<s>", "<pad>", "</s>", "<unk>"]


@pytest.mark.parametrize("text", ["A plain text.", " spaces  kept \n\t", "naïve café — “quotes” 電影 🎬", "", "don't"])
def test_tokenizer_gives_any_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text
    assert tokenizer.decode(tokenizer.encode(text).ids) == text  # the special tokens are left out


def test_tokenizer_opens_a_text_with_one_bos_and_transformers_agrees(tokenizer: Tokenizer) -> None:
    text = prompt_of({"text": "A film."})
    ids = tokenizer.encode(text).ids
    assert ids == [BOS, *tokenizer.encode(text, add_special_tokens=False).ids]
    assert AutoTokenizer.from_pretrained(FOLDER)(text)["input_ids"] == ids


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_adds_exactly_one_token_to_the_prompt(tokenizer: Tokenizer, choice: str) -> None:
    prompt = prompt_of({"text": "Is it good? Yes:"})
    before, after = tokenizer.encode(prompt).ids, tokenizer.encode(f"{prompt} {choice}").ids
    assert after[:-1] == before
    assert tokenizer.id_to_token(after[-1]) == f"Ġ{choice}"


def test_sample_is_500_different_reviews_of_both_labels(sample: list[dict[str, str]]) -> None:
    assert len(sample) == 500
    assert all(set(row) == {"id", "text", "label"} for row in sample)
    assert all(row["id"].startswith("movie-") for row in sample)
    assert len({row["id"] for row in sample}) == len({row["text"] for row in sample}) == 500
    assert 0.45 <= sum(row["label"] == "positive" for row in sample) / 500 <= 0.55


def test_every_sample_row_fits_the_positions(tokenizer: Tokenizer, sample: list[dict[str, str]]) -> None:
    positions = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    assert max(len(tokenizer.encode(f"{prompt_of(row)} positive").ids) for row in sample) <= positions


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_labels_the_sample_well_under_transformers(
    tokenizer: Tokenizer, sample: list[dict[str, str]], dtype: torch.dtype
) -> None:
    model = OPTForCausalLM.from_pretrained(FOLDER, dtype=dtype).eval()
    answers = [tokenizer.token_to_id(f"Ġ{choice}") for choice in CHOICES]
    right = 0
    for start in range(0, len(sample), 50):
        rows = sample[start : start + 50]
        encoded = [tokenizer.encode(prompt_of(row)).ids for row in rows]
        width = max(map(len, encoded))
        ids = torch.tensor([tokens + [PAD] * (width - len(tokens)) for tokens in encoded])
        mask = torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for tokens in encoded])
        last = torch.tensor([len(tokens) - 1 for tokens in encoded])
        hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state[torch.arange(len(rows)), last]
        found = model.lm_head(hidden).float().log_softmax(-1)[:, answers].argmax(-1)
        right += sum(CHOICES[index] == row["label"] for index, row in zip(found.tolist(), rows, strict=True))
    assert right / len(sample) >= 0.74
