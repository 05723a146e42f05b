"""A checkpoint with its channels in another order: the same function, but other weights share a group.

How much a model loses in four bits depends on which of its weights happen to be neighbours. Over several orders, that
is averaged, and one scheme can be told from another.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.formats.int4 import pack, unpack_parts
from engine.formats.int4_sizes import Int4

MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")
State = dict[str, Tensor]


def load(folder: Path) -> State:
    """The tensors of an OPT checkpoint."""
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
    size, heads, ffn = (config[name] for name in ("hidden_size", "num_attention_heads", "ffn_dim"))

    def order(number: int) -> Tensor:
        return torch.randperm(number, generator=generator)

    hidden, found = order(size), dict(state)
    for name, tensor in state.items():
        if name.endswith(("embed_tokens.weight", "embed_positions.weight", "lm_head.weight")):
            found[name] = tensor[:, hidden]
        elif "layer_norm" in name:
            found[name] = tensor[hidden]
    for prefix in sorted({name.split(".self_attn.")[0] for name in state if ".self_attn." in name}):
        # Queries and keys of a head are multiplied with each other, values with the output projection.
        by_head = torch.arange(size).view(heads, -1)
        by_head = by_head[order(heads)]
        keys = torch.cat([head[order(len(head))] for head in by_head])
        values = torch.cat([head[order(len(head))] for head in by_head])
        wide = order(ffn)
        places = {
            "q_proj": (keys, hidden), "k_proj": (keys, hidden), "v_proj": (values, hidden),
            "out_proj": (hidden, values), "fc1": (wide, hidden), "fc2": (hidden, wide),
        }  # fmt: skip
        for matrix in MATRICES:
            rows, columns = places[matrix.removeprefix("self_attn.")]
            name = f"{prefix}.{matrix}"
            found[f"{name}.weight"] = state[f"{name}.weight"][rows][:, columns]
            if f"{name}.bias" in state:
                found[f"{name}.bias"] = state[f"{name}.bias"][rows]
    return found


def along_outputs(state: State, group: int) -> State:
    """Layers' matrices rounded in groups along the other axis, as FlexGen groups them."""

    def rounded(weight: Tensor) -> Tensor:
        columns = weight.float().T.contiguous()
        out = torch.empty(Int4(group).unpacked_shape((columns.shape[0], columns.shape[1])))
        unpack_parts(pack(Int4(group), columns), out)
        return out[:, : columns.shape[1]].T.contiguous()

    return dict(_changed(state, rounded))


def _changed(state: State, change: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state.items():
        is_matrix = name.removesuffix(".weight").endswith(MATRICES) and tensor.ndim == 2
        yield name, change(tensor) if is_matrix else tensor
