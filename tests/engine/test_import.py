"""From a Hugging Face folder to a model directory: the same bytes from every format, and nothing by halves."""

import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.dtypes import DType
from engine.errors import CheckpointError, DiskFull
from engine.memory.aligned import aligned_empty
from engine.model.family import TensorSpec, layer_name
from engine.model.registry import sizes_for
from engine.units import MIB
from engine.weights.files import WeightFiles
from engine.weights.importing import import_checkpoint
from engine.weights.manifest import Manifest, is_model_dir, read_manifest
from engine.weights.writer import ModelWriter, UnitLayout
from tests.engine.checkpoints import VARIANTS, make_checkpoint, unit_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: tests that change a folder copy it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "opt-tiny"
    make_checkpoint(folder)
    return folder


@pytest.fixture
def source(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "opt-tiny")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def replace_weights(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def read_back(model_dir: Path) -> dict[str, dict[str, Tensor]]:
    with WeightFiles.open(model_dir) as files:
        units = {}
        for unit in read_manifest(model_dir).units:
            raw = aligned_empty(unit.num_bytes)
            files.read_unit(unit.name, raw)
            units[unit.name] = files.tensors(unit.name, raw)
        return units


def refusal(source: Path, destination: Path, **options: Any) -> str:
    """The error's text; nothing may be left of the destination."""
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint(source, destination, **options)
    assert not destination.exists()
    assert not list(destination.parent.glob(".*partial*"))
    return str(caught.value)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_arrives(variant: str, tmp_path: Path) -> None:
    oracle = make_checkpoint(tmp_path / "source", **VARIANTS[variant])
    import_checkpoint(oracle.folder, tmp_path / "model")
    units = read_back(tmp_path / "model")
    wanted = oracle.model.state_dict()
    decoder = "model.decoder"
    stored = 0
    for index in range(oracle.model.config.num_hidden_layers):
        layer, prefix = units[layer_name(index)], f"{decoder}.layers.{index}"
        for kind in ("weight", "bias"):
            names = [f"{prefix}.self_attn.{letter}_proj.{kind}" for letter in "qkv"]
            if names[0] in wanted:
                assert torch.equal(layer.pop(f"qkv.{kind}"), torch.cat([wanted[name] for name in names]))
            for name, ours in (
                ("self_attn.out_proj", "out"),
                ("self_attn_layer_norm", "attention_norm"),
                ("final_layer_norm", "ffn_norm"),
                ("fc1", "fc1"),
                ("fc2", "fc2"),
            ):
                if f"{prefix}.{name}.{kind}" in wanted:
                    assert torch.equal(layer.pop(f"{ours}.{kind}"), wanted[f"{prefix}.{name}.{kind}"])
        assert not layer
        stored += 1
    assert stored == 4
    assert torch.equal(units["embed"]["tokens.weight"], wanted[f"{decoder}.embed_tokens.weight"])
    assert torch.equal(units["embed"]["positions.weight"], wanted[f"{decoder}.embed_positions.weight"])
    for name, ours in (("final_layer_norm.weight", "norm.weight"), ("project_out.weight", "project_out.weight")):
        assert (ours in units["head"]) == (f"{decoder}.{name}" in wanted)
        if ours in units["head"]:
            assert torch.equal(units["head"][ours], wanted[f"{decoder}.{name}"])


def as_sharded_safetensors(folder: Path) -> None:
    tensors = list(tensors_of(folder).items())
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, begin in enumerate(range(0, len(tensors), 7)):
        shard = f"model-{number:05}-of-00099.safetensors"
        save_file(dict(tensors[begin : begin + 7]), folder / shard)
        weight_map.update(dict.fromkeys(dict(tensors[begin : begin + 7]), shard))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def as_bin(folder: Path) -> None:
    torch.save(tensors_of(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_legacy_bin(folder: Path) -> None:
    torch.save(tensors_of(folder), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / "model.safetensors").unlink()


def as_sharded_bin(folder: Path) -> None:
    tensors = list(tensors_of(folder).items())
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, begin in enumerate(range(0, len(tensors), 11)):
        shard = f"pytorch_model-{number:05}-of-00099.bin"
        torch.save(dict(tensors[begin : begin + 11]), folder / shard)
        weight_map.update(dict.fromkeys(dict(tensors[begin : begin + 11]), shard))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def as_bin_of_the_first_releases(folder: Path) -> None:
    """Without ``model.``, with fairseq's version and the tied head, some tensors transposed or sharing a storage."""
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors_of(folder).items()}
    tensors["decoder.version"] = torch.tensor([3])
    tensors["lm_head.weight"] = tensors["decoder.embed_tokens.weight"]
    fc1 = "decoder.layers.1.fc1.weight"
    tensors[fc1] = tensors[fc1].t().contiguous().t()
    wide = torch.cat([tensors["decoder.layers.2.fc2.weight"], torch.zeros(64, 1)], dim=1)
    tensors["decoder.layers.2.fc2.weight"] = wide[:, :-1]
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    "rewrite", [as_sharded_safetensors, as_bin, as_sharded_bin, as_legacy_bin, as_bin_of_the_first_releases]
)
def test_every_format_gives_the_same_bytes(rewrite: Any, checkpoint: Path, source: Path, tmp_path: Path) -> None:
    expected = import_checkpoint(checkpoint, tmp_path / "expected")
    rewrite(source)
    assert import_checkpoint(source, tmp_path / "model").units == expected.units
    for unit in expected.units:
        assert (tmp_path / "model" / unit.file).read_bytes() == (tmp_path / "expected" / unit.file).read_bytes()


def test_the_manifest_says_what_was_written(checkpoint: Path, tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []
    manifest = import_checkpoint(
        checkpoint, tmp_path / "model", on_progress=lambda done, total: reports.append((done, total))
    )
    assert read_manifest(tmp_path / "model") == manifest
    assert [unit.name for unit in manifest.units] == ["embed", *map(layer_name, range(4)), "head"]
    assert manifest.dtype == "float32"
    assert manifest.source == "opt-tiny"
    config, generation = (
        json.loads((checkpoint / f"{name}.json").read_text()) for name in ("config", "generation_config")
    )
    assert manifest.config == {**config, "generation_config": generation}
    assert manifest.num_bytes == sum((tmp_path / "model" / unit.file).stat().st_size for unit in manifest.units)
    assert all(unit.num_bytes % 4096 == 0 for unit in manifest.units)
    assert all(tensor.offset % 256 == 0 for unit in manifest.units for tensor in unit.tensors.values())
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    assert reports == sorted(reports)
    assert reports[-1] == (manifest.num_bytes, manifest.num_bytes)


def test_dtype_is_asked_for_or_the_configurations_or_the_tensors(source: Path, tmp_path: Path) -> None:
    assert import_checkpoint(source, tmp_path / "a", dtype=DType.FLOAT16).dtype == "float16"
    name = "model.decoder.layers.0.fc1.weight"
    stored = read_back(tmp_path / "a")["layer.0"]["fc1.weight"]
    assert torch.equal(stored, tensors_of(source)[name].half())
    change_config(source, dtype=..., torch_dtype="bfloat16")
    assert import_checkpoint(source, tmp_path / "b").dtype == "bfloat16"
    replace_weights(source, {name: tensor.half() for name, tensor in tensors_of(source).items()})
    change_config(source, torch_dtype=...)
    assert import_checkpoint(source, tmp_path / "c").dtype == "float16"


@pytest.mark.parametrize(
    ("in_config", "in_generation", "ends"),
    [
        (2, 2, (2,)),
        (2, [7, 2], (2, 7)),
        ([5, 6], None, (5, 6)),
        (None, 7, (7,)),
        (..., 7, (2, 7)),  # absent from this family's config.json: its default
        ([5, 6], ..., (5, 6)),
    ],
)
def test_a_generation_ends_at_the_tokens_of_either_file(
    in_config: object, in_generation: object, ends: tuple[int, ...], source: Path, tmp_path: Path
) -> None:
    change_config(source, eos_token_id=in_config)
    (source / "generation_config.json").write_text(
        json.dumps({} if in_generation is ... else {"eos_token_id": in_generation})
    )
    import_checkpoint(source, tmp_path / "model")
    assert sizes_for(read_manifest(tmp_path / "model").config).shape.eos_token_ids == ends


def test_a_model_directory_from_before_generation_settings_were_kept(source: Path, tmp_path: Path) -> None:
    import_checkpoint(source, tmp_path / "model")
    path = tmp_path / "model" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["config"]["generation_config"]
    path.write_text(json.dumps(manifest))
    assert sizes_for(read_manifest(tmp_path / "model").config).shape.eos_token_ids == (2,)


@pytest.mark.parametrize(("content", "says"), [("{", "cannot be read"), ('{"eos_token_id": "x"}', "eos_token_id")])
def test_damaged_generation_settings_are_named(content: str, says: str, source: Path, tmp_path: Path) -> None:
    (source / "generation_config.json").write_text(content)
    message = refusal(source, tmp_path / "model")
    assert "generation_config.json" in message
    assert says in message


def test_float64_needs_a_choice(source: Path, tmp_path: Path) -> None:
    replace_weights(source, {name: tensor.double() for name, tensor in tensors_of(source).items()})
    change_config(source, dtype="float64")
    assert "choose --dtype" in refusal(source, tmp_path / "model")
    assert import_checkpoint(source, tmp_path / "model", dtype=DType.FLOAT32).dtype == "float32"


def test_a_value_too_large_for_float16_is_named(source: Path, tmp_path: Path) -> None:
    tensors = tensors_of(source)
    tensors["model.decoder.layers.2.fc2.weight"][3, 4] = 70000.0
    tensors["model.decoder.layers.2.fc2.weight"][3, 5] = torch.nan  # hides it from a mere maximum
    replace_weights(source, tensors)
    message = refusal(source, tmp_path / "model", dtype=DType.FLOAT16)
    assert "model.decoder.layers.2.fc2.weight" in message
    assert "70000" in message
    assert import_checkpoint(source, tmp_path / "model", dtype=DType.BFLOAT16).dtype == "bfloat16"


def test_infinities_of_the_checkpoint_stay(source: Path, tmp_path: Path) -> None:
    tensors = tensors_of(source)
    tensors["model.decoder.layers.2.fc2.weight"][3, 4] = -torch.inf
    replace_weights(source, tensors)
    import_checkpoint(source, tmp_path / "model", dtype=DType.FLOAT16)
    assert read_back(tmp_path / "model")["layer.2"]["fc2.weight"][3, 4] == -torch.inf


def test_a_missing_tensor_is_named(source: Path, tmp_path: Path) -> None:
    tensors = tensors_of(source)
    del tensors["model.decoder.layers.3.self_attn.k_proj.weight"]
    replace_weights(source, tensors)
    assert "decoder.layers.3.self_attn.k_proj.weight is missing" in refusal(source, tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "shape", "asked"),
    [
        ("layers.1.fc1.weight", (128, 63), "(128, 64)"),
        ("layers.1.self_attn.q_proj.weight", (64, 63), "(64, 64)"),
        ("layers.1.self_attn.q_proj.weight", (65, 64), "(64, 64)"),
        ("layers.1.self_attn.v_proj.bias", (), "(64,)"),
        ("embed_tokens.weight", (500, 64), "(512, 64)"),
    ],
)
def test_a_wrong_shape_is_named(name: str, shape: tuple[int, ...], asked: str, source: Path, tmp_path: Path) -> None:
    replace_weights(source, tensors_of(source) | {f"model.decoder.{name}": torch.zeros(shape)})
    message = refusal(source, tmp_path / "model")
    for part in (name, str(source / "model.safetensors"), str(shape), asked):
        assert part in message


def test_rows_that_only_together_are_right_are_refused(source: Path, tmp_path: Path) -> None:
    prefix = "model.decoder.layers.1.self_attn"
    wrong = {f"{prefix}.q_proj.weight": torch.zeros(96, 64), f"{prefix}.k_proj.weight": torch.zeros(32, 64)}
    replace_weights(source, tensors_of(source) | wrong)
    assert "(96, 64), but config.json asks for (64, 64)" in refusal(source, tmp_path / "model")


def test_sources_of_unequal_height() -> None:
    spec = TensorSpec("qkv.weight", (8, 5), ("q", "k", "v"), rows=(4, 2, 2))
    assert spec.source_shapes() == ((4, 5), (2, 5), (2, 5))
    assert TensorSpec("qkv.bias", (6,), ("q", "k", "v")).source_shapes() == ((2,), (2,), (2,))
    assert TensorSpec("scalar", (), ("s",)).source_shapes() == ((),)


@pytest.mark.parametrize("name", ["project_in.bias", "layers.0.fc1.extra", "layers.0.self_attn.rotary_emb.inv_freq"])
def test_what_would_change_nothing_is_ignored(name: str, source: Path, tmp_path: Path) -> None:
    replace_weights(source, tensors_of(source) | {f"model.decoder.{name}": torch.zeros(3)})
    import_checkpoint(source, tmp_path / "model")


@pytest.mark.parametrize("name", ["layers.4.fc1.weight", "layers.0.self_attn.q_norm.weight"])
def test_weights_of_a_layer_that_the_configuration_does_not_have(name: str, source: Path, tmp_path: Path) -> None:
    replace_weights(source, tensors_of(source) | {f"model.decoder.{name}": torch.zeros(3)})
    assert name in refusal(source, tmp_path / "model")


def test_biases_that_the_configuration_switches_off_are_refused(source: Path, tmp_path: Path) -> None:
    change_config(source, enable_bias=False)
    assert "for which config.json has no place" in refusal(source, tmp_path / "model")


def test_quantised_weights_are_refused(source: Path, tmp_path: Path) -> None:
    name = "model.decoder.layers.1.fc1.weight"
    replace_weights(source, tensors_of(source) | {name: torch.zeros(128, 64, dtype=torch.int8)})
    message = refusal(source, tmp_path / "model")
    assert name in message
    assert "I8" in message


def remove(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: str | bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def lose_a_shard(folder: Path) -> None:
    as_sharded_safetensors(folder)
    (folder / "model-00002-of-00099.safetensors").unlink()


def cut_bin(folder: Path) -> None:
    as_bin(folder)
    path = folder / "pytorch_model.bin"
    os.truncate(path, path.stat().st_size // 2)


def two_shards_with_one_name(folder: Path) -> None:
    as_sharded_safetensors(folder)
    shutil.copy(folder / "model-00001-of-00099.safetensors", folder / "model-00000-of-00099.safetensors")


def test_without_a_tokenizer_nothing_is_read(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").unlink()
    (source / "model.safetensors").write_bytes(b"what nobody looks at")
    with pytest.raises(CheckpointError, match=r"copy tokenizer\.json, or vocab\.json and merges\.txt, into it"):
        import_checkpoint(source, tmp_path / "model")


def test_a_tokenizer_with_tokens_beyond_the_vocabulary_is_refused(source: Path, tmp_path: Path) -> None:
    content = json.loads((source / "tokenizer.json").read_text())
    content["model"]["vocab"]["far"] = 512
    (source / "tokenizer.json").write_text(json.dumps(content))
    (source / "model.safetensors").write_bytes(b"what nobody looks at")
    with pytest.raises(CheckpointError, match=r"has token 512, and config\.json a vocabulary of 512"):
        import_checkpoint(source, tmp_path / "model")


def test_a_tokenizer_that_knows_few_of_the_tokens_is_warned_of(source: Path, tmp_path: Path) -> None:
    warned: list[str] = []
    import_checkpoint(source, tmp_path / "right", warn=warned.append)
    assert warned == []
    content = json.loads((source / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {text: number for text, number in vocabulary.items() if number < 300}
    content["model"]["merges"] = [
        pair for pair in content["model"]["merges"] if "".join(pair) in content["model"]["vocab"]
    ]
    (source / "tokenizer.json").write_text(json.dumps(content))
    import_checkpoint(source, tmp_path / "model", warn=warned.append)
    assert ["300 tokens" in text and "512" in text for text in warned] == [True]


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (remove("config.json"), "no config.json"),
        (write("config.json", "{"), "cannot be read"),
        (write("config.json", "[]"), "no JSON object"),
        (write("config.json", "{}"), "no model_type"),
        (write("config.json", '{"model_type": "gpt_neox"}'), "'gpt_neox' is not supported"),
        (remove("model.safetensors"), "has no weights"),
        (remove("tokenizer.json"), "has no tokenizer"),
        (write("tokenizer.json", "{}"), "tokenizer.json"),
        (write("model.safetensors", LFS), "git lfs pull"),
        (write("model.safetensors", b""), "not a safetensors file"),
        (write("model.safetensors", b"\xff" * 64), "not a safetensors file"),
        (write("model.safetensors", (4).to_bytes(8, "little") + b"[1]x"), "damaged safetensors header"),
        (write("model.safetensors", (3).to_bytes(8, "little") + b"[1]"), "damaged safetensors header"),
        (cut, "cut short"),
        (lose_a_shard, "model-00002-of-00099.safetensors"),
        (two_shards_with_one_name, "holds too"),
        (cut_bin, "pytorch_model.bin"),
        (lambda f: (remove("model.safetensors")(f), write("pytorch_model.bin", b"junk")(f)), "pytorch_model.bin"),
        (lambda f: (remove("model.safetensors")(f), torch.save([1], f / "pytorch_model.bin")), "no dictionary"),
        (
            lambda f: (
                remove("model.safetensors")(f),
                write("model.safetensors.index.json", '{"weight_map": {"a": "../../x.safetensors"}}')(f),
            ),
            "../../x.safetensors",
        ),
        (
            lambda f: (remove("model.safetensors")(f), write("model.safetensors.index.json", "{}")(f)),
            "no weight_map",
        ),
    ],
)
def test_a_damaged_folder_is_a_sentence(damage: Any, says: str, source: Path, tmp_path: Path) -> None:
    damage(source)
    message = refusal(source, tmp_path / "model")
    assert says in message
    assert "\n" not in message


def test_what_is_no_folder(checkpoint: Path, tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none", tmp_path / "model")
    assert "is a file" in refusal(checkpoint / "model.safetensors", tmp_path / "model")
    import_checkpoint(checkpoint, tmp_path / "done")
    assert "model directory already" in refusal(tmp_path / "done", tmp_path / "model")


class Exploit:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_bin_file_is_never_run(zipped: bool, source: Path, tmp_path: Path) -> None:
    as_bin(source)
    contents = {"decoder.x": torch.zeros(1), "exploit": Exploit(tmp_path / "ran")}
    if zipped:
        torch.save(contents, source / "pytorch_model.bin")
    else:
        (source / "pytorch_model.bin").write_bytes(pickle.dumps(contents["exploit"], protocol=2))
    refusal(source, tmp_path / "model")
    assert not (tmp_path / "ran").exists()


def test_an_existing_destination_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    destination = tmp_path / "model"
    first = import_checkpoint(checkpoint, destination)
    with pytest.raises(CheckpointError, match="exists already"):
        import_checkpoint(checkpoint, destination, dtype=DType.FLOAT16)
    assert read_manifest(destination) == first
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        import_checkpoint(checkpoint, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_directory_may_be_the_destination(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert import_checkpoint(checkpoint, tmp_path / "model") == read_manifest(tmp_path / "model")


def test_another_import_that_was_faster_wins(checkpoint: Path, tmp_path: Path) -> None:
    destination, other = tmp_path / "model", tmp_path / "other"
    first = import_checkpoint(checkpoint, other)
    with ModelWriter(destination, 0) as writer:
        other.rename(destination)
        with pytest.raises(CheckpointError, match="by another process meanwhile"):
            writer.commit(first)
    assert read_manifest(destination) == first
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_ctrl_c_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(checkpoint, tmp_path / "model", on_progress=interrupt)
    assert not list(tmp_path.iterdir())


def start_import(source: Path, destination: Path, on_progress: str) -> subprocess.Popen[str]:
    """An import in a process of its own, with a progress function written out."""
    program = f"""
        import os, signal, sys
        from pathlib import Path
        from engine.dtypes import DType
        from engine.weights.importing import import_checkpoint
        def on_progress(done, total):
            {on_progress}
        import_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), on_progress=on_progress)
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(source), str(destination)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_killed_import_leaves_nothing_that_looks_complete(checkpoint: Path, tmp_path: Path) -> None:
    kill = "if done > total // 2: os.kill(os.getpid(), signal.SIGKILL)"
    with start_import(checkpoint, tmp_path / "model", kill) as process:
        process.communicate(timeout=240)
    assert process.returncode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    assert leftover.name == f".model.partial-{process.pid}"
    assert list(leftover.glob("layer.*.bin"))
    assert not is_model_dir(leftover)
    with pytest.raises(CheckpointError):
        read_manifest(leftover)

    import_checkpoint(checkpoint, tmp_path / "another")  # the next import tidies up
    assert {path.name for path in tmp_path.iterdir()} == {"another"}


def test_an_import_under_way_is_not_swept(checkpoint: Path, tmp_path: Path) -> None:
    wait = "done == total or (print(done, flush=True), sys.stdin.readline())"
    with start_import(checkpoint, tmp_path / "slow", wait) as process:
        assert process.stdout is not None
        process.stdout.readline()
        import_checkpoint(checkpoint, tmp_path / "quick")
        assert list(tmp_path.glob(".slow.partial-*"))
        process.communicate("", timeout=240)  # the end of its input lets it go on
    assert process.returncode == 0
    assert read_manifest(tmp_path / "slow").units == read_manifest(tmp_path / "quick").units


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match=r"1024\.0 TiB is needed, only"):
        ModelWriter(tmp_path / "model", 1 << 50)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_on_the_way(tmp_path: Path) -> None:
    """On a real file system of 1 MiB, in a mount namespace of its own where that is allowed."""
    program = """
        import sys
        from pathlib import Path
        from engine.dtypes import DType
        from engine.errors import DiskFull
        from engine.model.family import TensorSpec, UnitSpec
        from engine.weights.layout import UnitLayout
        from engine.weights.writer import ModelWriter
        layout = UnitLayout.plain(UnitSpec("embed", (TensorSpec("w", (1 << 20,), ("w",)),)), DType.FLOAT32)
        try:
            with ModelWriter(Path(sys.argv[1]) / "model", 4096) as writer:
                writer.write_unit("embed", layout, [("w", [bytes(4 << 20)])])
        except DiskFull as error:
            print(error, [path.name for path in Path(sys.argv[1]).iterdir()])
    """
    script = 'mount -t tmpfs -o size=1m tmpfs "$1" 2>/dev/null || exit 77; exec "$2" -c "$3" "$1"'
    command = ["unshare", "-rm", "sh", "-c", script, "sh", str(tmp_path), sys.executable, textwrap.dedent(program)]
    try:
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    if ran.returncode == 77 or "unshare" in ran.stderr:
        pytest.skip("this system does not let a user mount a file system of their own")
    assert "4.0 KiB is needed, the disk is full now" in ran.stdout, ran.stderr
    assert ran.stdout.strip().endswith("[]")


def test_layouts_align_tensors_and_pad_files() -> None:
    from engine.model.family import TensorSpec, UnitSpec

    unit = UnitSpec("u", (TensorSpec("a", (3,), ("a",)), TensorSpec("b", (5, 7), ("b",)), TensorSpec("c", (), ("c",))))
    layout = UnitLayout.plain(unit, DType.FLOAT16)
    assert [tensor.offset for tensor in layout.tensors.values()] == [0, 256, 512]
    assert layout.num_bytes == 4096
    assert UnitLayout.plain(UnitSpec("empty", ()), DType.FLOAT32).num_bytes == 4096


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of 8 layers of 27 MiB, with both kinds of weights; 480 MiB on the disk."""
    folder = tmp_path_factory.mktemp("wide") / "source"
    size = {"hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 8, "word_embed_proj_dim": 768}
    make_checkpoint(folder, **size, num_attention_heads=12)
    torch.save(tensors_of(folder), folder / "pytorch_model.bin")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("matrices", ["None", "Int4()"])
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_memory_stays_small_however_large_the_model(kind: str, matrices: str, wide: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "tokenizer.json", kind):
        (source / name).symlink_to(wide / name)
    program = """
        import sys
        from pathlib import Path
        from engine.dtypes import DType
        from engine.formats.int4_sizes import Int4
        from engine.weights.importing import import_checkpoint
        def memory(field):
            return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith(field))
        source, small, destination = map(Path, sys.argv[1:4])
        options = {"dtype": DType.BFLOAT16, "matrices": eval(sys.argv[4])}
        import_checkpoint(small, destination / "first", **options)  # loads what is loaded once
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        import_checkpoint(source, destination / "model", **options)
        print(memory("VmHWM") - before)
    """
    make_checkpoint(tmp_path / "small")
    given = [str(source), str(tmp_path / "small"), str(tmp_path), matrices]
    command = [sys.executable, "-c", textwrap.dedent(program), *given]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=True)
    manifest: Manifest = read_manifest(tmp_path / "model")
    shapes = [tensor.shape for tensor in unit_of(manifest, "layer.0").tensors.values()]
    layer = 4 * sum(map(math.prod, shapes))  # as float32, in the checkpoint
    assert 8 * layer > 200 * MIB
    assert int(ran.stdout) < 2 * layer + 16 * MIB
    shutil.rmtree(tmp_path / "model")
