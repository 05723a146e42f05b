"""What the engine knows of any model: an embedding, like layers, a head. One file a family implements it.

Shapes in this package: T tokens packed over sequences, D hidden size, N query heads, K key/value heads, H head size,
V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from engine.shape import ModelShape

if TYPE_CHECKING:
    from torch import Tensor

EMBED = "embed"
HEAD = "head"

Config = Mapping[str, Any]
"""A Hugging Face ``config.json``; in a model directory with its ``generation_config.json`` inside."""

NamedWeights = Mapping[str, "Tensor"]
"""The tensors of one unit (embedding, one layer, head) by the names of its ``UnitSpec``."""

Attend = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]
"""``(q_TNH, k_TKH, v_TKH) -> out_TNH``: stores the new keys and values, attends per segment."""


def layer_name(index: int) -> str:
    """The name of the unit that holds layer ``index``."""
    return f"layer.{index}"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One stored tensor of a unit and where a checkpoint keeps it."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    """Checkpoint tensor names, without a leading ``model.``; several are concatenated along dimension 0."""
    rows: tuple[int, ...] = ()
    """How many rows each source has, where they differ; their sum is ``shape[0]``."""

    def source_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape that each source must have."""
        if len(self.sources) == 1:
            return (self.shape,)
        rows = self.rows or (self.shape[0] // len(self.sources),) * len(self.sources)
        return tuple((count, *self.shape[1:]) for count in rows)


@dataclass(frozen=True, slots=True)
class UnitSpec:
    """The unit of placement and streaming: the embedding, one layer, or the head."""

    name: str
    tensors: tuple[TensorSpec, ...]


class Sizes(Protocol):
    """What a configuration of a model family says without torch."""

    @property
    def shape(self) -> ModelShape:
        """Sizes that planning, scheduling and the KV cache need."""

    def units(self) -> tuple[UnitSpec, ...]:
        """Embedding, layers in order, head. The embedding's first tensor is the token table."""

    def head_needs_embedding(self) -> bool:
        """Whether the head multiplies by the token table of the embedding unit (tied weights)."""


class Family(Sizes, Protocol):
    """One loaded configuration of a model family: pure functions of named weights."""

    def embed(self, weights: NamedWeights, token_ids_T: "Tensor", positions_T: "Tensor") -> "Tensor":
        """Hidden states ``[T, D]``."""

    def layer(self, weights: NamedWeights, hidden_TD: "Tensor", positions_T: "Tensor", attend: Attend) -> "Tensor":
        """One layer; ``hidden_TD`` may be overwritten. ``positions_T``: each token's place in its sequence, int64."""

    def head(self, weights: NamedWeights, embedding: NamedWeights | None, hidden_TD: "Tensor") -> "Tensor":
        """Float32 logits ``[T, V]``."""
