"""What a ``config.json`` of Llama's family says of sizes: Llama, Mistral, Qwen2, Qwen3 and their like. No torch.

Shapes: see ``engine.model.family``; F is the width of the feed-forward block.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from engine.errors import CheckpointError
from engine.model.family import EMBED, HEAD, Config, TensorSpec, UnitSpec, layer_name
from engine.model.fields import activation_name, bos_token_id, eos_token_ids, layer_count, number, positive
from engine.shape import ModelShape

LLAMA, MISTRAL, QWEN2, QWEN3 = "llama", "mistral", "qwen2", "qwen3"
_ROPE_TYPES = ("default", "linear", "llama3")


def sizes(config: Config) -> "LlamaSizes":
    """The sizes of a Hugging Face ``config.json``, for ``engine.model.registry``.

    Raises:
        CheckpointError: a value that is out of range or not supported.
    """
    return LlamaSizes.from_config(config)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864): by which angle a position turns each pair of values."""

    theta: float = 10000.0
    factor: float = 1.0
    """By how much positions were stretched to reach further than those of the training."""
    low_freq_factor: float | None = None
    """None: all frequencies are divided by ``factor``. Else, as Llama 3.1 does, those that turn less often than this
    over the original positions; those that turn more often than ``high_freq_factor`` stay, those between are mixed."""
    high_freq_factor: float = 1.0
    original_positions: float = 1.0

    @classmethod
    def from_config(cls, config: Config) -> "Rope":
        """Read either spelling: ``rope_parameters``, or before it ``rope_theta`` and ``rope_scaling``.

        Raises:
            CheckpointError: a kind of rotary positions that is not supported, or a value that is out of range.
        """
        field = "rope_scaling" if config.get("rope_parameters") is None else "rope_parameters"
        values = config.get(field) or {}
        if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
            raise CheckpointError(f"config.json: {field} must be one set of values for all layers, not {values!r:.80}")
        kind = values.get("rope_type", values.get("type", "default"))
        if kind not in _ROPE_TYPES:
            raise CheckpointError(
                f"config.json: {field}.rope_type {kind!r:.40} is not supported; supported are {', '.join(_ROPE_TYPES)}"
            )
        for whole in (config, values):
            if whole.get("partial_rotary_factor") not in (None, 1):
                raise CheckpointError("config.json: partial_rotary_factor must be 1; turning a part is not supported")
        where = f"{field}."
        theta = number({**config, **values}, "rope_theta", 10000.0)
        if kind == "default":
            return cls(theta=theta)
        factor = number(values, "factor", where=where)
        if kind == "linear":
            return cls(theta=theta, factor=factor)
        low, high = (number(values, f"{name}_freq_factor", where=where) for name in ("low", "high"))
        if low >= high:
            raise CheckpointError(f"config.json: {where}low_freq_factor must be less than high_freq_factor")
        original = number(values, "original_max_position_embeddings", where=where)
        return cls(theta=theta, factor=factor, low_freq_factor=low, high_freq_factor=high, original_positions=original)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaSizes:
    """Which tensors a configuration has, how large they are, and the numbers to compute with."""

    shape: ModelShape
    tied: bool
    qkv_bias: bool
    out_bias: bool
    ffn_bias: bool
    norms_heads: bool
    """Whether each head's query and key are normalised before they are turned."""
    norm_eps: float
    rope: Rope

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "LlamaSizes":
        """Read a Hugging Face ``config.json``.

        Raises:
            CheckpointError: a value that is out of range or not supported.
        """
        activation_name(config, "hidden_act", "silu")
        kind = config["model_type"]
        shape = _shape_of(config, kind)
        _check_window(config, kind, shape)
        attention_bias = kind in (LLAMA, QWEN3) and bool(config.get("attention_bias"))
        return LlamaSizes(
            shape=shape,
            tied=bool(config.get("tie_word_embeddings")),
            qkv_bias=attention_bias or kind == QWEN2,
            out_bias=attention_bias,
            ffn_bias=kind == LLAMA and bool(config.get("mlp_bias")),
            norms_heads=kind == QWEN3,
            norm_eps=number(config, "rms_norm_eps", 1e-6),
            rope=Rope.from_config(config),
        )

    def head_needs_embedding(self) -> bool:
        """Tied checkpoints multiply by the token table of the embedding unit."""
        return self.tied

    def units(self) -> tuple[UnitSpec, ...]:
        """Embedding, layers in order, head."""
        size, table = self.shape.hidden_size, (self.shape.vocab_size, self.shape.hidden_size)
        head = [TensorSpec("norm.weight", (size,), ("norm.weight",))]
        if not self.tied:
            head.append(TensorSpec("logits.weight", table, ("lm_head.weight",)))
        layers = [
            UnitSpec(layer_name(index), tuple(self._layer_specs(f"layers.{index}")))
            for index in range(self.shape.num_layers)
        ]
        embed = UnitSpec(EMBED, (TensorSpec("tokens.weight", table, ("embed_tokens.weight",)),))
        return (embed, *layers, UnitSpec(HEAD, tuple(head)))

    def _layer_specs(self, source: str) -> list[TensorSpec]:
        shape = self.shape
        size, ffn_size, head_size = shape.hidden_size, shape.ffn_size, shape.head_size
        q, kv = shape.num_heads * head_size, shape.num_kv_heads * head_size
        attention, mlp = f"{source}.self_attn", f"{source}.mlp"
        head_norms = [
            TensorSpec(f"{name}_norm.weight", (head_size,), (f"{attention}.{name}_norm.weight",))
            for name in "qk"
            if self.norms_heads
        ]
        return [
            TensorSpec("attention_norm.weight", (size,), (f"{source}.input_layernorm.weight",)),
            *_linear_specs("qkv", [f"{attention}.{name}_proj" for name in "qkv"], (q, kv, kv), size, self.qkv_bias),
            *head_norms,
            *_linear_specs("out", [f"{attention}.o_proj"], (size,), q, self.out_bias),
            TensorSpec("ffn_norm.weight", (size,), (f"{source}.post_attention_layernorm.weight",)),
            *_linear_specs(
                "gate_up", [f"{mlp}.gate_proj", f"{mlp}.up_proj"], (ffn_size, ffn_size), size, self.ffn_bias
            ),
            *_linear_specs("down", [f"{mlp}.down_proj"], (size,), ffn_size, self.ffn_bias),
        ]


