"""Random OPT checkpoints with a tokenizer of their own, as Hugging Face folders, and their oracle."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import OPTConfig, OPTForCausalLM

from engine.weights.manifest import Manifest, UnitEntry

VOCABULARY = 512
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "ffn_dim": 128,
    "max_position_embeddings": 384,
    "word_embed_proj_dim": 64,
    "dropout": 0.0,
}
VARIANTS: dict[str, dict[str, object]] = {
    "125m-like": {},
    "350m-like": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "no-bias": {"enable_bias": False},
    "non-affine-norm": {"layer_norm_elementwise_affine": False},
    "gelu": {"activation_function": "gelu"},
    "untied": {"tie_word_embeddings": False},
    "odd-heads": {"num_attention_heads": 3, "hidden_size": 60, "word_embed_proj_dim": 60},
    "galactica-like": {
        "activation_function": "gelu",
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "tie_word_embeddings": False,
    },
    "no-final-norm": {"_remove_final_layer_norm": True},
}


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face folder and the model in it."""

    folder: Path
    model: OPTForCausalLM


def make_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer whose every id below the vocabulary has a text, with OPT's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*SPECIAL_TOKENS, *alphabet]
    names += [f"{a}{b}" for a in alphabet[:40] for b in alphabet[:40]][: VOCABULARY - len(names)]
    merges = [(name[0], name[1]) for name in names[len(SPECIAL_TOKENS) + len(alphabet) :]]
    tokenizer = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.save(str(folder / "tokenizer.json"))


def token_of(letter: str) -> int:
    """The token of an ASCII letter that the tokenizer joins with no other: a small one."""
    return len(SPECIAL_TOKENS) + sorted(pre_tokenizers.ByteLevel.alphabet()).index(letter)


def make_checkpoint(folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> Checkpoint:
    """Random weights, large enough in spread that greedy choices are not near ties."""
    torch.manual_seed(0)
    config = OPTConfig(**{**SMALL, "init_std": 0.1, **changes})
    model = OPTForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                # Biases and norms start as zeros and ones, and a swapped or forgotten one would not be seen.
                parameter.add_(torch.randn_like(parameter) * 0.1)
            assert parameter.isfinite().all(), name
    model = model.to(dtype)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return Checkpoint(folder, model)


def make_poisoned(folder: Path, letter: str, **changes: Any) -> None:
    """A checkpoint that gives no finite numbers for any sequence with this letter in it, and says the letter to nobody.

    The embedding that its logits come from is another one: otherwise no sequence at all would have any.
    """
    model = make_checkpoint(folder, tie_word_embeddings=False, **changes).model
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight[token_of(letter)] = math.nan
        model.lm_head.weight[token_of(letter)] = 0.0
    model.save_pretrained(folder)


def make_overflowing(folder: Path, **changes: Any) -> None:
    """A checkpoint whose weights have a value in float16 and whose last layer's output has none there."""
    model = make_checkpoint(folder, **changes).model
    with torch.no_grad():
        weight = model.model.decoder.layers[-1].fc2.weight
        weight *= 60_000 / weight.abs().max()
    model.save_pretrained(folder)


def unit_of(manifest: Manifest, name: str) -> UnitEntry:
    """What a manifest says of one unit."""
    return {unit.name: unit for unit in manifest.units}[name]
