"""The weights of a Hugging Face folder.

Reads ``.safetensors`` or ``.bin``, in one file or sharded, tensor by tensor and piece by piece: a few pieces of memory
suffice for a model of any size (except for shards in PyTorch's old, unmappable format, see ``sources.TorchFile``).
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.dtypes import DType
from engine.errors import CheckpointError
from engine.model.family import Config, TensorSpec, UnitSpec
from engine.model.fields import GENERATION, stored_dtype
from engine.weights.importers.sources import CheckpointFile, TensorInfo, open_checkpoint_file
from engine.weights.importers.tokenizer_files import tokenizer_files
from engine.weights.manifest import MANIFEST_NAME

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""In order of preference; an index names the shards."""


def read_config(source: Path) -> dict[str, Any]:
    """The configuration of a Hugging Face folder: config.json, with generation_config.json in it if there is one.

    Raises:
        CheckpointError: there is no such folder, or no usable config.json in it, or the other file is damaged.
    """
    if not source.exists():
        raise CheckpointError(f"{source} does not exist")
    if not source.is_dir():
        raise CheckpointError(f"{source} is a file; give the folder that holds it together with its config.json")
    path = source / "config.json"
    if not path.is_file():
        if (source / MANIFEST_NAME).is_file():
            raise CheckpointError(f"{source} is a model directory already; it needs no import")
        raise CheckpointError(f"{source} has no config.json, so it is not a Hugging Face folder")
    config = _read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{path} has no model_type")
    generation = source / "generation_config.json"
    return {**config, GENERATION: _read_json(generation)} if generation.is_file() else config


class HuggingFaceFolder:
    """A Hugging Face folder, its weights under normalised names.

    Implements ``engine.weights.importing.WeightSource``.
    """

    def __init__(self, source: Path) -> None:
        """Raises ``CheckpointError`` where there is no usable configuration."""
        self.path = self._source = source
        self.config: Config = read_config(source)
        self._open: dict[Path, CheckpointFile] = {}
        self._where: dict[str, tuple[Path, str]] = {}
        self._infos: dict[str, TensorInfo] = {}

    def tokenizer(self) -> dict[str, bytes]:
        """See ``tokenizer_files``."""
        return tokenizer_files(self._source)

    def release(self) -> None:
        """Closes the files that are open; they open again when needed."""
        while self._open:
            self._open.popitem()[1].close()

    def check(self, units: Iterable[UnitSpec]) -> None:
        """Checks that every tensor of the model is there with its shape, and that none of a layer would be forgotten.

        Raises:
            CheckpointError: naming the tensor, the file, and both shapes.
        """
        self._find()
        used: set[str] = set()
        for unit in units:
            for tensor in unit.tensors:
                self._check_tensor(tensor)
                used.update(tensor.sources)
        modules = {name.rpartition(".")[0] for name in used}
        layers = {prefix for prefix in map(_layer_prefix, used) if prefix}
        for name in self._where.keys() - used:
            module, _, kind = name.rpartition(".")
            # Other leftovers (fairseq's version, a tied head, another task's head) change nothing and are ignored.
            if kind in ("weight", "bias") and (module in modules or _layer_prefix(name) in layers):
                raise CheckpointError(
                    f"{self._where[name][0]} holds tensor {name}, for which config.json has no place; "
                    "are they of the same model?"
                )

    def default_dtype(self, units: Iterable[UnitSpec]) -> DType:
        """The dtype that the configuration names, else that of the first tensor, if we store such.

        Raises:
            CheckpointError: neither is one we store.
        """
        named = stored_dtype(self.config)
        if named is not None:
            return named
        first = next(source for unit in units for tensor in unit.tensors for source in tensor.sources)
        found = self._infos[first].dtype_name
        names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
        found = names.get(found, found)
        if found not in tuple(DType):
            raise CheckpointError(f"{self._source} stores weights as {found}; choose --dtype {', '.join(DType)}")
        return DType(found)

    def pieces(self, unit: UnitSpec, tensor: TensorSpec) -> Iterator[tuple[str, Tensor]]:
        """The values of one tensor, flat and row-major, each piece with the name of what it is from."""
        del unit
        # Row-major tensors concatenated along dimension 0 are their values one after another.
        for source in tensor.sources:
            path, name = self._where[source]
            for piece in self._file(path).pieces(name):
                yield f"tensor {name} of {path}", piece

    def _find(self) -> None:
        """Which file holds which tensor."""
        for path in _weight_files(self._source):
            file = self._file(path)
            for name, info in file.tensors.items():
                normalised = name.removeprefix("model.")
                if normalised in self._where:
                    other = self._where[normalised][0]
                    raise CheckpointError(f"{path} holds tensor {name}, which {other} holds too")
                self._where[normalised] = path, name
                self._infos[normalised] = info
            self.release()

    def _check_tensor(self, tensor: TensorSpec) -> None:
        for source, shape in zip(tensor.sources, tensor.source_shapes(), strict=True):
            if source not in self._where:
                raise CheckpointError(f"tensor {source} is missing in the weights of {self._source}")
            path, name = self._where[source]
            info = self._infos[source]
            if info.dtype is None:
                raise CheckpointError(
                    f"tensor {name} of {path} is stored as {info.dtype_name}; only plain floating point is read"
                )
            if info.shape != shape:
                raise CheckpointError(
                    f"tensor {name} of {path} has shape {info.shape}, but config.json asks for {shape}"
                )

    def _file(self, path: Path) -> CheckpointFile:
        if path not in self._open:
            self._open[path] = open_checkpoint_file(path)
        return self._open[path]


def _weight_files(source: Path) -> list[Path]:
    for name in _WEIGHTS:
        path = source / name
        if not path.is_file():
            continue
        if not name.endswith(".json"):
            return [path]
        weight_map = _read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path} has no weight_map")
        shards = sorted({str(shard) for shard in weight_map.values()})
        for shard in shards:
            if Path(shard).name != shard or not (source / shard).is_file():
                raise CheckpointError(f"{source} lacks {shard}, which {name} names; was it downloaded whole?")
        return [source / shard for shard in shards]
    raise CheckpointError(f"{source} has no weights: one of {', '.join(_WEIGHTS)} is needed")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def _layer_prefix(name: str) -> str:
    """What stands before the number of a layer (``layers.7.mlp.weight`` → ``layers``); empty: there is none."""
    prefix = re.split(r"\.\d+\.", name, maxsplit=1)[0]
    return prefix if prefix != name else ""
