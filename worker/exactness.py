"""Whether this worker may round what it computes with to four bits: jobs that are to be exact it leaves to others."""

from pathlib import Path

from engine.formats.sizes import Plain
from engine.planner.plan import PlanOptions
from engine.weights.manifest import is_model_dir, read_manifest


def why_not_exact(model_dir: Path, placement: PlanOptions) -> str | None:
    """What it would round, for people; ``None``: nothing.

    Args:
        model_dir: perhaps not there yet: what is imported on first use is plain.
        placement: as asked for; with ``--kv-format auto``, a plan may well choose four bits.

    Raises:
        CheckpointError: the model directory is damaged.
    """
    if placement.may_round:
        return f"this worker runs with --kv-format {placement.kv_format}"
    if is_model_dir(model_dir):
        found = read_manifest(model_dir).weight_format
        if found != Plain.name:
            return f"{model_dir} has its weights in {found}"
    return None
