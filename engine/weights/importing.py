"""From whatever holds a model's weights to a model directory, piece by piece: a little memory suffices for any model.

``importers`` has one module for each kind of source.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from engine.dtypes import DType
from engine.errors import CheckpointError
from engine.formats.int4 import pack
from engine.formats.int4_sizes import Int4
from engine.memory.tensors import torch_dtype
from engine.model.family import Config, TensorSpec, UnitSpec
from engine.model.registry import sizes_for
from engine.weights.importers.huggingface import HuggingFaceFolder
from engine.weights.importers.model_directory import ModelDirectory
from engine.weights.importers.tokenizer_files import check_vocabulary
from engine.weights.layout import Storing, UnitLayout
from engine.weights.manifest import Manifest, is_model_dir
from engine.weights.writer import Buffer, ModelWriter

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and in all."""
Pieces = Iterator[tuple[str, Tensor]]
"""The values of a tensor, flat and row-major, each piece with the name of what it is from."""
_FLOAT16_MAX = torch.finfo(torch.float16).max
_PACKED_VALUES = 1 << 20
"""Values that are packed together: few enough for a processor's caches."""


class WeightSource(Protocol):
    """A checkpoint of some kind. ``release`` it when done."""

    path: Path
    config: Config
    """A Hugging Face ``config.json``, perhaps with its ``generation_config.json`` inside."""

    def check(self, units: Iterable[UnitSpec]) -> None:
        """Raise ``CheckpointError`` unless every tensor of these units is there, and none that would be forgotten."""

    def default_dtype(self, units: Iterable[UnitSpec]) -> DType:
        """How it stores its weights, or says that they should be.

        Raises:
            CheckpointError: in no number type that we store.
        """

    def tokenizer(self) -> Mapping[str, bytes]:
        """The tokenizer's files by their names; ``tokenizer.json`` is among them.

        Raises:
            CheckpointError: there is no tokenizer, or it is damaged.
        """

    def pieces(self, unit: UnitSpec, tensor: TensorSpec) -> Pieces:
        """The values of one tensor of a unit; each piece is valid until the next is asked for."""

    def release(self) -> None:
        """Give memory and descriptors back; what is needed once more is opened again."""


