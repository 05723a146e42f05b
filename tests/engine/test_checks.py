"""A damaged model directory is one sentence when an engine loads it: never a hang."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from engine.errors import CheckpointError
from engine.lengths import workload_of
from engine.loading import load_engine
from engine.model.activation_functions import ACTIVATION_FUNCTIONS
from engine.model.fields import ACTIVATIONS
from engine.planner.plan import PlanOptions
from engine.units import MIB
from engine.weights.manifest import MANIFEST_NAME, MOST_BYTES, TOKENIZER_NAME

Damage = Callable[[Path], None]


def in_json(name: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return damage


def config(**values: object) -> Damage:
    return in_json(MANIFEST_NAME, lambda manifest: manifest["config"].update(values))


def unit(name: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(manifest: dict[str, Any]) -> None:
        change(next(each for each in manifest["units"] if each["name"] == name))

    return in_json(MANIFEST_NAME, damage)


def one_layer_more(manifest: dict[str, Any]) -> None:
    more = {**manifest["units"][2], "name": "layer.2"}
    manifest["units"].append(more)
    manifest["num_bytes"] += more["num_bytes"]


def one_layer_less(manifest: dict[str, Any]) -> None:
    gone = manifest["units"].pop(2)
    manifest["num_bytes"] -= gone["num_bytes"]


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Damage:
    return in_json(TOKENIZER_NAME, change)


def added(content: dict[str, Any], token_id: int) -> None:
    content["model"]["vocab"]["far"] = token_id
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append({"id": token_id, "content": "far", "special": True, **flags})


def put_around(content: dict[str, Any], token_id: int) -> None:
    pieces = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokens = {"<s>": {"id": "<s>", "ids": [token_id], "tokens": ["<s>"]}}
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": tokens,
    }  # fmt: skip


def instead(name: str, make: Callable[[Path], object]) -> Damage:
    """Something else in a file's place."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def loop(path: Path) -> None:
    path.symlink_to(path)


def endless(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(MOST_BYTES + 1)


def page(path: Path) -> None:
    path.mkdir()


LAYER = "layer.1.bin"
DAMAGES: dict[str, Damage] = {
    "one layer more in the configuration": config(num_hidden_layers=3),
    "one layer less in the configuration": config(num_hidden_layers=1),
    "one layer more in the manifest": in_json(MANIFEST_NAME, one_layer_more),
    "one layer less in the manifest": in_json(MANIFEST_NAME, one_layer_less),
    "a layer under another name": unit("layer.1", lambda each: each.update(name="layer.7")),
    "the head under another name": unit("head", lambda each: each.update(name="tail")),
    "a tensor under another name": unit(
        "layer.0", lambda each: each["tensors"].update(Q=each["tensors"].pop("qkv.weight"))
    ),
    "a tensor less": unit("layer.0", lambda each: each["tensors"].pop("fc1.bias")),
    "a tensor of another shape": unit("layer.0", lambda each: each["tensors"]["fc1.weight"]["shape"].reverse()),
    "a tensor elsewhere": unit("layer.0", lambda each: each["tensors"]["fc1.weight"].update(offset=0)),
    "another dtype": in_json(MANIFEST_NAME, lambda manifest: manifest.update(dtype="float16")),
    "a vocabulary of 10**12": config(vocab_size=10**12),
    "a vocabulary of another size": config(vocab_size=511),
    "a billion positions": config(max_position_embeddings=10**9),
    "a billion layers": config(num_hidden_layers=10**9),
    "a number of 5000 digits": in_json(MANIFEST_NAME, lambda manifest: manifest["config"].update(vocab_size="DIGITS")),
    "layers that are true": config(num_hidden_layers=True),
    "negative width": config(hidden_size=-32),
    "half a width": config(hidden_size=32.5),
    "no heads": config(num_attention_heads=0),
    "heads that do not divide": config(num_attention_heads=5),
    "a wider feed-forward block": config(ffn_dim=128),
    "a narrower embedding": config(word_embed_proj_dim=16),
    "words for a number": config(word_embed_proj_dim="many"),
    "no final norm": config(_remove_final_layer_norm=True),
    "an activation that is a list": config(activation_function=["relu"]),
    "an unknown activation": config(activation_function="relu9"),
    "an unknown family": config(model_type="gpt9"),
    "a first token beyond the vocabulary": config(bos_token_id=512),
    "a negative first token": config(bos_token_id=-1),
    "a last token beyond the vocabulary": config(eos_token_id=[2, 512, 2]),
    "a last token in words": config(eos_token_id="2"),
    "an added token beyond the vocabulary": tokenizer(lambda content: added(content, 512)),
    "a token far beyond the vocabulary": tokenizer(lambda content: content["model"]["vocab"].update(zz=2**31)),
    "a token around texts beyond the vocabulary": tokenizer(lambda content: put_around(content, 512)),
    "a tokenizer that is none": tokenizer(lambda content: content.clear()),
    "a pipe for the manifest": instead(MANIFEST_NAME, os.mkfifo),
    "a pipe for a layer": instead(LAYER, os.mkfifo),
    "a pipe for the tokenizer": instead(TOKENIZER_NAME, os.mkfifo),
    "a loop for the manifest": instead(MANIFEST_NAME, loop),
    "a loop for a layer": instead(LAYER, loop),
    "a loop for the tokenizer": instead(TOKENIZER_NAME, loop),
    "a folder for a layer": instead(LAYER, page),
    "a folder for the manifest": instead(MANIFEST_NAME, page),
    "a manifest without end": instead(MANIFEST_NAME, endless),
    "a tokenizer without end": instead(TOKENIZER_NAME, endless),
}


@pytest.fixture
def damaged(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    DAMAGES[request.param](folder)
    path = folder / MANIFEST_NAME
    if path.is_file() and path.stat().st_size < MIB:
        path.write_text(path.read_text().replace('"DIGITS"', "9" * 5000))
    return folder


@pytest.mark.timeout(60)
@pytest.mark.parametrize("damaged", DAMAGES, indirect=True)
def test_damage_is_one_sentence(damaged: Path) -> None:
    with pytest.raises(CheckpointError) as refused:
        load_engine(damaged, PlanOptions(device="cpu", device_memory=64 * MIB))
    assert str(damaged) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600
    with suppress(CheckpointError):
        workload_of(damaged, [])  # by this, what waits is measured before an engine loads


def test_every_activation_that_is_accepted_is_computed() -> None:
    assert set(ACTIVATION_FUNCTIONS) == ACTIVATIONS
