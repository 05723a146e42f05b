"""From a checkpoint's ``model_type`` to what its configuration says of sizes; a new family adds one line. No torch."""

from collections.abc import Mapping
from typing import Any

from engine.errors import CheckpointError
from engine.model.opt_shape import OPTSizes


def sizes_for(config: Mapping[str, Any]) -> OPTSizes:
    """The sizes of a Hugging Face ``config.json``.

    Raises:
        CheckpointError: no such family, or a value that is out of range.
    """
    model_type = config.get("model_type")
    if model_type == "opt":
        return OPTSizes.from_config(config)
    raise CheckpointError(f"model_type {model_type!r} is not supported; overnight runs checkpoints of model_type 'opt'")
