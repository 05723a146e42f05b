"""What everything above needs to know of a model, whatever its family. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What planning, scheduling and the KV cache need to know of a model."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    ffn_size: int
    vocab_size: int
    max_positions: int
    """Tokens a sequence may hold, prompt and output together."""
    bos_token_id: int | None
    forces_bos: bool = False
    """Whether every text begins with BOS, also where the tokenizer's own rule does not put it there."""
    eos_token_ids: tuple[int, ...]
    turns_keys: bool = False
    """Whether keys are turned by their positions (rotary positions): pairs of values of a head change with them."""
    workspace_values: int
    """Values a token holds at the widest moment inside a layer; the workspace is sized by it."""
