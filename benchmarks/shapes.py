"""The model shapes that are timed, and their arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.model.registry import family_for
from engine.shape import ModelShape

BOS, PAD = 2, 1
NUM_SPECIAL = 4
"""Token ids below this one are special; prompts use none of them but the BOS."""

_SIZES = {
    # layers, hidden size, heads, vocabulary, positions
    "opt-125m": (12, 768, 12, 50272, 2048),
    "opt-1.3b": (24, 2048, 32, 50272, 2048),
    "opt-6.7b": (32, 4096, 32, 50272, 2048),
    "opt-13b": (40, 5120, 40, 50272, 2048),
    "opt-30b": (48, 7168, 56, 50272, 2048),
    "tiny": (3, 64, 4, 512, 256),
}
SHAPES = tuple(name for name in _SIZES if name != "tiny")
"""What is worth timing; ``tiny`` exists for tests and for comparing tokens."""


def config_of(name: str, dtype: str) -> dict[str, Any]:
    """The Hugging Face ``config.json`` of a shape.

    Raises:
        ValueError: no such shape.
    """
    if name not in _SIZES:
        raise ValueError(f"{name!r} is not a shape; take one of {', '.join(SHAPES)}")
    num_layers, hidden, heads, vocabulary, positions = _SIZES[name]
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "num_hidden_layers": num_layers,
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "tie_word_embeddings": True,
        "dropout": 0.0,
        "bos_token_id": BOS,
        "eos_token_id": BOS,
        "pad_token_id": PAD,
        "torch_dtype": dtype,
    }


def shape_of(name: str) -> ModelShape:
    """The engine's view of a shape."""
    return family_for(config_of(name, "bfloat16")).shape


@dataclass(frozen=True, slots=True)
class Flops:
    """Floating-point operations that no system can leave out: a multiplication and an addition a weight and token,
    causal attention over what is there, and logits where a token is chosen or scored."""

    per_token: float
    """Products with the weights of all layers, for one token."""
    per_row: float
    """Logits of one row."""
    per_pair: float
    """Attention of one token to one token, over all layers."""

    @classmethod
    def of(cls, shape: ModelShape) -> "Flops":
        """The operations of a model with as many key/value heads as query heads."""
        return cls(
            per_token=2.0 * shape.num_layers * sum(out * into for out, into in layer_products(shape)),
            per_row=2.0 * shape.vocab_size * shape.hidden_size,
            per_pair=4.0 * shape.num_layers * shape.hidden_size,
        )


def layer_products(shape: ModelShape) -> tuple[tuple[int, int], ...]:
    """The matrices (outputs, inputs) that a layer multiplies by: q, k and v as one, the output, both of the block."""
    hidden, ffn = shape.hidden_size, shape.ffn_size
    return ((3 * hidden, hidden), (hidden, hidden), (ffn, hidden), (hidden, ffn))


def describe(name: str) -> Mapping[str, int]:
    """Sizes for the report."""
    shape = shape_of(name)
    return {"layers": shape.num_layers, "hidden": shape.hidden_size, "heads": shape.num_heads}
