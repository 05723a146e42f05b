"""Which model families there are. A new one adds one line; nothing else outside its own files names it. No torch."""

from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from engine.errors import CheckpointError
from engine.model.family import Config, Family, Sizes

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "opt": ("opt",),
    "llama": ("llama", "mistral", "qwen2", "qwen3"),
}
"""By the module beside this one that computes a family, the ``model_type`` of each of its checkpoints;
``<module>_sizes`` says how large they are, without torch, and perhaps the configurations of well-known ones, ``KNOWN``.
"""
_REFERENCE = "opt"
"""Whose layers a machine is measured with: rates are told by operations and bytes, and hold for other families, too."""


def sizes_for(config: Mapping[str, Any]) -> Sizes:
    """The sizes of a Hugging Face ``config.json``.

    Raises:
        CheckpointError: no such family, or a value that is out of range.
    """
    sizes: Sizes = _module(config, "_sizes").sizes(config)
    return sizes


def family_for(config: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face ``config.json``, loaded with torch.

    Raises:
        CheckpointError: no such family, or a value of the configuration it cannot honour.
    """
    family: Family = _module(config).family(config)
    return family


def known_configs() -> dict[str, Config]:
    """The configurations of well-known models, by their names on the hub."""
    found: dict[str, Config] = {}
    for name in FAMILIES:
        found |= getattr(import_module(f"{__package__}.{name}_sizes"), "KNOWN", {})
    return found


def reference_config(
    hidden_size: int, *, head_size: int, num_layers: int, vocab_size: int, max_positions: int = 2048
) -> Config:
    """The configuration of a plain model of some width."""
    module = import_module(f"{__package__}.{_REFERENCE}_sizes")
    config: Config = module.plain_config(hidden_size, head_size, num_layers, vocab_size, max_positions)
    return config


def _module(config: Mapping[str, Any], suffix: str = "") -> ModuleType:
    model_type = config.get("model_type")
    for name, model_types in FAMILIES.items():
        if model_type in model_types:
            return import_module(f"{__package__}.{name}{suffix}")
    known = [repr(each) for model_types in FAMILIES.values() for each in model_types]
    raise CheckpointError(
        f"model_type {model_type!r} is not supported; overnight runs checkpoints of model_type {' or '.join(known)}"
    )
