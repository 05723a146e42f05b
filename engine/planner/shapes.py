"""The shapes of well-known models, so that planning one needs none of its weights. No torch.

Sources: the ``config.json`` of facebook/opt-* on the Hugging Face hub; OPT-175B, whose weights are not there, from the
paper (Zhang et al. 2022, table 1).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.dtypes import DType
from engine.model.family import EMBED, HEAD, ModelShape, layer_name
from engine.model.opt_shape import workspace_values
from engine.units import align_up
from engine.weights.manifest import PAGE_BYTES, TENSOR_ALIGNMENT
from engine.weights.stored import StoredWeights

_VOCABULARY = 50272
_POSITIONS = 2048
_POSITION_OFFSET = 2


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model by name."""

    name: str
    shape: ModelShape
    embed_size: int
    """Width of the token table; narrower than the hidden size in OPT-350M only."""
    norm_before: bool
    """Layer norms stand before attention and feed-forward, and one after the last layer."""

    def stored(self, dtype: DType = DType.FLOAT16) -> StoredWeights:
        """Bytes of each unit, as ``overnight import --dtype`` would store them."""
        shape = self.shape
        size, ffn = shape.hidden_size, shape.ffn_size
        projection = [self.embed_size * size] if self.embed_size != size else []
        norm = [size, size]
        embed = [shape.vocab_size * self.embed_size, (shape.max_positions + _POSITION_OFFSET) * size, *projection]
        attention = [3 * size * size, 3 * size, size * size, size]
        layer = [*norm, *attention, *norm, size * ffn, ffn, ffn * size, size]
        head = [*(norm if self.norm_before else ()), *projection]
        units = {EMBED: _unit_bytes(embed, dtype), HEAD: _unit_bytes(head, dtype)}
        layer_bytes = _unit_bytes(layer, dtype)
        return StoredWeights(dtype, units | {layer_name(index): layer_bytes for index in range(shape.num_layers)})


def _unit_bytes(tensor_values: Sequence[int], dtype: DType) -> int:
    """Size of a unit's file: its tensors one after the other, each aligned, and the whole in pages."""
    end = 0
    for values in tensor_values:
        end = align_up(end, TENSOR_ALIGNMENT) + values * dtype.num_bytes
    return max(PAGE_BYTES, align_up(end, PAGE_BYTES))


def _opt(
    name: str, layers: int, size: int, heads: int, *, embed: int | None = None, norm_before: bool = True
) -> KnownModel:
    ffn = 4 * size
    shape = ModelShape(
        num_layers=layers,
        hidden_size=size,
        num_heads=heads,
        num_kv_heads=heads,
        head_size=size // heads,
        ffn_size=ffn,
        vocab_size=_VOCABULARY,
        max_positions=_POSITIONS,
        bos_token_id=2,
        eos_token_ids=(2,),
        workspace_values=workspace_values(size, ffn),
    )
    return KnownModel(name, shape, embed or size, norm_before)


KNOWN_MODELS = {
    model.name: model
    for model in (
        _opt("facebook/opt-125m", 12, 768, 12),
        _opt("facebook/opt-350m", 24, 1024, 16, embed=512, norm_before=False),
        _opt("facebook/opt-1.3b", 24, 2048, 32),
        _opt("facebook/opt-2.7b", 32, 2560, 32),
        _opt("facebook/opt-6.7b", 32, 4096, 32),
        _opt("facebook/opt-13b", 40, 5120, 40),
        _opt("facebook/opt-30b", 48, 7168, 56),
        _opt("facebook/opt-66b", 64, 9216, 72),
        _opt("facebook/opt-175b", 96, 12288, 96),
    )
}


def known_model(name: str) -> KnownModel | None:
    """By its hub name, with or without the organisation; ``None``: not a model whose shape is built in."""
    name = name.lower()
    return KNOWN_MODELS.get(name if "/" in name else f"facebook/{name}")
