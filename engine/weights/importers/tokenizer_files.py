"""The tokenizer of a Hugging Face folder, as the files of a model directory.

``tokenizer.json`` is all that is needed; folders of the first OPT releases have GPT-2's ``vocab.json`` and
``merges.txt`` instead, from which it is built here.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from engine.errors import CheckpointError
from engine.tokenizer import Tokenizer as EncodingTokenizer
from engine.weights.importers.tokenizer_present import check_tokenizer, how_to_make
from engine.weights.manifest import TOKENIZER_NAME

_COPIED = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
LEAST_SHARE = 0.8
"""The part of a vocabulary that its tokenizer knows at least: tables are padded, but never by more."""
_GPT2 = "GPT2Tokenizer"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_ROLES = ("unk_token", "bos_token", "eos_token", "pad_token", "cls_token", "sep_token", "mask_token")


def tokenizer_files(source: Path) -> dict[str, bytes]:
    """File names and contents; ``tokenizer.json`` is always among them.

    Raises:
        CheckpointError: there is no tokenizer, or it is damaged.
    """
    check_tokenizer(source)
    files = {name: (source / name).read_bytes() for name in _COPIED if (source / name).is_file()}
    path = source / TOKENIZER_NAME
    if path.is_file():
        files[TOKENIZER_NAME] = _with_special_tokens(source, path)
    else:
        files[TOKENIZER_NAME] = from_vocab_and_merges(source).to_str(pretty=True).encode()
    return files


def check_vocabulary(files: Mapping[str, bytes], vocab_size: int, source: Path) -> str | None:
    """A warning where the tokenizer of these files knows so few of the model's tokens that it is hardly the model's.

    Raises:
        CheckpointError: it has tokens that the model has not.
    """
    largest = EncodingTokenizer(Tokenizer.from_buffer(files[TOKENIZER_NAME]), None, None).largest_id
    if largest >= vocab_size:
        raise CheckpointError(
            f"the tokenizer in {source} has token {largest}, and config.json a vocabulary of {vocab_size} tokens: they "
            "are of two models; copy the tokenizer that belongs to the weights"
        )
    if largest + 1 >= LEAST_SHARE * vocab_size:
        return None
    return (
        f"the tokenizer in {source} has {largest + 1} tokens, and the model a vocabulary of {vocab_size}: unless they "
        "belong together, outputs will make no sense"
    )


def from_vocab_and_merges(source: Path) -> Tokenizer:
    """GPT-2's byte-level BPE as OPT uses it, with the special tokens that the folder's settings name.

    Raises:
        CheckpointError: a file is damaged, or they are of another kind of tokenizer.
    """
    config = _settings(source / "tokenizer_config.json")
    kind = str(config.get("tokenizer_class") or _GPT2).removesuffix("Fast")
    if kind != _GPT2:  # vocab.json does not say how it cuts texts into words, and this one may do it otherwise
        raise CheckpointError(f"{source} has the vocab.json and merges.txt of a {kind}; {how_to_make(source)}")
    try:
        model = BPE.from_file(
            str(source / "vocab.json"), str(source / "merges.txt"), continuing_subword_prefix="", end_of_word_suffix=""
        )
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"vocab.json or merges.txt of {source} is damaged ({error})") from error
    tokenizer = Tokenizer(model)
    add_prefix_space = bool(config.get("add_prefix_space", False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    added = _settings(source / "added_tokens.json")
    tokenizer.add_tokens([AddedToken(text) for text, _ in sorted(added.items(), key=lambda item: item[1])])
    tokenizer.add_special_tokens(list(_special_tokens(source)))
    bos = _content(config.get("bos_token"))
    bos_id = None if bos is None else tokenizer.token_to_id(bos)
    if config.get("add_bos_token") and bos_id is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(str(bos), bos_id)]
        )
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _with_special_tokens(source: Path, path: Path) -> bytes:
    """``tokenizer.json`` as it is, unless the folder's settings name special tokens that it takes for plain ones.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} is not a tokenizer this version can read ({error})") from error
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    plain = [
        token
        for token in _special_tokens(source)
        if token.content not in special and tokenizer.token_to_id(token.content) is not None
    ]
    if not plain:
        return path.read_bytes()
    tokenizer.add_special_tokens(plain)
    return tokenizer.to_str(pretty=True).encode()


def _special_tokens(source: Path) -> Iterator[AddedToken]:
    config = _settings(source / "tokenizer_config.json")
    named = {**_settings(source / "special_tokens_map.json"), **config}
    tokens = [named.get(role) for role in _ROLES] + list(named.get("additional_special_tokens") or ())
    for token in tokens:
        content = _content(token)
        if content is not None:
            flags = token if isinstance(token, dict) else {}
            yield AddedToken(content, special=True, **{flag: bool(flags[flag]) for flag in _FLAGS if flag in flags})


def _content(token: Any) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _settings(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}
