"""Whether this worker may round what it computes with to four bits: jobs that are to be exact it leaves to others."""

from pathlib import Path

from engine.attention.sizes import KV_FORMATS
from engine.formats.sizes import Plain
from engine.weights.layout import stored_in
from engine.weights.manifest import is_model_dir, read_manifest


def why_not_exact(model_dir: Path, kv_format: str | None) -> str | None:
    """What it would round, for people; ``None``: nothing.

    Args:
        model_dir: perhaps not there yet: what is imported on first use is plain.
        kv_format: as asked for; with ``auto``, a plan may well choose four bits.

    Raises:
        CheckpointError: the model directory is damaged.
    """
    if kv_format not in (None, KV_FORMATS[0]):
        return f"this worker runs with --kv-format {kv_format}"
    if is_model_dir(model_dir):
        found = stored_in(read_manifest(model_dir)).weight_format
        if found != Plain.name:
            return f"{model_dir} has its weights in {found}"
    return None
