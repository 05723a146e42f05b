"""Whether a model directory holds together: its files, its configuration and its tokenizer, each against the others.

Reads no weights and loads no torch, so that it can be asked before a job is stored. That the weights themselves are
undamaged, their checksums show when they are read.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from engine.dtypes import DType
from engine.errors import CheckpointError
from engine.model.family import Sizes, UnitSpec
from engine.model.registry import sizes_for
from engine.shape import ModelShape
from engine.weights.layout import UnitLayout
from engine.weights.manifest import MANIFEST_NAME, TOKENIZER_NAME, Manifest, UnitEntry

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer


def check_units(manifest: Manifest, model_dir: Path) -> Sizes:
    """The sizes that the configuration asks for, if the manifest lists just the units and tensors of such a model.

    Raises:
        CheckpointError: it does not; the sentence says what differs.
    """
    path = model_dir / MANIFEST_NAME
    try:
        sizes = sizes_for(manifest.config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    # Counted first: a configuration that asks for a billion layers must not have them listed.
    num_layers = sum(unit.name.startswith("layer.") for unit in manifest.units)
    if num_layers != sizes.shape.num_layers:
        raise CheckpointError(
            f"{path} lists {num_layers} layers, and its configuration asks for {sizes.shape.num_layers}; "
            "import the model again"
        )
    wanted = {unit.name: unit for unit in sizes.units()}
    found = {unit.name: unit for unit in manifest.units}
    for name in wanted.keys() ^ found.keys():
        what = "lists no unit" if name in wanted else "lists the unknown unit"
        raise CheckpointError(f"{path} {what} {name!r}; import the model again")
    for name, unit in wanted.items():
        _check_unit(found[name], unit, path)
    return sizes


def _check_unit(found: UnitEntry, wanted: UnitSpec, path: Path) -> None:
    shapes = {tensor.name: tensor.shape for tensor in wanted.tensors}
    for name in shapes.keys() ^ found.tensors.keys():
        what = "has no tensor" if name in shapes else "has the unknown tensor"
        raise CheckpointError(f"{path}: unit {wanted.name!r} {what} {name!r}; import the model again")
    for name, shape in shapes.items():
        if found.tensors[name].shape != shape:
            raise CheckpointError(
                f"{path}: tensor {name!r} of unit {wanted.name!r} has shape {found.tensors[name].shape}, and the "
                f"configuration asks for {shape}; import the model again"
            )
    layout = UnitLayout.of(wanted, {name: entry.format for name, entry in found.tensors.items()})
    if found.num_bytes != layout.num_bytes or dict(found.tensors) != dict(layout.tensors):
        raise CheckpointError(
            f"{path}: the {found.num_bytes} bytes of unit {wanted.name!r} are not laid out as tensors of these formats "
            f"are, in {layout.num_bytes} bytes; import the model again"
        )


def check_dtype(manifest: Manifest, dtype: DType, model_dir: Path) -> None:
    """Every weight has a value in the number type that is computed in.

    Raises:
        CheckpointError: float16 is too small for one.
    """
    if dtype is DType.FLOAT16 and manifest.beyond_float16:
        name, largest = max(manifest.beyond_float16.items(), key=lambda each: each[1])
        unit, _, tensor = name.partition("/")
        raise CheckpointError(
            f"{model_dir}: tensor {tensor!r} of unit {unit!r} holds {largest:g}, too large for float16; compute in "
            "another number type, with --dtype bfloat16 or --dtype float32"
        )


def check_tokens(tokenizer: "Tokenizer", shape: ModelShape, model_dir: Path) -> None:
    """Every token that the tokenizer or the configuration may ask for has a row in the embedding.

    Raises:
        CheckpointError: one has not.
    """
    for field, token_id in (
        ("bos_token_id", shape.bos_token_id), *(("eos_token_id", each) for each in shape.eos_token_ids)
    ):  # fmt: skip
        if token_id is not None and token_id >= shape.vocab_size:
            raise CheckpointError(
                f"{model_dir / MANIFEST_NAME}: {field} is {token_id}, beyond the vocabulary of {shape.vocab_size} "
                "tokens; import the model again"
            )
    if tokenizer.largest_id >= shape.vocab_size:
        raise CheckpointError(
            f"{model_dir / TOKENIZER_NAME} has token {tokenizer.largest_id}, beyond the vocabulary of "
            f"{shape.vocab_size} tokens: it is another model's; import the model again with its own tokenizer"
        )
