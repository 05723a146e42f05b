"""What a model directory contains: ``manifest.json`` in and out, without loading torch.

The manifest is written last, so a directory without one is not a model, whatever else lies in it.
"""

import json
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, TypeVar

from engine.dtypes import DType
from engine.errors import CheckpointError
from engine.formats.sizes import Plain, TensorFormat, format_from
from engine.model.family import EMBED, HEAD
from engine.units import MIB
from engine.weights.stored import TENSOR_ALIGNMENT, StoredTensor, matrix_format

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
FORMAT_VERSION = 2
"""Version 1 knew no formats: every tensor was plain, in the dtype of the whole."""
MOST_BYTES = 256 * MIB
"""The largest manifest or tokenizer that is taken for one: they are read whole."""
PAGE_BYTES = 4096
"""Weight files are whole pages long, so that direct reads need no special last piece."""
PARTIAL_NAME = re.compile(r"\..+\.partial-\d+")
"""Directories that an import is still writing, or left behind when it was killed."""

T = TypeVar("T")

_UNIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies in its unit's file, and how."""

    offset: int
    shape: tuple[int, ...]
    format: TensorFormat

    @property
    def num_bytes(self) -> int:
        """Bytes from ``offset`` on."""
        return self.format.num_bytes(self.shape)


@dataclass(frozen=True, slots=True)
class UnitEntry:
    """One unit (embedding, layer or head) and its file."""

    name: str
    file: str
    num_bytes: int
    """The file's size: tensors, gaps and padding, a multiple of ``PAGE_BYTES``."""
    checksum: str
    """``sha256:`` and the hex digest of the whole file."""
    tensors: Mapping[str, TensorEntry]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything needed to read a model directory; equal manifests mean equal weights."""

    format_version: int = FORMAT_VERSION
    model_type: str
    config: Mapping[str, Any]
    """The checkpoint's ``config.json``, whole, and in it under ``generation_config`` its ``generation_config.json``."""
    dtype: DType
    """The number type of the weights that are plain, and the default to compute in."""
    units: tuple[UnitEntry, ...]
    num_bytes: int
    """Equal to ``sum(unit.num_bytes for unit in units)``."""
    source: str
    """The name of the checkpoint it was imported from, for people."""
    created_by: str
    beyond_float16: Mapping[str, float] = field(default_factory=dict)
    """By unit and tensor (``layer.0/fc1.weight``), the largest absolute value of those that float16 cannot hold."""

    @property
    def weight_format(self) -> str:
        """The format of the layers' matrices."""
        entries = (entry for unit in self.units if unit.name not in (EMBED, HEAD) for entry in unit.tensors.values())
        return matrix_format(StoredTensor(entry.format, entry.shape) for entry in entries)

    def to_json(self) -> str:
        """The text of ``manifest.json``."""
        fields = {each.name: getattr(self, each.name) for each in dataclass_fields(self)}
        fields["units"] = [_unit_fields(unit) for unit in self.units]
        return json.dumps(fields, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """The manifest in a text.

        Raises:
            ValueError: not a manifest this version can honour; the text is a sentence fragment for people.
        """
        try:
            fields = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"it is not JSON ({error}); import the model again") from error
        if not isinstance(fields, dict):
            raise ValueError("it is not a JSON object")
        version = fields.get("format_version")
        if not isinstance(version, int) or version < 1:
            raise ValueError("it has no format_version, a whole number")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"its format version is {version}, and this overnight reads up to {FORMAT_VERSION}; upgrade overnight"
            )
        try:
            model_type = _field(fields, "model_type", str)
            plain = Plain.from_fields(fields)
            manifest = cls(
                model_type=model_type,
                config=_field(fields, "config", dict),
                dtype=plain.dtype,
                units=tuple(_unit(entry, plain if version == 1 else None) for entry in _field(fields, "units", list)),
                num_bytes=_field(fields, "num_bytes", int),
                source=_field(fields, "source", str),
                created_by=_field(fields, "created_by", str),
                beyond_float16=_typed(fields.get("beyond_float16", {}), dict),
            )
        except KeyError as error:
            raise ValueError(f"its field {error} is missing") from error
        except TypeError as error:
            raise ValueError(f"a field has the wrong type ({error})") from error
        if manifest.config.get("model_type") != model_type:
            raise ValueError(
                f"its model_type is {model_type!r}, and its configuration's another; import the model again"
            )
        manifest.check_integrity()
        return manifest

    def check_integrity(self) -> None:
        """Checks that sizes, offsets and names fit each other.

        Raises:
            ValueError: they do not; the text is a sentence fragment for people.
        """
        if self.num_bytes != sum(unit.num_bytes for unit in self.units):
            raise ValueError("its num_bytes is not the sum of its units'")
        if len({unit.name for unit in self.units}) != len(self.units) or not self.units:
            raise ValueError("it lists no units, or one twice")
        for unit in self.units:
            # A file name that is a plain name cannot lead out of the directory.
            if not (_UNIT_NAME.fullmatch(unit.name) and _UNIT_NAME.fullmatch(unit.file)):
                raise ValueError(f"unit {unit.name!r} or its file {unit.file!r} is not a plain name")
            if unit.num_bytes % PAGE_BYTES or not unit.checksum.startswith("sha256:"):
                raise ValueError(f"unit {unit.name!r} has an impossible size or checksum")
            for name, tensor in unit.tensors.items():
                if isinstance(tensor.format, Plain) and tensor.format.dtype is not self.dtype:
                    raise ValueError(
                        f"tensor {name!r} of unit {unit.name!r} is {tensor.format.dtype}, not {self.dtype}"
                    )
                end = tensor.offset + tensor.num_bytes
                if tensor.offset < 0 or tensor.offset % TENSOR_ALIGNMENT or end > unit.num_bytes:
                    raise ValueError(f"tensor {name!r} of unit {unit.name!r} does not lie within its file")


