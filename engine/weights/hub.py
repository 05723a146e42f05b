"""Fetching a checkpoint from the Hugging Face hub, where there is a network."""

import errno
from collections.abc import Container, Iterable
from fnmatch import fnmatch
from pathlib import Path

from engine.errors import CheckpointError, DiskFull

_SMALL_FILES = [
    "config.json", "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt",
]  # fmt: skip
_SAFETENSORS = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
_BIN = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"]

TIMEOUT_S = 10.0
"""How long the hub may take to answer at first."""


def download(name: str, destination: Path) -> Path:
    """Downloads what ``import_checkpoint`` needs of a hub repository; resumes what an earlier call left.

    Args:
        name: the hub's name of the checkpoint, as in ``facebook/opt-1.3b``.
        destination: the folder that will be the Hugging Face folder.

    Raises:
        CheckpointError: no network, no such repository, no permission, or nothing usable in it.
        DiskFull: no room for it.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        # One small request first: it fails at once where there is no network, and tells which files there are.
        info = HfApi().model_info(name, timeout=TIMEOUT_S)
        wanted = wanted_files(file.rfilename for file in info.siblings or ())
        if wanted and has_tokenizer(wanted):
            return Path(snapshot_download(name, revision=info.sha, local_dir=destination, allow_patterns=wanted))
    except HFValidationError as error:
        raise CheckpointError(
            f"{name} is no local folder, nor a name of the Hugging Face hub, which look like facebook/opt-1.3b"
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"{destination} has no room for {name}; free some or choose another place") from error
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise CheckpointError(
            f"{name} is no local folder, and fetching it from the Hugging Face hub failed: {reason.rstrip('.')}. "
            "Check the name and the network, or give a folder that holds the checkpoint"
        ) from error
    if not wanted:
        raise CheckpointError(f"{name} on the Hugging Face hub holds neither .safetensors nor .bin weights")
    raise CheckpointError(
        f"{name} on the Hugging Face hub holds no tokenizer: download it yourself, put tokenizer.json (or vocab.json "
        "and merges.txt) into its folder, from where the checkpoint comes from or made with transformers, and import "
        "the folder"
    )


def has_tokenizer(names: Container[str]) -> bool:
    """Whether text can be made tokens of with these files: asked before gigabytes come."""
    return "tokenizer.json" in names or ("vocab.json" in names and "merges.txt" in names)


def wanted_files(names: Iterable[str]) -> list[str]:
    """Which of a repository's files to download: safetensors where there are any, else .bin; none without weights."""
    names = list(names)
    for weights in (_SAFETENSORS, _BIN):
        found = [name for name in names if any(fnmatch(name, pattern) for pattern in weights)]
        if found:
            return [name for name in names if name in _SMALL_FILES or name in found]
    return []
