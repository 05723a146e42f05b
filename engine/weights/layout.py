"""Where the tensors of a unit lie in its file, and so how large it is: what the writer writes, checks check and plans
count on. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from engine.dtypes import DType
from engine.formats.sizes import num_bytes, token_flops
from engine.model.family import EMBED, HEAD, Sizes, UnitSpec
from engine.model.registry import sizes_for
from engine.units import align_up
from engine.weights.manifest import PAGE_BYTES, TENSOR_ALIGNMENT, Manifest, TensorEntry
from engine.weights.stored import StoredWeights


@dataclass(frozen=True, slots=True)
class UnitLayout:
    """Where the tensors of a unit will lie in its file."""

    tensors: Mapping[str, TensorEntry]
    num_bytes: int
    """The file's size, a multiple of ``PAGE_BYTES``."""

    @classmethod
    def of(cls, unit: UnitSpec, dtype: DType) -> Self:
        """The layout of ``unit`` stored in ``dtype``: its tensors in order, each aligned."""
        tensors, end = {}, 0
        for tensor in unit.tensors:
            offset = align_up(end, TENSOR_ALIGNMENT)
            tensors[tensor.name] = TensorEntry(offset, tensor.shape)
            end = offset + num_bytes(tensor.shape, dtype)
        return cls(tensors, max(PAGE_BYTES, align_up(end, PAGE_BYTES)))


def stored_as(sizes: Sizes, dtype: DType) -> StoredWeights:
    """A model as its import would store it in ``dtype``."""
    units = sizes.units()
    return StoredWeights(dtype, {unit.name: UnitLayout.of(unit, dtype).num_bytes for unit in units}, flops_of(sizes))


def stored_in(manifest: Manifest) -> StoredWeights:
    """A model as it is stored.

    Raises:
        CheckpointError: its configuration is of no family that there is.
    """
    flops = flops_of(sizes_for(manifest.config))
    return StoredWeights(manifest.dtype, {unit.name: unit.num_bytes for unit in manifest.units}, flops)


def flops_of(sizes: Sizes) -> dict[str, float]:
    """Operations of one token in each unit but the embedding, where it is looked up: what is multiplied there, once a
    token and not once a layer, is left out."""
    units = {unit.name: unit for unit in sizes.units()}
    flops = {name: token_flops(each.shape for each in unit.tensors) for name, unit in units.items() if name != EMBED}
    if sizes.head_needs_embedding():
        flops[HEAD] += token_flops([units[EMBED].tensors[0].shape])
    return flops