def is_model_dir(path: Path) -> bool:
    """Whether ``path`` is a finished model directory, as far as its name and manifest's presence tell."""
    return not PARTIAL_NAME.fullmatch(path.name) and (path / MANIFEST_NAME).is_file()


def read_manifest(model_dir: Path) -> Manifest:
    """The manifest of a model directory whose files are all there, at the sizes it says.

    Raises:
        CheckpointError: absent, half-written, damaged, or of a newer format.
    """
    if not model_dir.is_dir():
        raise CheckpointError(f"{model_dir} is not a directory; expected a model directory made by `overnight import`")
    if PARTIAL_NAME.fullmatch(model_dir.name):
        raise CheckpointError(f"{model_dir} is an import that has not finished; run `overnight import` again")
    path = model_dir / MANIFEST_NAME
    try:
        _check_small(path)
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if (model_dir / "config.json").is_file():
            raise CheckpointError(
                f"{model_dir} is a Hugging Face folder, not a model directory; run `overnight import {model_dir}`"
            ) from None
        raise CheckpointError(
            f"{model_dir} has no {MANIFEST_NAME}: it is no model directory, or its import did not finish; import again"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); import the model again") from error
    try:
        manifest = Manifest.from_json(text)
    except ValueError as error:
        has_remedy = "import the model again" in str(error) or "upgrade overnight" in str(error)
        remedy = "" if has_remedy else "; import the model again"
        raise CheckpointError(f"{path} cannot be used: {error}{remedy}") from error
    for unit in manifest.units:
        _check_file(model_dir / unit.file, unit.num_bytes)
    if not (model_dir / TOKENIZER_NAME).is_file():
        raise CheckpointError(f"{model_dir / TOKENIZER_NAME} is missing; import the model again")
    _check_small(model_dir / TOKENIZER_NAME)
    return manifest


def _check_small(path: Path) -> None:
    """Whatever is read whole is a file, where no reader waits for a writer, and of a size that can be.

    Raises:
        FileNotFoundError, OSError: it cannot be looked at.
    """
    stats = path.stat()
    if not stat.S_ISREG(stats.st_mode):
        raise CheckpointError(f"{path} is not a file; import the model again")
    if stats.st_size > MOST_BYTES:
        raise CheckpointError(f"{path} has {stats.st_size} bytes, far too many; import the model again")


def _check_file(path: Path, num_bytes: int) -> None:
    try:
        stats = path.stat()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; import the model again") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); import the model again") from error
    if not stat.S_ISREG(stats.st_mode):
        raise CheckpointError(f"{path} is not a file; import the model again")
    if stats.st_size != num_bytes:
        raise CheckpointError(f"{path} has {stats.st_size} bytes instead of {num_bytes}; import the model again")


def _unit_fields(unit: UnitEntry) -> dict[str, Any]:
    tensors = {
        name: {"offset": entry.offset, "shape": entry.shape, "format": entry.format.fields()}
        for name, entry in unit.tensors.items()
    }
    return {**{each.name: getattr(unit, each.name) for each in dataclass_fields(unit)}, "tensors": tensors}


def _unit(fields: Any, default: TensorFormat | None) -> UnitEntry:
    """``default``: the format of all its tensors, where a manifest names none."""
    fields = _typed(fields, dict)
    return UnitEntry(
        name=_field(fields, "name", str),
        file=_field(fields, "file", str),
        num_bytes=_field(fields, "num_bytes", int),
        checksum=_field(fields, "checksum", str),
        tensors={name: _tensor(entry, default) for name, entry in _field(fields, "tensors", dict).items()},
    )


def _tensor(fields: Any, default: TensorFormat | None) -> TensorEntry:
    fields = _typed(fields, dict)
    shape = tuple(_typed(size, int) for size in _field(fields, "shape", list))
    if any(size < 0 for size in shape):
        raise TypeError("a negative size in a shape")
    stored = default or format_from(_field(fields, "format", dict))
    return TensorEntry(offset=_field(fields, "offset", int), shape=shape, format=stored)


def _field(fields: dict[str, Any], name: str, kind: type[T]) -> T:
    try:
        return _typed(fields[name], kind)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None


def _typed(value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r:.40} is not of type {kind.__name__}")
    return value