def workspace_values(shape: ModelShape, *, norms_heads: bool) -> int:
    """Values of a token at the widest moment inside a layer, in the type that is computed with.

    A float32 value counts as two, since it is where that type has half its bytes. Beside the residual: its norm, in
    float32 before and after it is scaled; or what is normalised, queries, keys and values, and the most of how these
    are turned, how their heads are normalised, and the output of attention and of its projection; or the feed-forward
    block.
    """
    size, head_size = shape.hidden_size, shape.head_size
    q, kv = shape.num_heads * head_size, shape.num_kv_heads * head_size
    turning = 3 * (q + kv) // 2 + 5 * head_size
    beside_qkv = max(turning, 2 * q + size, 5 * q if norms_heads else 0)
    return size + max(5 * size, size + q + 2 * kv + beside_qkv, 2 * size + 3 * shape.ffn_size)


def _shape_of(config: Config, kind: str) -> ModelShape:
    hidden_size, num_heads = positive(config, "hidden_size"), positive(config, "num_attention_heads")
    num_kv_heads = positive(config, "num_key_value_heads", num_heads)
    if config.get("head_dim") is None and hidden_size % num_heads:
        raise CheckpointError(
            f"config.json: hidden_size {hidden_size} is not divisible by num_attention_heads {num_heads}"
        )
    head_size = positive(config, "head_dim", hidden_size // num_heads)
    if head_size % 2:
        raise CheckpointError(f"config.json: the head size, head_dim, must be even to be turned, not {head_size}")
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads {num_heads} is not divisible by num_key_value_heads {num_kv_heads}"
        )
    has_tokens = kind in (LLAMA, MISTRAL)  # the others' defaults name none
    shape = ModelShape(
        num_layers=layer_count(config),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        ffn_size=positive(config, "intermediate_size"),
        vocab_size=positive(config, "vocab_size"),
        max_positions=positive(config, "max_position_embeddings"),
        bos_token_id=bos_token_id(config, 1 if has_tokens else None),
        eos_token_ids=eos_token_ids(config, 2 if has_tokens else None),
        turns_keys=True,
        workspace_values=0,
    )
    return replace(shape, workspace_values=workspace_values(shape, norms_heads=kind == QWEN3))


