"""The manifest: JSON both ways, and a sentence for whatever can be wrong with a model directory."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.dtypes import DType
from engine.errors import CheckpointError
from engine.formats.sizes import Plain
from engine.weights.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    PAGE_BYTES,
    Manifest,
    TensorEntry,
    UnitEntry,
    is_model_dir,
    read_manifest,
)


def make_manifest() -> Manifest:
    units = tuple(
        UnitEntry(
            name, f"{name}.bin", PAGE_BYTES, "sha256:00", {"weight": TensorEntry(256, (3, 5), Plain(DType.FLOAT16))}
        )
        for name in ("embed", "layer.0", "head")
    )
    return Manifest(
        model_type="opt",
        config={"model_type": "opt", "nested": {"list": [1, 2.5, None, "ü"]}},
        dtype=DType.FLOAT16,
        units=units,
        num_bytes=3 * PAGE_BYTES,
        source="opt-tiny",
        created_by="overnight 0",
    )


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    manifest = make_manifest()
    folder = tmp_path / "model"
    folder.mkdir()
    for unit in manifest.units:
        (folder / unit.file).write_bytes(bytes(unit.num_bytes))
    (folder / "tokenizer.json").write_text("{}")
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return folder


def test_round_trip() -> None:
    assert Manifest.from_json(make_manifest().to_json()) == make_manifest()


def test_version_1_named_no_formats() -> None:
    fields = json.loads(make_manifest().to_json())
    assert fields["units"][0]["tensors"]["weight"]["format"] == {"name": "plain", "dtype": "float16"}
    for unit in fields["units"]:
        del unit["tensors"]["weight"]["format"]
    with pytest.raises(ValueError, match="its field 'format' is missing"):
        Manifest.from_json(json.dumps(fields))
    assert Manifest.from_json(json.dumps(fields | {"format_version": 1})) == make_manifest()


@pytest.mark.parametrize(
    ("described", "says"),
    [
        ({"name": "int3"}, "its format 'int3' is not one of plain, int4; upgrade overnight"),
        ({"name": ["plain"]}, "is not one of plain"),
        ({"name": "plain", "dtype": "int8"}, "its dtype 'int8' is not one of"),
        ({"name": "plain"}, "its field 'dtype' is missing"),
        ({"name": "plain", "dtype": "float32"}, "tensor 'weight' of unit 'embed' is float32, not float16"),
        ("plain", "wrong type"),
        ({}, "its field 'name' is missing"),
    ],
)
def test_what_is_no_format(described: object, says: str) -> None:
    fields = json.loads(make_manifest().to_json())
    fields["units"][0]["tensors"]["weight"]["format"] = described
    with pytest.raises(ValueError, match=says):
        Manifest.from_json(json.dumps(fields))


def test_a_complete_directory_is_read(model_dir: Path) -> None:
    assert is_model_dir(model_dir)
    assert read_manifest(model_dir) == make_manifest()


def refusal(model_dir: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_manifest(model_dir)
    return str(caught.value)


def test_an_absent_directory(tmp_path: Path) -> None:
    assert not is_model_dir(tmp_path / "none")
    assert "is not a directory" in refusal(tmp_path / "none")


def test_a_directory_without_manifest(model_dir: Path) -> None:
    (model_dir / MANIFEST_NAME).unlink()
    assert not is_model_dir(model_dir)
    assert "has no manifest.json" in refusal(model_dir)


def test_a_hugging_face_folder_is_told_from_a_broken_one(model_dir: Path) -> None:
    (model_dir / MANIFEST_NAME).unlink()
    (model_dir / "config.json").write_text("{}")
    assert "Hugging Face folder" in refusal(model_dir)


def test_an_unfinished_import_is_no_model_even_with_its_manifest(model_dir: Path) -> None:
    partial = model_dir.rename(model_dir.parent / ".model.partial-123")
    assert not is_model_dir(partial)
    assert "not finished" in refusal(partial)


def test_a_newer_format(model_dir: Path) -> None:
    fields = json.loads(make_manifest().to_json())
    fields["format_version"] = FORMAT_VERSION + 1
    (model_dir / MANIFEST_NAME).write_text(json.dumps(fields))
    assert "upgrade overnight" in refusal(model_dir)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no format_version"),
        ('{"format_version": 1}', "'model_type' is missing"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_what_is_no_manifest(model_dir: Path, text: str, says: str) -> None:
    (model_dir / MANIFEST_NAME).write_text(text)
    message = refusal(model_dir)
    assert says in message
    assert str(model_dir / MANIFEST_NAME) in message
    assert message.endswith("import the model again")


@pytest.mark.parametrize("field", ["config", "units", "num_bytes", "source"])
def test_a_field_of_another_type_is_named(model_dir: Path, field: str) -> None:
    path = model_dir / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: None}))
    assert f"a field has the wrong type ({field}: None is not of type" in refusal(model_dir)


def test_a_manifest_of_another_models_configuration(model_dir: Path) -> None:
    path = model_dir / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "gpt2"}))
    assert "its model_type is 'gpt2', and its configuration's another; import the model again" in refusal(model_dir)


def test_a_manifest_that_is_not_utf8(model_dir: Path) -> None:
    (model_dir / MANIFEST_NAME).write_bytes(b"\xff\xfe")
    assert "cannot be read" in refusal(model_dir)


def test_a_missing_file(model_dir: Path) -> None:
    (model_dir / "layer.0.bin").unlink()
    assert f"{model_dir / 'layer.0.bin'} is missing" in refusal(model_dir)


def test_a_missing_tokenizer(model_dir: Path) -> None:
    (model_dir / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in refusal(model_dir)


def test_a_file_cut_short(model_dir: Path) -> None:
    (model_dir / "head.bin").write_bytes(bytes(PAGE_BYTES - 1))
    assert "head.bin has 4095 bytes instead of 4096" in refusal(model_dir)


def test_a_file_name_cannot_lead_out_of_the_directory(model_dir: Path) -> None:
    fields = json.loads(make_manifest().to_json())
    fields["units"][0]["file"] = "../../etc/passwd"
    (model_dir / MANIFEST_NAME).write_text(json.dumps(fields))
    assert "not a plain name" in refusal(model_dir)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"offset": PAGE_BYTES}, "does not lie within"),
        ({"offset": -256}, "does not lie within"),
        ({"offset": 100}, "does not lie within"),
        ({"shape": [3, 5000]}, "does not lie within"),
        ({"shape": [-3, 5]}, "negative"),
    ],
)
def test_a_tensor_outside_of_its_file(change: dict[str, object], says: str) -> None:
    fields = json.loads(make_manifest().to_json())
    fields["units"][1]["tensors"]["weight"].update(change)
    with pytest.raises(ValueError, match=says):
        Manifest.from_json(json.dumps(fields))


def paths(value: object, prefix: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """Where every value of a JSON document lies, its config aside, which may be anything."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [prefix] * bool(prefix) + [p for key, item in items if key != "config" for p in paths(item, (*prefix, key))]


@given(
    where=st.sampled_from(paths(json.loads(make_manifest().to_json()))),
    junk=st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=3), st.lists, max_leaves=3),
)
def test_no_damage_ends_in_anything_but_a_sentence(where: tuple[object, ...], junk: object) -> None:
    """A value of the wrong kind anywhere is a ValueError or harmless (a list is a shape, a text a name)."""
    fields = json.loads(make_manifest().to_json())
    holder = fields
    for key in where[:-1]:
        holder = holder[key]
    holder[where[-1]] = junk
    with suppress(ValueError):
        Manifest.from_json(json.dumps(fields)).check_integrity()
