"""The weights of a model directory, to be stored in another format."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from engine.dtypes import DType
from engine.errors import CheckpointError
from engine.formats.operands import operand
from engine.formats.sizes import Plain
from engine.model.family import Config, TensorSpec, UnitSpec
from engine.weights.checks import check_units
from engine.weights.importers.sources import PIECE_BYTES, fill
from engine.weights.manifest import TOKENIZER_NAME, TensorEntry, UnitEntry, read_manifest

_SMALL_FILES = (TOKENIZER_NAME, "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


class ModelDirectory:
    """A model directory of plain tensors. Implements ``engine.weights.importing.WeightSource``."""

    def __init__(self, path: Path) -> None:
        """Raises ``CheckpointError`` where there is none, or it is damaged, or its tensors are not plain."""
        self.path = path
        self._manifest = manifest = read_manifest(path)
        check_units(manifest, path)
        self.config: Config = manifest.config
        self._units = {unit.name: unit for unit in manifest.units}
        self._open: tuple[str, int] | None = None
        for unit in manifest.units:
            for tensor in unit.tensors.values():
                if not isinstance(tensor.format, Plain):
                    raise CheckpointError(
                        f"{path} is stored in {tensor.format.name} already; import it from the checkpoint that it was "
                        "made of, or from a model directory with plain weights"
                    )

    def check(self, units: Iterable[UnitSpec]) -> None:
        """Nothing: that was done when it was opened."""

    def default_dtype(self, units: Iterable[UnitSpec]) -> DType:
        """As it is stored."""
        del units
        return self._manifest.dtype

    def tokenizer(self) -> dict[str, bytes]:
        """As they lie."""
        return {name: (self.path / name).read_bytes() for name in _SMALL_FILES if (self.path / name).is_file()}

    def pieces(self, unit: UnitSpec, tensor: TensorSpec) -> Iterator[tuple[str, Tensor]]:
        """A unit's file is read once more before, for its checksum.

        Raises:
            CheckpointError: the file is damaged.
        """
        found = self._units[unit.name]
        where = f"tensor {tensor.name!r} of {self.path / found.file}"
        fd = self._file(found)
        entry = found.tensors[tensor.name]
        for begin in range(0, entry.num_bytes, PIECE_BYTES):
            piece = bytearray(min(PIECE_BYTES, entry.num_bytes - begin))
            fill(memoryview(piece), fd, entry.offset + begin, self.path / found.file)
            yield where, _values(entry, piece)

    def release(self) -> None:
        """Close the file that is open."""
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    def _file(self, unit: UnitEntry) -> int:
        if self._open is None or self._open[0] != unit.name:
            self.release()
            path = self.path / unit.file
            try:
                with path.open("rb") as file:
                    checksum = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
                if checksum != unit.checksum:
                    raise CheckpointError(f"{path} is damaged: its checksum is wrong; import the model again")
                self._open = unit.name, os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise CheckpointError(f"reading {path} failed: {error.strerror or error}") from error
        return self._open[1]


def _values(entry: TensorEntry, piece: bytearray) -> Tensor:
    assert isinstance(entry.format, Plain)
    raw = torch.frombuffer(piece, dtype=torch.uint8)
    return operand(entry.format, raw, (len(piece) // entry.format.dtype.num_bytes,))
