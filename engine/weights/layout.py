"""Where the tensors of a unit lie in its file, and so how large it is: what the writer writes, checks check and plans
count on. No torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Self

from engine.dtypes import DType
from engine.formats.int4_sizes import Int4
from engine.formats.sizes import Plain, TensorFormat, token_flops
from engine.model.family import EMBED, HEAD, TABLES, Sizes, TensorSpec, UnitSpec
from engine.model.registry import sizes_for
from engine.units import align_up
from engine.weights.manifest import PAGE_BYTES, Manifest, TensorEntry
from engine.weights.stored import TENSOR_ALIGNMENT, StoredTensor, StoredWeights


@dataclass(frozen=True, slots=True)
class UnitLayout:
    """Where the tensors of a unit will lie in its file."""

    tensors: Mapping[str, TensorEntry]
    num_bytes: int
    """The file's size, a multiple of ``PAGE_BYTES``."""

    @classmethod
    def of(cls, unit: UnitSpec, formats: Mapping[str, TensorFormat]) -> Self:
        """The layout of ``unit``, its tensors stored in these formats: in order, each aligned."""
        stored = [StoredTensor(formats[tensor.name], tensor.shape) for tensor in unit.tensors]
        offsets, num_bytes = _places(stored)
        entries = (TensorEntry(offset, each.shape, each.format) for offset, each in zip(offsets, stored, strict=True))
        return cls({tensor.name: entry for tensor, entry in zip(unit.tensors, entries, strict=True)}, num_bytes)

    @classmethod
    def plain(cls, unit: UnitSpec, dtype: DType) -> Self:
        """The layout of ``unit`` with all its tensors plain, in ``dtype``."""
        return cls.of(unit, {tensor.name: Plain(dtype) for tensor in unit.tensors})


def _places(tensors: Iterable[StoredTensor]) -> tuple[list[int], int]:
    """Where tensors begin in the file of a unit, in order, each aligned; and the file's size."""
    offsets, end = [], 0
    for each in tensors:
        offsets.append(align_up(end, TENSOR_ALIGNMENT))
        end = offsets[-1] + each.format.num_bytes(each.shape)
    return offsets, max(PAGE_BYTES, align_up(end, PAGE_BYTES))


@dataclass(frozen=True, slots=True)
class Storing:
    """In which formats an import stores a model's tensors."""

    dtype: DType
    """How plain tensors are stored, and what the others are rounded to before."""
    matrices: Int4 | None = None
    """The format of the layers' matrices; ``None``: plain, as everything else."""
    tables: bool = False
    """Whether the token tables, before the layers and behind them, have that format, too."""

    def formats_of(self, unit: UnitSpec) -> dict[str, TensorFormat]:
        """By the names of a unit's tensors. Norms, biases and positions are plain: they are small, or looked up."""
        return {tensor.name: self._format(unit, tensor) for tensor in unit.tensors}

    def layouts(self, units: Iterable[UnitSpec]) -> dict[str, UnitLayout]:
        """The layouts of some units, by their names."""
        return {unit.name: UnitLayout.of(unit, self.formats_of(unit)) for unit in units}

    def _format(self, unit: UnitSpec, tensor: TensorSpec) -> TensorFormat:
        plain, found = Plain(self.dtype), self.matrices
        if found is None or len(tensor.shape) != 2:
            return plain
        if unit.name not in (EMBED, HEAD):
            return found
        # What is looked up row by row must not be padded; no well-known model's table would be.
        is_table = self.tables and tensor.name in TABLES and found.unpacked_shape(tensor.shape) == tensor.shape
        return found if is_table else plain


def stored_as(sizes: Sizes, storing: Storing) -> StoredWeights:
    """A model as its import would store it."""
    return _stored(sizes, storing.dtype, storing.layouts(sizes.units()))


def in_format(stored: StoredWeights, matrices: Int4 | None) -> StoredWeights:
    """The same model if it were stored with its layers' matrices in another format; ``None``: plain."""
    formats = Plain(stored.dtype) if matrices is None else matrices
    tensors, num_bytes = dict(stored.unit_tensors), dict(stored.unit_bytes)
    for unit, its in stored.unit_tensors.items():
        if unit not in (EMBED, HEAD):
            tensors[unit] = tuple(replace(each, format=formats) if len(each.shape) == 2 else each for each in its)
            _, num_bytes[unit] = _places(tensors[unit])
    return replace(stored, unit_tensors=tensors, unit_bytes=num_bytes)


def stored_in(manifest: Manifest) -> StoredWeights:
    """A model as it is stored.

    Raises:
        CheckpointError: its configuration is of no family that there is.
    """
    units = {unit.name: UnitLayout(unit.tensors, unit.num_bytes) for unit in manifest.units}
    return _stored(sizes_for(manifest.config), manifest.dtype, units)


def _stored(sizes: Sizes, dtype: DType, units: Mapping[str, UnitLayout]) -> StoredWeights:
    return StoredWeights(
        dtype=dtype,
        unit_bytes={name: unit.num_bytes for name, unit in units.items()},
        unit_tensors={
            name: tuple(StoredTensor(entry.format, entry.shape) for entry in unit.tensors.values())
            for name, unit in units.items()
        },
        unit_flops=flops_of(sizes),
    )


def flops_of(sizes: Sizes) -> dict[str, float]:
    """Operations of one token in each unit but the embedding, where it is looked up: what is multiplied there, once a
    token and not once a layer, is left out."""
    units = {unit.name: unit for unit in sizes.units()}
    flops = {name: token_flops(each.shape for each in unit.tensors) for name, unit in units.items() if name != EMBED}
    if sizes.head_needs_embedding():
        flops[HEAD] += token_flops([units[EMBED].tensors[0].shape])
    return flops