def _check_window(config: Config, kind: str, shape: ModelShape) -> None:
    """Refuse attention to the last few tokens alone, unless it is switched off or no sequence gets that long.

    Raises:
        CheckpointError: it is on.
    """
    window = config.get("sliding_window", 4096)
    if kind == LLAMA or window is None or not config.get("use_sliding_window", kind == MISTRAL):
        return
    layer_types = config.get("layer_types")
    if isinstance(layer_types, list):
        slides = "sliding_attention" in layer_types
    else:
        slides = kind == MISTRAL or positive(config, "max_window_layers", 28) < shape.num_layers
    if slides and positive(config, "sliding_window", 4096) < shape.max_positions:
        raise CheckpointError(
            f"config.json: sliding_window {window} is shorter than max_position_embeddings {shape.max_positions}, and "
            "attention to the last tokens alone is not supported; choose a checkpoint without it"
        )


def _linear_specs(name: str, sources: list[str], rows: tuple[int, ...], in_size: int, bias: bool) -> list[TensorSpec]:
    """A projection; several with the same input are one product."""
    specs = []
    for part, width in (("weight", (in_size,)), ("bias", ())):
        if part == "weight" or bias:
            names = tuple(f"{source}.{part}" for source in sources)
            specs.append(TensorSpec(f"{name}.{part}", (sum(rows), *width), names, rows))
    return specs


def _plain(
    kind: str, layers: int, hidden_size: int, ffn_size: int, heads: int, kv_heads: int, vocab: int, positions: int,
    theta: float, **more: object,
) -> Config:  # fmt: skip
    return {
        "model_type": kind, "num_hidden_layers": layers, "hidden_size": hidden_size, "intermediate_size": ffn_size,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "max_position_embeddings": positions, "rope_theta": theta, "tie_word_embeddings": False, **more,
    }  # fmt: skip


def _llama3(factor: float) -> dict[str, object]:
    return {
        "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }  # fmt: skip


_TIED = {"tie_word_embeddings": True}
_NO_WINDOW = {"sliding_window": None}

KNOWN: Mapping[str, Config] = {
    "meta-llama/Llama-2-7b-hf": _plain(LLAMA, 32, 4096, 11008, 32, 32, 32000, 4096, 10000.0, rms_norm_eps=1e-5),
    "meta-llama/Meta-Llama-3-8B": _plain(LLAMA, 32, 4096, 14336, 32, 8, 128256, 8192, 500000.0, rms_norm_eps=1e-5),
    "meta-llama/Llama-3.1-8B": _plain(
        LLAMA, 32, 4096, 14336, 32, 8, 128256, 131072, 500000.0, rms_norm_eps=1e-5, rope_scaling=_llama3(8.0)
    ),
    "meta-llama/Llama-3.2-1B": _plain(
        LLAMA, 16, 2048, 8192, 32, 8, 128256, 131072, 500000.0, rms_norm_eps=1e-5, rope_scaling=_llama3(32.0), **_TIED
    ),
    "mistralai/Mistral-7B-v0.3": _plain(
        MISTRAL, 32, 4096, 14336, 32, 8, 32768, 32768, 1000000.0, rms_norm_eps=1e-5, **_NO_WINDOW
    ),
    "Qwen/Qwen2.5-0.5B": _plain(QWEN2, 24, 896, 4864, 14, 2, 151936, 32768, 1000000.0, **_TIED),
    "Qwen/Qwen2.5-7B": _plain(QWEN2, 28, 3584, 18944, 28, 4, 152064, 131072, 1000000.0),
    "Qwen/Qwen3-0.6B": _plain(QWEN3, 28, 1024, 3072, 16, 8, 151936, 40960, 1000000.0, head_dim=128, **_TIED),
    "Qwen/Qwen3-8B": _plain(QWEN3, 36, 4096, 12288, 32, 8, 151936, 40960, 1000000.0, head_dim=128),
    "HuggingFaceTB/SmolLM2-135M": _plain(LLAMA, 30, 576, 1536, 9, 3, 49152, 8192, 100000.0, rms_norm_eps=1e-5, **_TIED),
    "HuggingFaceTB/SmolLM2-1.7B": _plain(
        LLAMA, 24, 2048, 8192, 32, 32, 49152, 8192, 130000.0, rms_norm_eps=1e-5, **_TIED
    ),
}
"""From ``config.json`` of each on the Hugging Face hub; what plans do not depend on is left out."""
