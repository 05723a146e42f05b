"""Fields of a Hugging Face ``config.json`` that families share, read and checked. No torch."""

from math import inf
from typing import Any

from engine.dtypes import DType
from engine.errors import CheckpointError
from engine.model.family import Config

GENERATION = "generation_config"
"""Under this name, a model directory's configuration has the checkpoint's generation_config.json."""
MOST_LAYERS = 4096
"""More than any model has, few enough to be listed."""
ACTIVATIONS = frozenset(
    (
        "relu", "gelu", "gelu_python", "gelu_10", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh",
        "gelu_python_tanh", "quick_gelu", "hardswish", "leaky_relu", "linear", "mish", "relu2", "relu6", "sigmoid",
        "silu", "swish", "tanh",
    )
)  # fmt: skip
"""Those that ``engine.model.activation_functions`` computes."""


def positive(config: Config, name: str, default: int | None = None) -> int:
    """A size; ``default`` where the field is absent or null.

    Raises:
        CheckpointError: it is no positive integer, or it is absent and there is no default.
    """
    value = config.get(name)
    if value is None and default is not None:
        return default
    if type(value) is not int or value < 1:
        raise CheckpointError(f"config.json: {name} must be a positive integer, not {value!r:.40}")
    return value


def number(config: Config, name: str, default: float | None = None, where: str = "") -> float:
    """A positive number; ``default`` where the field is absent or null. ``where`` is put before its name in errors.

    Raises:
        CheckpointError: it is no positive number, or it is absent and there is no default.
    """
    value = config.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < inf:
        raise CheckpointError(f"config.json: {where}{name} must be a positive number, not {value!r:.40}")
    return float(value)


def layer_count(config: Config, default: int | None = None) -> int:
    """``num_hidden_layers``.

    Raises:
        CheckpointError: it is no positive integer, or more than any model has.
    """
    found = positive(config, "num_hidden_layers", default)
    if found > MOST_LAYERS:
        raise CheckpointError(f"config.json: num_hidden_layers is {found}, and no model has over {MOST_LAYERS}")
    return found


def activation_name(config: Config, name: str, default: str) -> str:
    """The name of an activation function, one of ``ACTIVATIONS``.

    Raises:
        CheckpointError: it is not one of them.
    """
    found = config.get(name, default)
    if not isinstance(found, str) or found not in ACTIVATIONS:
        known = ", ".join(sorted(ACTIVATIONS))
        raise CheckpointError(f"config.json: {name} {found!r} is not known; known are {known}")
    return found


def eos_token_ids(config: Config, default: int | None = None) -> tuple[int, ...]:
    """The tokens that end a generation: those of config.json first, then those that generation_config.json adds.

    Raises:
        CheckpointError: one is no token's number.
    """
    name = "eos_token_id"
    found = _token_ids(config.get(name, default), name, "config.json")
    more = config.get(GENERATION)
    if isinstance(more, dict):
        found += _token_ids(more.get(name), name, "generation_config.json")
    return tuple(dict.fromkeys(found))


def bos_token_id(config: Config, default: int | None = None) -> int | None:
    """The token that texts begin with; None: there is none.

    Raises:
        CheckpointError: it is no token's number.
    """
    value = config.get("bos_token_id", default)
    return None if value is None else _token_id(value, "bos_token_id", "config.json")


def stored_dtype(config: Config) -> DType | None:
    """The number type that a checkpoint says its weights have, under the old name of the field or the new one; None: it
    does not say, or it is none that we store."""
    named = str(config.get("torch_dtype") or config.get("dtype") or "").removeprefix("torch.")
    return DType(named) if named in tuple(DType) else None


def _token_ids(value: Any, name: str, file: str) -> list[int]:
    """The tokens that a field names: one, a list of them, or null."""
    return [_token_id(each, name, file) for each in (value if isinstance(value, list) else [value]) if each is not None]


def _token_id(value: Any, name: str, file: str) -> int:
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{file}: {name} must be a token's number, not {value!r:.40}")
    return value
