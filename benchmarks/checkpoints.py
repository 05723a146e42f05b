"""Random checkpoints of the real sizes, made once into a cache directory: a Hugging Face folder for the peers and its
import for us."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import platformdirs
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks.shapes import NUM_SPECIAL, config_of
from engine.formats.int4_sizes import Int4
from engine.formats.sizes import Plain
from engine.model.registry import family_for
from engine.weights.importing import import_checkpoint
from engine.weights.manifest import is_model_dir

_SPREAD = 0.02
_SMALL_SPREAD = 0.1
"""So wide that the greedy choices of a small model are no near ties."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One set of weights, twice."""

    folder: Path
    """As Hugging Face has it."""
    model_dir: Path
    """As ``overnight import`` has it."""


def default_cache() -> Path:
    """Where checkpoints are kept between runs."""
    return platformdirs.user_cache_path("overnight") / "benchmarks"


def make_checkpoint(
    shape: str, dtype: str, cache: Path, say: Callable[[str], None], weight_format: str = Plain.name
) -> Checkpoint:
    """The checkpoint of a shape, made if the cache has none, and its import in a format.

    Raises:
        ValueError: no such shape.
        EngineError: the import failed; the message says why.
        OSError: the cache cannot be written.
    """
    config = config_of(shape, dtype)
    suffix = "" if weight_format == Plain.name else f"-{weight_format}"
    checkpoint = Checkpoint(cache / f"{shape}-{dtype}", cache / f"{shape}-{dtype}{suffix}.overnight")
    if not checkpoint.folder.is_dir():
        say(f"making random weights of {shape} in {checkpoint.folder} (once)")
        partial = cache / f".{shape}-{dtype}.partial-{os.getpid()}"
        partial.mkdir(parents=True)
        try:
            _write(partial, config, dtype, _SMALL_SPREAD if shape == "tiny" else _SPREAD)
            partial.rename(checkpoint.folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    if not is_model_dir(checkpoint.model_dir):
        say(f"importing it to {checkpoint.model_dir} (once)")
        import_checkpoint(checkpoint.folder, checkpoint.model_dir, matrices=Int4() if suffix else None)
    return checkpoint


def make_tokenizer(vocabulary: int) -> Tokenizer:
    """One word a token, ``w17`` for token 17, so that a prompt has exactly the tokens it was given."""
    names = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{index}" for index in range(NUM_SPECIAL, vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(names[:NUM_SPECIAL])
    return tokenizer


def _write(folder: Path, config: dict[str, object], dtype: str, spread: float) -> None:
    """A shard a unit, so that a model larger than memory can be made."""
    generator = torch.Generator().manual_seed(0)
    stored: torch.dtype = getattr(torch, dtype)
    places: dict[str, str] = {}
    for unit in family_for(config).units():
        tensors = {}
        for spec in unit.tensors:
            rows, *rest = spec.shape
            for source in spec.sources:
                size = (rows // len(spec.sources), *rest)
                values = torch.empty(size, dtype=stored).normal_(0, spread, generator=generator)
                # Norms are near one: around zero, a deep model would forget its input.
                tensors[f"model.{source}"] = values + 1 if "norm.weight" in source else values
        shard = f"{unit.name}.safetensors"
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, shard))
    total = sum(path.stat().st_size for path in folder.iterdir())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    vocabulary = config["vocab_size"]
    assert isinstance(vocabulary, int)
    make_tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
