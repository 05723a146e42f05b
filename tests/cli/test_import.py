import json
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Run, write_rows


def test_a_folder_becomes_a_model_that_is_listed_by_its_name(home: Path, run: Run, checkpoint: Path) -> None:
    done = run("import", str(checkpoint))
    assert (done.exit_code, done.stdout) == (0, f"{home / 'models' / 'tiny'}\n")
    assert home.stat().st_mode & 0o777 == 0o700
    (entry,) = json.loads(run("models", "--json").stdout)["models"]
    assert (entry["name"], entry["family"], entry["dtype"]) == ("tiny", "opt", "float32")
    assert "tiny" in run("models").stdout


def test_a_name_a_path_and_a_dtype_are_heeded(home: Path, run: Run, checkpoint: Path) -> None:
    assert run("import", str(checkpoint), "small", "--dtype", "bfloat16").exit_code == 0
    assert run("import", str(checkpoint), "./here/big").exit_code == 0
    (entry,) = json.loads(run("models", "--json").stdout)["models"]
    assert (entry["name"], entry["dtype"]) == ("small", "bfloat16")
    assert Path("here/big/manifest.json").exists()


def test_an_existing_model_is_not_touched(home: Path, run: Run, checkpoint: Path) -> None:
    run("import", str(checkpoint))
    before = (home / "models" / "tiny" / "manifest.json").stat().st_mtime_ns
    done = run("import", str(checkpoint))
    assert done.exit_code == 2
    assert "exists already" in done.stderr
    assert (home / "models" / "tiny" / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("destination", ["./file/x", "./file/x/y", "/dev/null/x"])
def test_a_place_below_a_file_is_one_sentence(home: Path, run: Run, checkpoint: Path, destination: str) -> None:
    Path("file").write_text("x")
    done = run("import", str(checkpoint), destination)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", [" ", "a\nb", "./here/a\tb", " a"])
def test_a_name_that_no_line_could_show_is_refused(home: Path, run: Run, checkpoint: Path, name: str) -> None:
    done = run("import", str(checkpoint), name)
    assert done.exit_code == 2
    assert "is no name for a model" in done.stderr


def test_a_model_by_its_name_needs_no_import(home: Path, run: Run, checkpoint: Path) -> None:
    run("import", str(checkpoint))
    done = run("import", "tiny", "other")
    assert done.exit_code == 3
    assert "is a model directory already; it needs no import" in done.stderr


def test_a_manifest_that_does_not_fit_its_model_is_named(home: Path, run: Run, checkpoint: Path) -> None:
    run("import", str(checkpoint), "--weight-format", "int4")
    path = home / "models" / "tiny-int4" / "manifest.json"
    text = path.read_text()
    for change in (('"group": 64', '"group": 128'), ('"model_type": "opt",', '"model_type": "gpt2",')):
        assert change[0] in text
        path.write_text(text.replace(*change, 1))
        done = run("models", "--json")
        assert json.loads(done.stdout) == {"models": []}
        assert str(path) in done.stderr


@pytest.mark.parametrize("source", ["nothing-here", "/no/such/folder"])
def test_a_source_that_is_absent_is_named(home: Path, run: Run, source: str) -> None:
    done = run("import", source)
    assert done.exit_code == 3
    assert source in done.stderr
    assert not home.exists()


def test_a_folder_that_is_no_checkpoint_leaves_nothing(home: Path, run: Run, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, "broken")
    Path("broken/model.safetensors").write_bytes(b"\x00" * 100)
    done = run("import", "broken")
    assert done.exit_code == 3
    assert "broken" in done.stderr
    assert json.loads(run("models", "--json").stdout) == {"models": []}


def test_a_damaged_model_is_named_beside_the_good_ones(home: Path, run: Run, checkpoint: Path) -> None:
    run("import", str(checkpoint))
    run("import", str(checkpoint), "cut")
    (home / "models" / "cut" / "tokenizer.json").unlink()
    done = run("models", "--json")
    assert [entry["name"] for entry in json.loads(done.stdout)["models"]] == ["tiny"]
    assert "cut" in done.stderr
    doctor = run("doctor", "--json")
    assert doctor.exit_code == 1
    failed = [check for check in json.loads(doctor.stdout)["checks"] if check["status"] == "fail"]
    assert [(check["name"], "cut" in check["detail"]) for check in failed] == [("models", True)]


def test_a_folder_without_a_tokenizer_says_which_files_to_copy(home: Path, run: Run, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, "mute")
    Path("mute/tokenizer.json").unlink()
    done = run("import", "mute")
    assert done.exit_code == 3
    assert "copy tokenizer.json, or vocab.json and merges.txt" in done.stderr
    assert json.loads(run("models", "--json").stdout) == {"models": []}
    dataset = write_rows(Path("d.jsonl"), {"prompt": "a"})
    done = run("run", dataset, "--model", "mute", "--task", "generate", "-o", "out")
    assert done.exit_code == 3
    assert "copy tokenizer.json" in done.stderr
    assert not (home / "overnight.db").exists()


def test_the_hint_after_an_import_fits_every_model(home: Path, run: Run, checkpoint: Path) -> None:
    done = run("import", str(checkpoint))
    assert "--model tiny --task generate|score|choose" in done.stderr


def test_four_bits_from_a_checkpoint_or_from_a_model_by_its_name(home: Path, run: Run, checkpoint: Path) -> None:
    assert run("import", str(checkpoint), "tiny").exit_code == 0
    done = run("import", "tiny", "--weight-format", "int4")
    assert (done.exit_code, done.stdout) == (0, f"{home / 'models' / 'tiny-int4'}\n")
    assert "4-bit and float32 weights" in done.stderr
    assert run("import", str(checkpoint), "direct", "--weight-format", "int4", "--quantize-embeddings").exit_code == 0
    listed = json.loads(run("models", "--json").stdout)["models"]
    assert [entry["weight_format"] for entry in listed] == ["int4", "plain", "int4"]
    head, *lines = (line.split() for line in run("models").stdout.splitlines())
    assert head == ["NAME", "FAMILY", "WEIGHTS", "DTYPE", "SIZE", "PATH"]
    assert [line[:4] for line in lines] == [
        ["direct", "opt", "int4", "float32"],
        ["tiny", "opt", "plain", "float32"],
        ["tiny-int4", "opt", "int4", "float32"],
    ]
    sizes = {entry["name"]: entry["bytes"] for entry in listed}
    assert sizes["direct"] <= sizes["tiny-int4"] < sizes["tiny"]
    again = run("import", "tiny-int4", "again", "--weight-format", "int4")
    assert again.exit_code == 3
    assert "is stored in int4 already" in again.stderr
    plain = run("import", "./models/tiny", "copy")
    assert plain.exit_code == 3


def test_tables_are_not_packed_alone(home: Path, run: Run, checkpoint: Path) -> None:
    done = run("import", str(checkpoint), "--quantize-embeddings")
    assert done.exit_code == 2
    assert "--quantize-embeddings needs --weight-format int4" in done.stderr
    assert not (home / "models").exists()