def import_checkpoint(
    source: Path,
    destination: Path,
    dtype: DType | None = None,
    *,
    matrices: Int4 | None = None,
    tables: bool = False,
    on_progress: Progress | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Makes a model directory, whole or not at all.

    Args:
        source: a Hugging Face folder; where matrices get another format, a model directory of plain tensors, too.
        destination: where the model directory will be; must not exist.
        dtype: how plain weights are stored, and what the others are rounded to before; ``None``: as the source says.
        matrices: the format of the layers' matrices; ``None``: plain.
        tables: whether the token tables have it, too.
        on_progress: told of bytes written, and of how many there will be.
        warn: told what is odd, but no reason to refuse.

    Raises:
        CheckpointError: the source is not a model we can run, a value does not fit the format, or the destination
            exists.
        DiskFull: no room for the model directory.
    """
    is_stored = matrices is not None and is_model_dir(source)
    opened: WeightSource = ModelDirectory(source) if is_stored else HuggingFaceFolder(source)
    try:
        return _import(opened, destination, dtype, matrices, tables, _Reporter(on_progress), warn)
    finally:
        opened.release()


def _import(
    source: WeightSource,
    destination: Path,
    dtype: DType | None,
    matrices: Int4 | None,
    tables: bool,
    report: "_Reporter",
    warn: Callable[[str], None],
) -> Manifest:
    sizes = sizes_for(source.config)
    units = sizes.units()
    tokenizer = source.tokenizer()
    warning = check_vocabulary(tokenizer, sizes.shape.vocab_size, source.path)
    if warning is not None:
        warn(warning)
    source.check(units)
    storing = Storing(dtype or source.default_dtype(units), matrices, tables)
    layouts = storing.layouts(units)
    report.total = sum(layout.num_bytes for layout in layouts.values())
    beyond: dict[str, float] = {}
    with ModelWriter(destination, report.total) as writer:
        for unit in units:
            contents = _contents(source, unit, layouts[unit.name], storing.dtype, beyond)
            writer.write_unit(unit.name, layouts[unit.name], report.counted(contents))
            source.release()
        for name, content in tokenizer.items():
            writer.write_file(name, content)
        manifest = Manifest(
            model_type=source.config["model_type"],
            config=source.config,
            dtype=storing.dtype,
            units=writer.units,
            num_bytes=report.total,
            source=source.path.resolve().name,
            created_by=_created_by(),
            beyond_float16=beyond,
        )
        writer.commit(manifest)
        report.finish()
    return manifest


def _contents(
    source: WeightSource, unit: UnitSpec, layout: UnitLayout, dtype: DType, beyond: dict[str, float]
) -> Iterator[tuple[str, Iterator[Buffer]]]:
    """The bytes of each tensor of a unit, in its format; ``beyond``: see ``_cast``."""
    for tensor in unit.tensors:
        pieces = _cast(source.pieces(unit, tensor), dtype, f"{unit.name}/{tensor.name}", beyond)
        stored = layout.tensors[tensor.name].format
        if isinstance(stored, Int4):
            yield tensor.name, _packed(stored, tensor.shape[-1], pieces)
        else:
            yield tensor.name, (_bytes(piece) for _, piece in pieces)


def _cast(pieces: Pieces, dtype: DType, name: str, beyond: dict[str, float]) -> Pieces:
    """The same values in ``dtype``; of those that float16 cannot hold, the largest is put into ``beyond``.

    Raises:
        CheckpointError: a value does not fit ``dtype``.
    """
    for where, piece in pieces:
        cast = piece.to(torch_dtype(dtype))
        largest = _overflow(piece, cast)
        if largest is not None:
            raise CheckpointError(
                f"{where} holds {largest:g}, too large for {dtype}; choose --dtype bfloat16 or float32"
            )
        lowest, highest = (float(each) for each in cast.aminmax())
        if _FLOAT16_MAX < max(-lowest, highest) < math.inf:
            beyond[name] = max(-lowest, highest, beyond.get(name, 0.0))
        yield where, cast


def _overflow(piece: Tensor, cast: Tensor) -> float | None:
    """The largest of the finite values that became infinite."""
    if torch.finfo(cast.dtype).max >= torch.finfo(piece.dtype).max:
        return None
    lowest, highest = cast.aminmax()  # many times cheaper than looking for infinities, which are hardly ever there
    if lowest.isfinite() and highest.isfinite():
        return None
    lost = piece[cast.isinf() & piece.isfinite()].abs()
    return lost.max().item() if lost.numel() else None


def _packed(stored: Int4, width: int, pieces: Pieces) -> Iterator[Buffer]:
    """Codes row by row; scales and minima, an eighth of them, are kept for the end.

    Raises:
        CheckpointError: a value has no place in the format.
    """
    scales, minima = [], []
    for where, rows_RI in _whole_rows(width, pieces):
        for some in torch.split(rows_RI, max(1, _PACKED_VALUES // width)):
            try:
                codes_RC, scale_RG, minimum_RG = pack(stored, some)
            except ValueError as error:
                raise CheckpointError(f"{where} holds {error}: it can be stored plain, but not in four bits") from None
            scales.append(scale_RG)
            minima.append(minimum_RG)
            yield _bytes(codes_RC)
    yield from map(_bytes, (*scales, *minima))


def _whole_rows(width: int, pieces: Pieces) -> Pieces:
    """The same values as rows, ``[R, width]``."""
    rest: Tensor | None = None
    for where, piece in pieces:
        values = piece if rest is None else torch.cat((rest, piece))
        end = len(values) // width * width
        if end:
            yield where, values[:end].view(-1, width)
        rest = values[end:].clone()  # the memory of a piece is the next one's, too


def _bytes(values: Tensor) -> Buffer:
    return values.contiguous().view(torch.uint8).view(-1).numpy().data


class _Reporter:
    """Counts bytes as they pass."""

    def __init__(self, on_progress: Progress | None) -> None:
        self._on_progress = on_progress
        self.total = 0
        """Bytes that there will be."""
        self._done = 0

    def counted(self, contents: Iterable[tuple[str, Iterable[Buffer]]]) -> Iterator[tuple[str, Iterator[Buffer]]]:
        for name, pieces in contents:
            yield name, self._count(pieces)

    def finish(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self.total, self.total)

    def _count(self, pieces: Iterable[Buffer]) -> Iterator[Buffer]:
        for piece in pieces:
            yield piece
            self._done += memoryview(piece).nbytes
            if self._on_progress is not None:
                self._on_progress(self._done, self.total)


def _created_by() -> str:
    try:
        return f"overnight {version('overnight')}"
    except PackageNotFoundError:
        return "overnight"
