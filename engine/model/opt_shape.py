"""What an OPT ``config.json`` says of sizes: all that planning needs. No torch.

Shapes: see ``engine.model.family``; F is the width of the feed-forward block, E that of the word embedding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import CheckpointError
from engine.model.family import EMBED, HEAD, ModelShape, TensorSpec, UnitSpec, layer_name

POSITION_OFFSET = 2
"""OPT's learned positions start at row 2: fairseq kept the first rows for padding."""


@dataclass(frozen=True, slots=True)
class OPTSizes:
    """Which tensors a configuration has, and how large they are."""

    shape: ModelShape
    embed_size: int
    """Width of the token table."""
    norm_before: bool
    final_norm: bool
    bias: bool
    norm_affine: bool
    tied: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "OPTSizes":
        """Read a Hugging Face ``config.json``; absent fields have ``OPTConfig``'s defaults.

        Raises:
            CheckpointError: a value that is out of range.
        """
        shape = shape_of(config)
        norm_before = bool(config.get("do_layer_norm_before", True))
        return OPTSizes(
            shape=shape,
            embed_size=config.get("word_embed_proj_dim") or shape.hidden_size,
            norm_before=norm_before,
            final_norm=norm_before and not config.get("_remove_final_layer_norm", False),
            bias=bool(config.get("enable_bias", True)),
            norm_affine=bool(config.get("layer_norm_elementwise_affine", True)),
            tied=bool(config.get("tie_word_embeddings", True)),
        )

    def units(self) -> tuple[UnitSpec, ...]:
        """Embedding, layers in order, head."""
        size, positions = self.shape.hidden_size, self.shape.max_positions + POSITION_OFFSET
        decoder = "decoder"
        embed = [
            TensorSpec("tokens.weight", (self.shape.vocab_size, self.embed_size), (f"{decoder}.embed_tokens.weight",)),
            TensorSpec("positions.weight", (positions, size), (f"{decoder}.embed_positions.weight",)),
        ]
        head = self._norm_specs("norm", f"{decoder}.final_layer_norm") if self.final_norm else []
        if self.embed_size != size:
            embed += _linear_specs("project_in", (f"{decoder}.project_in",), size, self.embed_size, bias=False)
            head += _linear_specs("project_out", (f"{decoder}.project_out",), self.embed_size, size, bias=False)
        if not self.tied:
            head += _linear_specs("logits", ("lm_head",), self.shape.vocab_size, self.embed_size, bias=False)
        layers = [
            UnitSpec(layer_name(index), tuple(self._layer_specs(f"{decoder}.layers.{index}")))
            for index in range(self.shape.num_layers)
        ]
        return (UnitSpec(EMBED, tuple(embed)), *layers, UnitSpec(HEAD, tuple(head)))

    def _norm_specs(self, name: str, source: str) -> list[TensorSpec]:
        if not self.norm_affine:
            return []
        size = (self.shape.hidden_size,)
        return [TensorSpec(f"{name}.{part}", size, (f"{source}.{part}",)) for part in ("weight", "bias")]

    def _layer_specs(self, source: str) -> list[TensorSpec]:
        size, ffn_size = self.shape.hidden_size, self.shape.ffn_size
        attention = f"{source}.self_attn"
        projections = tuple(f"{attention}.{name}_proj" for name in "qkv")
        return [
            *self._norm_specs("attention_norm", f"{source}.self_attn_layer_norm"),
            *_linear_specs("qkv", projections, 3 * size, size, self.bias),
            *_linear_specs("out", (f"{attention}.out_proj",), size, size, self.bias),
            *self._norm_specs("ffn_norm", f"{source}.final_layer_norm"),
            *_linear_specs("fc1", (f"{source}.fc1",), ffn_size, size, self.bias),
            *_linear_specs("fc2", (f"{source}.fc2",), size, ffn_size, self.bias),
        ]


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


def _linear_specs(name: str, sources: tuple[str, ...], out_size: int, in_size: int, bias: bool) -> list[TensorSpec]:
    specs = [TensorSpec(f"{name}.weight", (out_size, in_size), tuple(f"{source}.weight" for source in sources))]
    if bias:
        specs.append(TensorSpec(f"{name}.bias", (out_size,), tuple(f"{source}.bias" for source in sources)))
    return specs
