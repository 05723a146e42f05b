"""Imports into four bits: the described bytes, whatever they are read from, and nothing by halves."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.dtypes import DType
from engine.errors import CheckpointError
from engine.formats.int4_sizes import Int4
from engine.formats.sizes import Plain
from engine.memory.aligned import aligned_empty
from engine.model.family import EMBED, HEAD, TABLES
from engine.weights.files import WeightFiles
from engine.weights.importers import model_directory, sources
from engine.weights.importing import import_checkpoint
from engine.weights.manifest import Manifest, read_manifest
from tests.engine import checkpoints, llama_checkpoints
from tests.engine.checkpoints import make_checkpoint
from tests.engine.int4_reference import packed, unpacked
from tests.engine.test_import import read_back, refusal

OF_LLAMA = ("llama, three heads, tied", "qwen3, biases, tied")


def make(folder: Path, variant: str) -> None:
    if variant in checkpoints.VARIANTS:
        make_checkpoint(folder, **checkpoints.VARIANTS[variant])
    else:
        llama_checkpoints.make_checkpoint(folder, variant)


def raw_tensors(model_dir: Path, unit: str) -> dict[str, bytes]:
    """The stored bytes of each tensor of a unit."""
    with WeightFiles.open(model_dir) as files:
        raw = aligned_empty(files.num_bytes(unit))
        files.read_unit(unit, raw)
        entries = files.entries(unit).items()
        return {name: bytes(raw[each.offset : each.offset + each.num_bytes].numpy()) for name, each in entries}


def unit_files(manifest: Manifest, folder: Path) -> dict[str, bytes]:
    return {unit.name: (folder / unit.file).read_bytes() for unit in manifest.units}


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16])
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("variant", ["125m-like", "350m-like", "odd-heads", "untied", *OF_LLAMA])
def test_matrices_of_layers_are_packed_and_everything_else_is_plain(
    variant: str, group: int, dtype: DType, tmp_path: Path
) -> None:
    make(tmp_path / "hf", variant)
    plain = import_checkpoint(tmp_path / "hf", tmp_path / "plain", dtype)
    manifest = import_checkpoint(tmp_path / "hf", tmp_path / "int4", dtype, matrices=Int4(group))
    assert read_manifest(tmp_path / "int4") == manifest
    assert manifest.dtype is plain.dtype is dtype
    plain_units = read_back(tmp_path / "plain")
    matrices = 0
    for unit in manifest.units:
        found, wanted = raw_tensors(tmp_path / "int4", unit.name), plain_units[unit.name]
        assert found.keys() == wanted.keys()
        for name, values in wanted.items():
            if unit.name in (EMBED, HEAD) or values.ndim == 1:
                assert unit.tensors[name].format == Plain(dtype)
                assert found[name] == bytes(values.contiguous().view(torch.uint8).numpy())
                continue
            matrices += 1
            assert unit.tensors[name].format == Int4(group)
            assert found[name] == packed(values.float().numpy(), group)
            # And they are near what they stand for.
            rows, width = values.shape
            back = unpacked(found[name], (rows, width), group, DType.FLOAT32)[:, :width]
            assert np.abs(back - values.float().numpy()).max() < float(values.float().abs().max()) / 6
    assert matrices == 4 * (len(manifest.units) - 2)


@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.FLOAT16])
def test_a_checkpoint_and_a_model_directory_of_it_give_the_same_bytes(
    dtype: DType, tables: bool, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path / "hf", tie_word_embeddings=False)
    import_checkpoint(tmp_path / "hf", tmp_path / "plain", dtype)
    expected = import_checkpoint(tmp_path / "hf", tmp_path / "direct", dtype, matrices=Int4(), tables=tables)
    found = import_checkpoint(tmp_path / "plain", tmp_path / "after", matrices=Int4(), tables=tables)
    assert found.units == expected.units
    assert found.dtype is dtype
    assert found.config == expected.config
    assert unit_files(found, tmp_path / "after") == unit_files(expected, tmp_path / "direct")
    tokenizer = (tmp_path / "after" / "tokenizer.json").read_bytes()
    assert tokenizer == (tmp_path / "direct" / "tokenizer.json").read_bytes()


def test_bytes_do_not_depend_on_how_a_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path / "hf")
    expected = import_checkpoint(tmp_path / "hf", tmp_path / "whole", matrices=Int4())
    import_checkpoint(tmp_path / "hf", tmp_path / "plain")
    for number, most in enumerate((4 * 63, 4 * 65, 4 * 1000)):
        monkeypatch.setattr(sources, "PIECE_BYTES", most)
        monkeypatch.setattr(model_directory, "PIECE_BYTES", most)
        for name in ("hf", "plain"):
            found = import_checkpoint(tmp_path / name, tmp_path / f"{name}-{number}", matrices=Int4())
            assert found.units == expected.units


def test_tables_are_packed_if_asked_for(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf", tie_word_embeddings=False)
    manifest = import_checkpoint(tmp_path / "hf", tmp_path / "model", matrices=Int4(), tables=True)
    formats = {f"{unit.name}/{name}": entry.format for unit in manifest.units for name, entry in unit.tensors.items()}
    for unit, table in zip((EMBED, HEAD), TABLES, strict=True):
        assert formats[f"{unit}/{table}"] == Int4()
    assert formats[f"{EMBED}/positions.weight"] == Plain(DType.FLOAT32)


def test_a_table_whose_rows_would_be_padded_stays_plain(tmp_path: Path) -> None:
    """Its rows are looked up one by one."""
    make_checkpoint(tmp_path / "hf", **checkpoints.VARIANTS["odd-heads"])
    manifest = import_checkpoint(tmp_path / "hf", tmp_path / "model", matrices=Int4(), tables=True)
    embed = next(unit for unit in manifest.units if unit.name == EMBED)
    assert embed.tensors["tokens.weight"].format == Plain(DType.FLOAT32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, -7e4])
def test_a_value_without_a_place_in_the_format_is_refused_by_its_tensor(value: float, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "hf").model
    with torch.no_grad():
        model.model.decoder.layers[2].fc2.weight[5, 7] = value
    model.save_pretrained(tmp_path / "hf")
    text = refusal(tmp_path / "hf", tmp_path / "int4", matrices=Int4())
    assert "tensor model.decoder.layers.2.fc2.weight of" in text
    assert "it can be stored plain, but not in four bits" in text
    import_checkpoint(tmp_path / "hf", tmp_path / "plain")
    text = refusal(tmp_path / "plain", tmp_path / "int4", matrices=Int4())
    assert "tensor 'fc2.weight' of" in text
    assert "layer.2" in text


def test_four_bits_of_four_bits_are_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "int4", matrices=Int4())
    assert "is stored in int4 already" in refusal(tmp_path / "int4", tmp_path / "again", matrices=Int4())
    assert "needs no import" in refusal(tmp_path / "int4", tmp_path / "again")


def test_a_damaged_model_directory_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "plain")
    path = tmp_path / "plain" / "layer.1.bin"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    text = refusal(tmp_path / "plain", tmp_path / "int4", matrices=Int4())
    assert "layer.1.bin is damaged: its checksum is wrong" in text


@pytest.mark.parametrize("group", [0, 48, -64, 64.0, "64", True, None])
def test_a_manifest_with_another_group_is_refused(group: object, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "int4", matrices=Int4())
    path = tmp_path / "int4" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["units"][1]["tensors"]["fc1.weight"]["format"]["group"] = group
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"its group of .* values is not one of 32, 64, 128"):
        read_manifest(tmp_path / "int4")
