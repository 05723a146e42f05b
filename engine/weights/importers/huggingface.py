"""From a Hugging Face folder to a model directory.

Reads ``.safetensors`` or ``.bin``, in one file or sharded, tensor by tensor and piece by piece: a few pieces of memory
suffice for a model of any size (except for shards in PyTorch's old, unmappable format, see ``sources.TorchFile``).
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.dtypes import DType
from engine.errors import CheckpointError
from engine.memory.tensors import torch_dtype
from engine.model.family import TensorSpec, UnitSpec
from engine.model.fields import GENERATION, stored_dtype
from engine.model.registry import sizes_for
from engine.weights.importers.sources import CheckpointFile, TensorInfo, open_checkpoint_file
from engine.weights.importers.tokenizer_files import check_vocabulary, tokenizer_files
from engine.weights.layout import UnitLayout
from engine.weights.manifest import MANIFEST_NAME, Manifest
from engine.weights.writer import Buffer, ModelWriter

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and in all."""

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""In order of preference; an index names the shards."""


def import_checkpoint(
    source: Path,
    destination: Path,
    dtype: DType | None = None,
    on_progress: Progress | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Makes a model directory of a Hugging Face folder, whole or not at all.

    Args:
        source: a folder with config.json, weights and a tokenizer.
        destination: where the model directory will be; must not exist.
        dtype: how weights are stored; by default as the configuration says, else as the checkpoint has them.
        on_progress: told of bytes written, and of how many there will be.
        warn: told what is odd, but no reason to refuse.

    Raises:
        CheckpointError: the source is not a checkpoint we can run, or the destination exists.
        DiskFull: no room for the model directory.
    """
    config = read_config(source)
    sizes = sizes_for(config)
    units = sizes.units()
    tokenizer = tokenizer_files(source)
    warning = check_vocabulary(tokenizer, sizes.shape.vocab_size, source)
    if warning is not None:
        warn(warning)
    with Checkpoint(source) as checkpoint:
        checkpoint.check(units)
        stored = dtype or checkpoint.default_dtype(config, units)
        layouts = {unit.name: UnitLayout.plain(unit, stored) for unit in units}
        num_bytes = sum(layout.num_bytes for layout in layouts.values())
        report = _Reporter(on_progress, num_bytes)
        beyond: dict[str, float] = {}

        def note(unit: str, tensor: str, largest: float) -> None:
            name = f"{unit}/{tensor}"
            beyond[name] = max(largest, beyond.get(name, 0.0))

        with ModelWriter(destination, num_bytes) as writer:
            for unit in units:
                contents = (
                    (tensor.name, report.count(checkpoint.read(tensor, stored, partial(note, unit.name, tensor.name))))
                    for tensor in unit.tensors
                )
                writer.write_unit(unit.name, layouts[unit.name], contents)
                checkpoint.release()
            for name, content in tokenizer.items():
                writer.write_file(name, content)
            manifest = Manifest(
                model_type=config["model_type"],
                config=config,
                dtype=stored,
                units=writer.units,
                num_bytes=num_bytes,
                source=source.resolve().name,
                created_by=_created_by(),
                beyond_float16=beyond,
            )
            writer.commit(manifest)
            report.finish()
    return manifest


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


class Checkpoint:
    """The weights of a Hugging Face folder under normalised names; a context manager that closes its files."""

    def __init__(self, source: Path) -> None:
        self._source = source
        self._open: dict[Path, CheckpointFile] = {}
        self._where: dict[str, tuple[Path, str]] = {}
        self._infos: dict[str, TensorInfo] = {}
        for path in _weight_files(source):
            file = self._file(path)
            for name, info in file.tensors.items():
                normalised = name.removeprefix("model.")
                if normalised in self._where:
                    other = self._where[normalised][0]
                    raise CheckpointError(f"{path} holds tensor {name}, which {other} holds too")
                self._where[normalised] = path, name
                self._infos[normalised] = info
            self.release()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Closes the files that are open; they open again when needed."""
        while self._open:
            self._open.popitem()[1].close()

    def check(self, units: Iterable[UnitSpec]) -> None:
        """Checks that every tensor of the model is there with its shape, and that none of a layer would be forgotten.

        Raises:
            CheckpointError: naming the tensor, the file, and both shapes.
        """
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

    def default_dtype(self, config: Mapping[str, Any], units: Iterable[UnitSpec]) -> DType:
        """The dtype that the configuration names, else that of the first tensor, if we store such.

        Raises:
            CheckpointError: neither is one we store.
        """
        named = stored_dtype(config)
        if named is not None:
            return named
        first = next(source for unit in units for tensor in unit.tensors for source in tensor.sources)
        found = self._infos[first].dtype_name
        names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
        found = names.get(found, found)
        if found not in tuple(DType):
            raise CheckpointError(f"{self._source} stores weights as {found}; choose --dtype {', '.join(DType)}")
        return DType(found)

    def read(
        self, tensor: TensorSpec, dtype: DType, note: Callable[[float], None] = lambda _: None
    ) -> Iterator[Buffer]:
        """The bytes of one tensor in ``dtype``, in pieces; ``note`` is told of values that float16 cannot hold.

        Raises:
            CheckpointError: a value does not fit ``dtype``.
        """
        # Row-major tensors concatenated along dimension 0 are their bytes one after another.
        for source in tensor.sources:
            path, name = self._where[source]
            for piece in self._file(path).pieces(name):
                cast = piece.to(torch_dtype(dtype))
                largest = _overflow(piece, cast)
                if largest is not None:
                    raise CheckpointError(
                        f"tensor {name} of {path} holds {largest:g}, too large for {dtype}; "
                        "choose --dtype bfloat16 or float32"
                    )
                lowest, highest = (float(each) for each in cast.aminmax())
                if _FLOAT16_MAX < max(-lowest, highest) < math.inf:
                    note(max(-lowest, highest))
                yield cast.view(torch.uint8).numpy().data

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


class _Reporter:
    """Counts bytes as they pass."""

    def __init__(self, on_progress: Progress | None, num_bytes: int) -> None:
        self._on_progress = on_progress
        self._num_bytes = num_bytes
        self._done = 0

    def count(self, pieces: Iterable[Buffer]) -> Iterator[Buffer]:
        for piece in pieces:
            yield piece
            self._done += memoryview(piece).nbytes
            if self._on_progress is not None:
                self._on_progress(self._done, self._num_bytes)

    def finish(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self._num_bytes, self._num_bytes)


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


_FLOAT16_MAX = torch.finfo(torch.float16).max


def _overflow(piece: Tensor, cast: Tensor) -> float | None:
    """The largest of the finite values that became infinite."""
    if torch.finfo(cast.dtype).max >= torch.finfo(piece.dtype).max:
        return None
    lowest, highest = cast.aminmax()  # many times cheaper than looking for infinities, which are hardly ever there
    if lowest.isfinite() and highest.isfinite():
        return None
    lost = piece[cast.isinf() & piece.isfinite()].abs()
    return lost.max().item() if lost.numel() else None


def _layer_prefix(name: str) -> str:
    """What stands before the number of a layer (``layers.7.mlp.weight`` → ``layers``); empty: there is none."""
    prefix = re.split(r"\.\d+\.", name, maxsplit=1)[0]
    return prefix if prefix != name else ""


def _created_by() -> str:
    try:
        return f"overnight {version('overnight')}"
    except PackageNotFoundError:
        return "overnight"
