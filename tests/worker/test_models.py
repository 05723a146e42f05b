import os
from dataclasses import replace
from pathlib import Path

import pytest

from worker.models import ModelNotFound, known_models, model_dir_for, resolve_model
from worker.settings import Settings, load_settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return replace(load_settings({}, os.environ), models_dir=tmp_path / "models")


def test_a_name_is_found_in_the_model_folder(settings: Settings, tiny_model: Path) -> None:
    settings.models_dir.mkdir()
    (settings.models_dir / "tiny").symlink_to(tiny_model)

    ref = resolve_model("tiny", settings)

    assert ref.reference == "tiny"
    assert ref.is_imported
    assert model_dir_for(ref, settings) == settings.models_dir / "tiny"
    assert known_models(settings) == ["tiny"]


def test_a_path_is_remembered_whole(settings: Settings, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_model.parent)

    for given in (str(tiny_model), tiny_model.name, f"./{tiny_model.name}"):
        assert resolve_model(given, settings).reference == str(tiny_model)


def test_a_hugging_face_folder_gets_a_place_that_changes_with_its_files(settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "my opt"
    folder.mkdir()
    (folder / "config.json").write_text("{}")

    ref = resolve_model(str(folder), settings)
    before = model_dir_for(ref, settings)
    (folder / "model.safetensors").write_bytes(b"weights")

    assert not ref.is_imported
    assert before.parent == settings.models_dir
    assert before.name.startswith("my-opt-")
    assert model_dir_for(ref, settings) not in (before, folder)


@pytest.mark.parametrize("name", ["", "nothing-here", "./nothing-here", "/nowhere/at/all", "facebook/opt-125m"])
def test_what_is_not_there_is_said_with_the_remedy(settings: Settings, name: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        resolve_model(name, settings)

    assert "overnight" in str(caught.value)
    assert name in str(caught.value)


def test_an_unfinished_model_directory_is_no_model(settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    folder.mkdir()
    (folder / "layer-0.bin").write_bytes(b"x")

    with pytest.raises(ModelNotFound, match=r"manifest\.json.*overnight import"):
        resolve_model(str(folder), settings)


def test_an_unfinished_import_in_the_model_folder_is_named(settings: Settings) -> None:
    (settings.models_dir / "half").mkdir(parents=True)

    with pytest.raises(ModelNotFound, match=r"models/half is not a model: it has no manifest\.json"):
        resolve_model("half", settings)


def test_a_file_is_no_model(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(b"x")

    with pytest.raises(ModelNotFound, match="is a file"):
        resolve_model(str(file), settings)
