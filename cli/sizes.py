"""How large a model is, without its weights: what every plan is made from."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cli.display import say

if TYPE_CHECKING:
    from engine.devices.facts import MachineFacts
    from engine.planner.plan import PlanOptions
    from engine.planner.plan_input import PlanInput
    from engine.planner.workload import Workload
    from engine.shape import ModelShape
    from engine.weights.stored import StoredWeights
    from worker.models import ModelRef
    from worker.settings import Settings


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is known of a model without its weights."""

    shape: "ModelShape"
    stored: "StoredWeights"
    folder: Path | None
    """Where its tokenizer may lie."""

    def plan_input(
        self,
        options: "PlanOptions",
        device: str,
        facts: "MachineFacts",
        disk_dir: Path,
        workload: "Workload | None" = None,
    ) -> "PlanInput":
        """What a plan for this model is made from; ``device`` is the full name, ``disk_dir`` for spill files."""
        from engine.planner.plan_input import PlanInput

        return PlanInput(
            shape=self.shape,
            stored=self.stored,
            device=device,
            facts=facts,
            options=options,
            disk_dir=disk_dir,
            workload=workload,
        )


def sizes_of(ref: "ModelRef", settings: "Settings") -> Sizes:
    """The sizes of a model that is here; for a Hugging Face folder, those that its import would give.

    Raises:
        CheckpointError: it is damaged, or of a kind that cannot be planned for.
    """
    from engine.weights.manifest import is_model_dir
    from worker.models import model_dir_for

    model_dir = model_dir_for(ref, settings)
    return _of_model_dir(model_dir) if is_model_dir(model_dir) else _of_checkpoint(ref.path)


def _of_model_dir(model_dir: Path) -> Sizes:
    from engine.weights.checks import check_units
    from engine.weights.layout import stored_in
    from engine.weights.manifest import read_manifest

    manifest = read_manifest(model_dir)
    return Sizes(check_units(manifest, model_dir).shape, stored_in(manifest), model_dir)


def _of_checkpoint(folder: Path) -> Sizes:
    """A Hugging Face folder, as `overnight import` would store it."""
    import json

    from engine.dtypes import DType
    from engine.errors import CheckpointError
    from engine.model.fields import stored_dtype
    from engine.model.registry import sizes_for
    from engine.weights.layout import Storing, stored_as

    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); get the checkpoint again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object; get the checkpoint again")
    sizes = sizes_for(config)
    named = stored_dtype(config)
    dtype = named or DType.FLOAT16
    if named is None:
        say(f"{path} does not say how the weights are stored: taking {dtype}")
    return Sizes(sizes.shape, stored_as(sizes, Storing(dtype)), folder)
