"""Random checkpoints of Llama's family, as Hugging Face folders, and their oracle."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.engine.checkpoints import VOCABULARY, make_tokenizer

CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "sliding_window": None,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # wide, so that attention tells tokens apart
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 5e5}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama, a key head a query head": {"num_key_value_heads": 4},
    "llama, grouped queries": {},
    "llama, one key head, another activation": {
        "num_key_value_heads": 1, "hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-2,
    },
    "llama, three heads, tied": {
        "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 72, "tie_word_embeddings": True,
    },
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, llama3 positions": {
        "head_dim": 32, "rope_parameters": {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
    },
    "llama, linear positions": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}},
    "mistral": {"head_dim": 16, "sliding_window": 256},  # no sequence gets so long that it would slide
    "qwen2, tied": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "qwen3, biases, tied": {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True},
}  # fmt: skip


def make_checkpoint(folder: Path, variant: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """Writes a checkpoint with random weights, and gives the model back."""
    torch.manual_seed(1)
    config_class, model_class = CLASSES[variant.partition(",")[0]]
    model = model_class(config_class(**{**SMALL, **VARIANTS[variant], **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                # Biases and norms start as zeros and ones, and a swapped or forgotten one would not be seen.
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model = model.to(dtype)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return model


class Oracle:
    """What transformers' class says of token ids."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.logprobs = cache(self._logprobs)

    @torch.no_grad()
    def _logprobs(self, token_ids: tuple[int, ...]) -> torch.Tensor:
        """Log-probabilities of every token after each of ``token_ids``, ``[T, V]``."""
        return self.model(torch.tensor([token_ids])).logits[0].float().log_softmax(-1)
