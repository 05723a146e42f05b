"""What the engine knows of any model: an embedding, like layers, a head. One file a family implements it.

Shapes in this package: T tokens packed over sequences, D hidden size, N query heads, K key/value heads, H head size,
V vocabulary.
"""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from engine.shape import ModelShape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EMBED = "embed"
HEAD = "head"
TABLES = ("tokens.weight", "logits.weight")
"""The tensors with a row for each token of the vocabulary: of the embedding, and of a head that is not tied to it."""

Config = Mapping[str, Any]
"""A Hugging Face ``config.json``; in a model directory with its ``generation_config.json`` inside."""

NamedWeights = Mapping[str, "Tensor"]
"""The tensors of one unit (embedding, one layer, head) by the names of its ``UnitSpec``."""

Layer = Generator["Tensor", list["Tensor"], "Tensor"]
"""A layer at work, which pauses once, where its tokens attend to others: it yields ``qkv [T, N + 2 K, H]``, is sent
what came of it, and returns the hidden states. Whoever drives it may compute something else meanwhile.

What it is sent is a list of one, ``[T, N, H]``, which it empties: so nobody else keeps the memory."""

Attend = Callable[["Tensor"], "Tensor"]
"""``qkv [T, N + 2 K, H] -> out [T, N, H]``: stores the new keys and values, attends per segment."""


def run_layer(layer: Layer, attend: Attend) -> "Tensor":
    """Hidden states after a layer that waits for its attention at once."""
    return resume_layer(layer, [attend(next(layer))])


def resume_layer(layer: Layer, attended: list["Tensor"]) -> "Tensor":
    """Hidden states after a layer that was paused, given what came of its attention."""
    try:
        layer.send(attended)
    except StopIteration as end:
        hidden_TD: Tensor = end.value
        return hidden_TD
    raise AssertionError("a layer pauses once")


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

    def prepare(self, positions_T: "Tensor", dtype: "torch.dtype") -> "Tensor":
        """What every layer needs of the tokens' places in their sequences (int64), made once a micro-batch."""

    def layer(self, weights: NamedWeights, hidden_TD: "Tensor", prepared: "Tensor") -> Layer:
        """One layer; ``hidden_TD`` may be overwritten. ``prepared``: by ``prepare``, of these tokens."""

    def head(self, weights: NamedWeights, embedding: NamedWeights | None, hidden_TD: "Tensor") -> "Tensor":
        """Float32 logits ``[T, V]``."""
