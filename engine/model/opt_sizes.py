"""What an OPT ``config.json`` says of sizes: all that planning needs. No torch.

Shapes: see ``engine.model.family``; F is the width of the feed-forward block, E that of the word embedding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import CheckpointError
from engine.model.family import EMBED, HEAD, Config, TensorSpec, UnitSpec, layer_name
from engine.model.fields import activation_name, bos_token_id, eos_token_ids, layer_count, positive
from engine.shape import ModelShape

POSITION_OFFSET = 2
"""OPT's learned positions start at row 2: fairseq kept the first rows for padding."""


def sizes(config: Config) -> "OPTSizes":
    """The sizes of a Hugging Face ``config.json``, for ``engine.model.registry``.

    Raises:
        CheckpointError: a value that is out of range.
    """
    return OPTSizes.from_config(config)


def plain_config(
    hidden_size: int, head_size: int, num_layers: int, vocab_size: int = 50272, max_positions: int = 2048
) -> Config:
    """The configuration of a model like most of them: feed-forward blocks of four times the width."""
    return {
        "model_type": "opt",
        "num_hidden_layers": num_layers,
        "hidden_size": hidden_size,
        "word_embed_proj_dim": hidden_size,
        "ffn_dim": 4 * hidden_size,
        "num_attention_heads": hidden_size // head_size,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_positions,
    }


KNOWN: Mapping[str, Config] = {
    "facebook/opt-125m": plain_config(768, 64, 12),
    "facebook/opt-350m": {
        **plain_config(1024, 64, 24), "word_embed_proj_dim": 512, "do_layer_norm_before": False,
    },
    "facebook/opt-1.3b": plain_config(2048, 64, 24),
    "facebook/opt-2.7b": plain_config(2560, 80, 32),
    "facebook/opt-6.7b": plain_config(4096, 128, 32),
    "facebook/opt-13b": plain_config(5120, 128, 40),
    "facebook/opt-30b": plain_config(7168, 128, 48),
    "facebook/opt-66b": plain_config(9216, 128, 64),
    "facebook/opt-175b": plain_config(12288, 128, 96),
}  # fmt: skip
"""From ``config.json`` of facebook/opt-* on the Hugging Face hub; OPT-175B, whose weights are not there, from the paper
(Zhang et al. 2022, table 1)."""


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
        activation_name(config, "activation_function", "relu")
        shape = shape_of(config)
        norm_before = bool(config.get("do_layer_norm_before", True))
        return OPTSizes(
            shape=shape,
            embed_size=positive(config, "word_embed_proj_dim", shape.hidden_size),
            norm_before=norm_before,
            final_norm=norm_before and not config.get("_remove_final_layer_norm", False),
            bias=bool(config.get("enable_bias", True)),
            norm_affine=bool(config.get("layer_norm_elementwise_affine", True)),
            tied=bool(config.get("tie_word_embeddings", True)),
        )

    def head_needs_embedding(self) -> bool:
        """Tied checkpoints multiply by the token table of the embedding unit."""
        return self.tied

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
    hidden_size = positive(config, "hidden_size", 768)
    num_heads = positive(config, "num_attention_heads", 12)
    ffn_size = positive(config, "ffn_dim", 3072)
    if hidden_size % num_heads:
        raise CheckpointError(
            f"config.json: hidden_size {hidden_size} is not divisible by num_attention_heads {num_heads}"
        )
    return ModelShape(
        num_layers=layer_count(config, 12),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=hidden_size // num_heads,
        ffn_size=ffn_size,
        vocab_size=positive(config, "vocab_size", 50272),
        max_positions=positive(config, "max_position_embeddings", 2048),
        bos_token_id=bos_token_id(config, 2),
        forces_bos=True,
        eos_token_ids=eos_token_ids(config, 2),
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
