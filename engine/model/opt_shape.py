"""What an OPT ``config.json`` says of sizes: all that planning needs. No torch."""

from collections.abc import Mapping
from typing import Any

from engine.errors import CheckpointError
from engine.model.family import ModelShape


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """Read a Hugging Face ``config.json``; absent fields have ``OPTConfig``'s defaults.

    Raises:
        CheckpointError: a value that is out of range.
    """

    def positive(name: str, default: int) -> int:
        value = config.get(name, default)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"config.json: {name} must be a positive integer, not {value!r}")
        return value

    hidden_size = positive("hidden_size", 768)
    num_heads = positive("num_attention_heads", 12)
    ffn_size = positive("ffn_dim", 3072)
    if hidden_size % num_heads:
        raise CheckpointError(
            f"config.json: hidden_size {hidden_size} is not divisible by num_attention_heads {num_heads}"
        )
    eos = config.get("eos_token_id", 2)
    return ModelShape(
        num_layers=positive("num_hidden_layers", 12),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=hidden_size // num_heads,
        ffn_size=ffn_size,
        vocab_size=positive("vocab_size", 50272),
        max_positions=positive("max_position_embeddings", 2048),
        bos_token_id=config.get("bos_token_id", 2),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        workspace_values=workspace_values(hidden_size, ffn_size),
    )


def workspace_values(hidden_size: int, ffn_size: int) -> int:
    """Values of a token at the widest moment inside a layer: residual, its norm, then q, k, v and their outputs, or the
    feed-forward block before and after activation."""
    return 2 * hidden_size + max(6 * hidden_size, 2 * ffn_size + hidden_size)
