"""A checkpoint with its channels in another order: the same function, but other weights share a group.

How much a model loses in four bits depends on which of its weights happen to be neighbours. Over several orders, that
is averaged, and one scheme can be told from another.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.formats.int4 import pack, unpack_parts
from engine.formats.int4_sizes import Int4

MATRICES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    "self_attn.out_proj", "fc1", "fc2",  # OPT's
    "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",  # Llama's
)  # fmt: skip
State = dict[str, Tensor]
Order = Callable[[int], Tensor]
"""So many numbers from 0 on, in a random order."""
Places = dict[str, tuple[Tensor, Tensor]]
"""By matrix: which of its rows and columns stand where."""


def load(folder: Path) -> State:
    """The tensors of a checkpoint of OPT's or Llama's family."""
    return load_file(folder / "model.safetensors")


def save(state: State, source: Path, folder: Path) -> None:
    """The tensors as a checkpoint, with everything else as in ``source``."""
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix == ".json" and "index" not in path.name:
            (folder / path.name).write_bytes(path.read_bytes())
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")


def renumbered(state: State, config: dict[str, Any], seed: int) -> State:
    """Hidden channels, those of feed-forward blocks, heads, and the channels of heads, each in a random order."""
    generator = torch.Generator().manual_seed(seed)

    def order(number: int) -> Tensor:
        return torch.randperm(number, generator=generator)

    hidden, found = order(config["hidden_size"]), dict(state)
    for name, tensor in state.items():
        if name.endswith(("embed_tokens.weight", "embed_positions.weight", "lm_head.weight")):
            found[name] = tensor[:, hidden]
        elif "norm" in name:
            found[name] = tensor[hidden]
    places_in = _opt_places if config["model_type"] == "opt" else _llama_places
    for prefix in sorted({name.split(".self_attn.")[0] for name in state if ".self_attn." in name}):
        for matrix, (rows, columns) in places_in(config, hidden, order).items():
            name = f"{prefix}.{matrix}"
            found[f"{name}.weight"] = state[f"{name}.weight"][rows][:, columns]
            if f"{name}.bias" in state:
                found[f"{name}.bias"] = state[f"{name}.bias"][rows]
    return found


def _opt_places(config: dict[str, Any], hidden: Tensor, order: Order) -> Places:
    # Queries and keys of a head are multiplied with each other, values with the output projection.
    heads = config["num_attention_heads"]
    by_head = torch.arange(config["hidden_size"]).view(heads, -1)
    by_head = by_head[order(heads)]
    keys = torch.cat([head[order(len(head))] for head in by_head])
    values = torch.cat([head[order(len(head))] for head in by_head])
    wide = order(config["ffn_dim"])
    return {
        "self_attn.q_proj": (keys, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (values, hidden),
        "self_attn.out_proj": (hidden, values), "fc1": (wide, hidden), "fc2": (hidden, wide),
    }  # fmt: skip


def _llama_places(config: dict[str, Any], hidden: Tensor, order: Order) -> Places:
    # As many query heads each share a head of keys and of values. Within a head only values can change places: those of
    # queries and keys are turned by positions, each pair by an angle of its own.
    heads, kv_heads, size = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    sharing = torch.arange(heads).view(kv_heads, -1)
    channels = torch.arange(size)
    by_kv_head = [(kv_head, sharing[kv_head][order(heads // kv_heads)], order(size)) for kv_head in order(kv_heads)]
    queries = torch.cat([head * size + channels for _, some, _ in by_kv_head for head in some])
    keys = torch.cat([kv_head * size + channels for kv_head, _, _ in by_kv_head])
    values = torch.cat([kv_head * size + within for kv_head, _, within in by_kv_head])
    attended = torch.cat([head * size + within for _, some, within in by_kv_head for head in some])
    wide = order(config["intermediate_size"])
    return {
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (values, hidden),
        "self_attn.o_proj": (hidden, attended),
        "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide),
    }  # fmt: skip


def along_outputs(state: State, group: int) -> State:
    """Layers' matrices rounded in groups along the other axis, as FlexGen groups them."""
    return state | {name: _rounded(weight.T, Int4(group)).T for name, weight in _matrices(state)}


def error(state: State, stored: Int4) -> float:
    """How far a format puts layers' matrices off, of what they are, by root mean squares."""
    pairs = [(weight, _rounded(weight, stored)) for _, weight in _matrices(state)]
    off = sum(float((weight - its).square().sum()) for weight, its in pairs)
    return math.sqrt(off / sum(float(weight.square().sum()) for weight, _ in pairs))


def _matrices(state: State) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state.items():
        if name.removesuffix(".weight").endswith(MATRICES) and tensor.ndim == 2:
            yield name, tensor.float()


def _rounded(weight: Tensor, stored: Int4) -> Tensor:
    out = torch.empty(stored.unpacked_shape((weight.shape[0], weight.shape[1])))
    unpack_parts(pack(stored, weight.contiguous()), out)
    return out[:, : weight.shape[1]]
