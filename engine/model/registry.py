"""From a checkpoint's ``model_type`` to its family; a new family adds one line here."""

from collections.abc import Mapping
from typing import Any

from engine.model.family import Family
from engine.model.sizes import sizes_for


def family_for(config: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face ``config.json``.

    Raises:
        CheckpointError: no such family, or a value of the configuration it cannot honour.
    """
    sizes_for(config)  # no other family has sizes
    from engine.model.opt import OPT

    return OPT.from_config(config)
