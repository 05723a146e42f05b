"""From a checkpoint's ``model_type`` to its family; a new family adds one line here."""

from collections.abc import Mapping
from typing import Any

from engine.errors import CheckpointError
from engine.model.family import Family


def family_for(config: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face ``config.json``.

    Raises:
        CheckpointError: no such family, or a value of the configuration it cannot honour.
    """
    model_type = config.get("model_type")
    if model_type == "opt":
        from engine.model.opt import OPT

        return OPT.from_config(config)
    raise CheckpointError(f"model_type {model_type!r} is not supported; overnight runs checkpoints of model_type 'opt'")
