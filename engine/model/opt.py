"""OPT (Zhang et al. 2022, arXiv:2205.01068) as pure functions of named weights.

Every variant of Hugging Face's ``OPTConfig``: layer norm before or after the blocks, a projected embedding, no biases,
norms without parameters, other activations, tied or untied output embedding. Shapes: see ``engine.model.family``;
F is the width of the feed-forward block, E that of the word embedding.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.formats.linear import linear, logits, row_parts
from engine.model.activation_functions import ACTIVATION_FUNCTIONS
from engine.model.family import Config, Layer, NamedWeights
from engine.model.opt_sizes import POSITION_OFFSET, OPTSizes


def family(config: Config) -> "OPT":
    """The family of a Hugging Face ``config.json``, for ``engine.model.registry``.

    Raises:
        CheckpointError: a value that is out of range or not supported.
    """
    return OPT.from_config(config)


@dataclass(frozen=True, slots=True)
class OPT(OPTSizes):
    """One configuration of OPT; implements ``engine.model.family.Family``."""

    activation: Callable[[Tensor], Tensor]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "OPT":
        """Read a Hugging Face ``config.json``; absent fields have ``OPTConfig``'s defaults.

        Raises:
            CheckpointError: a value that is out of range or not supported.
        """
        sizes = OPTSizes.from_config(config)
        values = {field.name: getattr(sizes, field.name) for field in fields(sizes)}
        return cls(**values, activation=ACTIVATION_FUNCTIONS[config.get("activation_function", "relu")])

    def embed(self, weights: NamedWeights, token_ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """Token plus learned position, ``[T, D]``."""
        hidden_TE = F.embedding(token_ids_T, weights["tokens.weight"])
        if "project_in.weight" in weights:
            hidden_TE = F.linear(hidden_TE, weights["project_in.weight"])
        return hidden_TE + F.embedding(positions_T + POSITION_OFFSET, weights["positions.weight"])

    def prepare(self, positions_T: Tensor, dtype: torch.dtype) -> Tensor:
        """Nothing: positions are part of the embedding."""
        del dtype
        return positions_T

    def layer(self, weights: NamedWeights, hidden_TD: Tensor, prepared: Tensor) -> Layer:
        """Attention and feed-forward block, each with its residual; ``hidden_TD`` is overwritten."""
        del prepared
        x_TD = self._norm(weights, "attention_norm", hidden_TD) if self.norm_before else hidden_TD
        attended = yield self._qkv(weights, x_TD)
        hidden_TD = hidden_TD.add_(linear(attended.pop().flatten(1), weights["out.weight"], weights.get("out.bias")))
        if not self.norm_before:
            hidden_TD = self._norm(weights, "attention_norm", hidden_TD)
        x_TD = self._norm(weights, "ffn_norm", hidden_TD) if self.norm_before else hidden_TD
        parts = row_parts(x_TD, self.shape.ffn_size)
        for rows_RD, x_RD in zip(torch.chunk(hidden_TD, parts), torch.chunk(x_TD, parts), strict=True):
            rows_RD.add_(self._feed_forward(weights, x_RD))
        return hidden_TD if self.norm_before else self._norm(weights, "ffn_norm", hidden_TD)

    def _qkv(self, weights: NamedWeights, x_TD: Tensor) -> Tensor:
        """Queries, keys and values, a head after the other, ``[T, 3 N, H]``."""
        return linear(x_TD, weights["qkv.weight"], weights.get("qkv.bias")).view(len(x_TD), -1, self.shape.head_size)

    def _feed_forward(self, weights: NamedWeights, x_RD: Tensor) -> Tensor:
        fuses = self.activation is torch.relu_
        x_RF = linear(x_RD, weights["fc1.weight"], weights.get("fc1.bias"), relu=fuses)
        return linear(x_RF if fuses else self.activation(x_RF), weights["fc2.weight"], weights.get("fc2.bias"))

    def _norm(self, weights: NamedWeights, name: str, x_TD: Tensor) -> Tensor:
        size = (self.shape.hidden_size,)
        return F.layer_norm(x_TD, size, weights.get(f"{name}.weight"), weights.get(f"{name}.bias"))

    def head(self, weights: NamedWeights, embedding: NamedWeights | None, hidden_TD: Tensor) -> Tensor:
        """Final norm, projection and token table; float32 logits ``[T, V]``."""
        if self.final_norm:
            hidden_TD = self._norm(weights, "norm", hidden_TD)
        if "project_out.weight" in weights:
            hidden_TD = F.linear(hidden_TD, weights["project_out.weight"])
        table = weights["logits.weight"] if embedding is None else embedding["tokens.weight"]
        return logits(hidden_TD, table)
