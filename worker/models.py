"""From what a person wrote after ``--model`` to a folder that can be loaded."""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from engine.weights.manifest import MANIFEST_NAME, is_model_dir
from worker.errors import ModelNotFound
from worker.settings import Settings

__all__ = ["ModelNotFound", "ModelRef", "known_models", "model_dir_for", "resolve_model"]

_HF_CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model that is there."""

    reference: str
    """What a job remembers: the name, or the absolute path where it was given as a path."""
    path: Path
    """The folder as it was found."""
    is_imported: bool
    """True for a model directory; False for a Hugging Face folder, which is imported on first use."""


def resolve_model(name_or_path: str, settings: Settings) -> ModelRef:
    """The model that ``name_or_path`` means: a name in the model folder first, then a path.

    Raises:
        ModelNotFound: nothing there, or a folder that is no model; the text says where was looked and what to do.
    """
    if not name_or_path.strip():
        raise ModelNotFound("the model has no name; give --model a path or a name that 'overnight models' lists")
    named = settings.models_dir / name_or_path
    given_as_path = name_or_path.startswith((".", "~", os.sep))
    if not given_as_path and _looks_complete(named):
        return ModelRef(name_or_path, named, is_imported=is_model_dir(named))
    try:
        path = Path(name_or_path).expanduser().absolute()
    except RuntimeError:
        raise ModelNotFound(f"there is no model {name_or_path!r}: it begins with a user that does not exist") from None
    if _looks_complete(path):
        path = path.resolve()
        return ModelRef(str(path), path, is_imported=is_model_dir(path))
    if path.is_dir():
        raise ModelNotFound(
            f"{path} is not a model: it has neither {MANIFEST_NAME} (a model directory that was imported whole) "
            f"nor {_HF_CONFIG} (a Hugging Face folder); run 'overnight import' again"
        )
    if not given_as_path and named.is_dir():
        raise ModelNotFound(
            f"{named} is not a model: it has no {MANIFEST_NAME}, so its import did not finish; remove it, and import "
            "the model again"
        )
    if path.exists():
        raise ModelNotFound(f"{path} is a file; --model wants the folder of a model")
    known = ", ".join(known_models(settings)) or "none yet"
    raise ModelNotFound(
        f"there is no model {name_or_path!r}, neither at {path} nor in {settings.models_dir} (there: {known}); "
        f"make one with 'overnight import'"
    )


def model_dir_for(ref: ModelRef, settings: Settings) -> Path:
    """Where the model directory of ``ref`` is, or will be once a Hugging Face folder has been imported.

    The name of an import carries a hash over the folder's path and its files' sizes and times: a changed checkpoint is
    another model, never a stale one.
    """
    if ref.is_imported:
        return ref.path
    digest = hashlib.sha256(str(ref.path).encode())
    for file in sorted(path for path in ref.path.iterdir() if path.is_file()):
        status = file.stat()
        digest.update(f"\0{file.name}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", ref.path.name).strip("-.") or "model"
    return settings.models_dir / f"{stem}-{digest.hexdigest()[:8]}"


def known_models(settings: Settings) -> list[str]:
    """The names of the whole model directories in the model folder, sorted."""
    try:
        entries = list(settings.models_dir.iterdir())
    except FileNotFoundError:
        return []
    return sorted(entry.name for entry in entries if is_model_dir(entry))


def _looks_complete(path: Path) -> bool:
    return is_model_dir(path) or (path / _HF_CONFIG).is_file()
