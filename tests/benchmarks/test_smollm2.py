"""SmolLM2 out of its GGUF file: what can be told without the file."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.smollm2 import hf_name, in_halves, tokenizer
from engine.model.llama import turn_, waves
from engine.model.llama_sizes import Rope

TENSORS = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"]


@given(heads=st.integers(1, 4), half=st.integers(1, 5), position=st.integers(0, 900), seed=st.integers(0, 999))
def test_rows_in_halves_are_turned_as_llama_cpp_turns_neighbours(
    heads: int, half: int, position: int, seed: int
) -> None:
    rows = np.random.default_rng(seed).standard_normal(heads * 2 * half, dtype=np.float32)
    pairs = rows.reshape(heads, half, 2)
    angles = position * 1e5 ** (-np.arange(half) / half)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
    neighbours = np.stack((turned.real, turned.imag), -1).reshape(-1).astype(np.float32)
    ours = torch.from_numpy(in_halves(rows, heads).copy()).view(1, heads, 2 * half)
    turn_(ours, waves(torch.tensor([position]), Rope(theta=1e5), 2 * half, torch.float32))
    np.testing.assert_allclose(ours.flatten().numpy(), in_halves(neighbours, heads), atol=1e-3)


def test_whole_rows_move_and_heads_stay_apart() -> None:
    rows = np.arange(2 * 4 * 3, dtype=np.float32).reshape(8, 3)
    assert in_halves(rows, 2)[:, 0].tolist() == [3.0 * row for row in (0, 2, 1, 3, 4, 6, 5, 7)]


def test_every_tensor_has_the_name_that_llama_has_for_it() -> None:
    names = ["token_embd.weight", "output_norm.weight"]
    names += [f"blk.{layer}.{tensor}.weight" for layer in range(3) for tensor in TENSORS]
    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 8}
    model = LlamaForCausalLM(LlamaConfig(**small, num_hidden_layers=3, tie_word_embeddings=True))
    assert sorted(map(hf_name, names)) == sorted(name for name, _ in model.named_parameters())


def test_digits_are_alone_and_special_tokens_are_not_cut() -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["1 2", "a b", "Ġ ab"]
    tokens = ["<|end|>", *letters, *(merge.replace(" ", "") for merge in merges)]
    found = tokenizer(tokens, merges, [3] + [1] * (len(tokens) - 1))
    assert found.encode("ab ab12<|end|>").tokens == ["ab", "Ġab", "1", "2", "<|end|>"]
    text = "né  12\n\tab"
    assert found.decode(found.encode(text).ids) == text
