"""Llama (Touvron et al. 2023, arXiv:2302.13971) and its like as pure functions of named weights.

Llama, Mistral, Qwen2 and Qwen3: RMSNorm before each block, rotary positions, grouped queries, a gated feed-forward
block; with or without biases, norms of queries and keys, and a tied output embedding. Shapes: see
``engine.model.family``; h is half of the head size, F the width of the feed-forward block.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from math import tau
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.formats.linear import add_linear_, linear, logits, row_parts
from engine.model.activation_functions import ACTIVATION_FUNCTIONS
from engine.model.family import Config, Layer, NamedWeights
from engine.model.llama_sizes import LlamaSizes, Rope


def family(config: Config) -> "Llama":
    """The family of a Hugging Face ``config.json``, for ``engine.model.registry``.

    Raises:
        CheckpointError: a value that is out of range or not supported.
    """
    return Llama.from_config(config)


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama(LlamaSizes):
    """One configuration of Llama's family; implements ``engine.model.family.Family``."""

    activation: Callable[[Tensor], Tensor]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Llama":
        """Read a Hugging Face ``config.json``.

        Raises:
            CheckpointError: a value that is out of range or not supported.
        """
        sizes = LlamaSizes.from_config(config)
        values = {field.name: getattr(sizes, field.name) for field in fields(sizes)}
        return cls(**values, activation=ACTIVATION_FUNCTIONS[config.get("hidden_act", "silu")])

    def embed(self, weights: NamedWeights, token_ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """Tokens alone, ``[T, D]``; positions come in with the queries and keys of each layer."""
        del positions_T
        return F.embedding(token_ids_T, weights["tokens.weight"])

    def prepare(self, positions_T: Tensor, dtype: torch.dtype) -> Tensor:
        """Cosines and sines of the rotary angles: see ``waves``."""
        return waves(positions_T, self.rope, self.shape.head_size, dtype)

    def layer(self, weights: NamedWeights, hidden_TD: Tensor, prepared: Tensor) -> Layer:
        """Attention and feed-forward block, each with its residual; ``hidden_TD`` is overwritten."""
        attended = yield self._qkv(weights, self._norm(weights, "attention_norm", hidden_TD), prepared)
        add_linear_(hidden_TD, attended.pop().flatten(1), weights["out.weight"], weights.get("out.bias"))
        x_TD = self._norm(weights, "ffn_norm", hidden_TD)
        parts = row_parts(x_TD, 2 * self.shape.ffn_size)
        for rows_RD, x_RD in zip(torch.chunk(hidden_TD, parts), torch.chunk(x_TD, parts), strict=True):
            add_linear_(rows_RD, self._gated(weights, x_RD), weights["down.weight"], weights.get("down.bias"))
        return hidden_TD

    def _gated(self, weights: NamedWeights, x_RD: Tensor) -> Tensor:
        gate_RF, up_RF = linear(x_RD, weights["gate_up.weight"], weights.get("gate_up.bias")).chunk(2, dim=-1)
        return self.activation(gate_RF).mul_(up_RF)

    def _qkv(self, weights: NamedWeights, x_TD: Tensor, waves_2T1H: Tensor) -> Tensor:
        """Queries, keys and values, a head after the other, ``[T, N + 2 K, H]``; those turned that have positions."""
        num_heads, num_kv_heads = self.shape.num_heads, self.shape.num_kv_heads
        qkv = linear(x_TD, weights["qkv.weight"], weights.get("qkv.bias")).view(len(x_TD), -1, self.shape.head_size)
        if self.norms_heads:
            q_TNH, k_TKH = qkv[:, :num_heads], qkv[:, num_heads:-num_kv_heads]
            q_TNH.copy_(self._norm(weights, "q_norm", q_TNH))
            k_TKH.copy_(self._norm(weights, "k_norm", k_TKH))
        turn_(qkv[:, :-num_kv_heads], waves_2T1H)
        return qkv

    def head(self, weights: NamedWeights, embedding: NamedWeights | None, hidden_TD: Tensor) -> Tensor:
        """Final norm and token table; float32 logits ``[T, V]``."""
        hidden_TD = self._norm(weights, "norm", hidden_TD)
        table = weights["logits.weight"] if embedding is None else embedding["tokens.weight"]
        return logits(hidden_TD, table)

    def _norm(self, weights: NamedWeights, name: str, x: Tensor) -> Tensor:
        """RMSNorm over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467), computed in float32."""
        return F.rms_norm(x, x.shape[-1:], eps=self.norm_eps).mul_(weights[f"{name}.weight"])


def frequencies(rope: Rope, head_size: int, device: torch.device) -> Tensor:
    """The angle by which one position turns each pair of values, float32 ``[h]``.

    Computed where it is needed: it is small, and a copy from the host would wait for it.
    """
    places_h = torch.arange(0, head_size, 2, dtype=torch.float32, device=device)
    turns_h = 1.0 / (rope.theta ** (places_h / head_size))
    if rope.low_freq_factor is None:
        return turns_h / rope.factor
    # How often each turns over the positions of the training tells how much of it is kept as it is.
    often_h = turns_h * (rope.original_positions / tau)
    kept_h = (often_h - rope.low_freq_factor).div_(rope.high_freq_factor - rope.low_freq_factor).clamp_(0, 1)
    return turns_h * kept_h + turns_h / rope.factor * (1 - kept_h)


def waves(positions_T: Tensor, rope: Rope, head_size: int, dtype: torch.dtype) -> Tensor:
    """Cosine and sine of each position's angles, ``[2, T, 1, H]``, the first half of the sines negative: for ``turn_``.

    Angles are float32; their cosine and sine, and the products with them, have the values' type, as in transformers.
    """
    angles_Th = positions_T[:, None] * frequencies(rope, head_size, positions_T.device)
    cos_Th, sin_Th = angles_Th.cos(), angles_Th.sin()
    halves = torch.stack((torch.cat((cos_Th, cos_Th), -1), torch.cat((-sin_Th, sin_Th), -1)))
    return halves.to(dtype)[:, :, None]


def turn_(x_TNH: Tensor, waves_2T1H: Tensor) -> None:
    """Turns each head's pairs of values, ``(i, i + h)``, by their positions' angles, in place."""
    cos_T1H, sin_T1H = waves_2T1H
    first_TNh, second_TNh = x_TNH.chunk(2, dim=-1)
    turned_TNH = torch.cat((second_TNh, first_TNh), -1).mul_(sin_T1H)
    x_TNH.mul_(cos_T1H).add_(turned_TNH)
