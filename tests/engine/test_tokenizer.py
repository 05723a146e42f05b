"""Text and token ids, held against transformers' tokenizers; stop strings, against decoding all again."""

import atexit
import json
import re
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

from engine.errors import CheckpointError
from engine.shape import ModelShape
from engine.tokenizer import Tokenizer, UnencodableText
from engine.weights.importers.tokenizer_files import from_vocab_and_merges, tokenizer_files

BOS = 2
SCRATCH = Path(mkdtemp())  # property tests cannot have a fixture's folder for each example
atexit.register(shutil.rmtree, SCRATCH)
CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "Übergrößenträger lesen 12 345 Bücher für 6,78 €. 日本語も少し。 🙂🙃",
    "Review: a film that nobody needs\nSentiment: negative",
] * 3
TEXTS = [
    "",
    " ",
    "The quick brown fox",
    " leading and trailing ",
    "tabs\tand\nnewlines\r\n  ",
    "Grüße aus 日本 🙂",
    "</s>begins with it",
    "</s></s>twice",
    "holds </s> and <pad> inside",
    "<s>",
    "'s 've don't 123456",
    "\x00\x01\u200b\ufeff",
    "e\u0301 \u00e9",
]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
plain_text = any_text.filter(lambda text: not any(token in text for token in SPECIAL))
"""Text that names no special token: those are read as what they are, and left out when ids become text again."""


@cache
def folder(*, kind: str) -> Path:
    """A Hugging Face folder's tokenizer: ``old`` as facebook/opt-*'s, ``new`` and ``bos`` as one tokenizer.json."""
    path = Path(mkdtemp(dir=SCRATCH))
    built = tokenizers.Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    built.train_from_iterator(CORPUS, trainer)
    if kind == "old":
        built.model.save(str(path))
        token = {"__type": "AddedToken", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
        config: dict[str, Any] = {
            "errors": "replace",
            **{f"{role}_token": {**token, "content": "</s>"} for role in ("unk", "bos", "eos")},
            "pad_token": "<pad>",
            "add_prefix_space": False,
            "add_bos_token": True,
            "tokenizer_class": "GPT2Tokenizer",
        }
        (path / "tokenizer_config.json").write_text(json.dumps(config))
        return path
    if kind == "bos":
        built.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", BOS)])
    built.add_tokens([AddedToken("été fini"), AddedToken("two words")])
    built.enable_truncation(8)  # as a training run may leave it behind
    built.enable_padding(length=16)
    built.save(str(path / "tokenizer.json"))
    return path


@cache
def ours(kind: str, bos: int | None = BOS) -> Tokenizer:
    target = Path(mkdtemp(dir=SCRATCH))
    for name, content in tokenizer_files(folder(kind=kind)).items():
        (target / name).write_bytes(content)
    return Tokenizer.load(target / "tokenizer.json", bos)


@cache
def oracle(kind: str) -> Any:
    if kind == "old":
        return GPT2Tokenizer.from_pretrained(folder(kind=kind))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder(kind=kind) / "tokenizer.json"), bos_token="</s>", eos_token="</s>"
    )


def expected_ids(kind: str, text: str) -> list[int]:
    """transformers' ids, with BOS prepended where it was not, and one taken away where the text brought its own."""
    ids: list[int] = oracle(kind)(text)["input_ids"]
    if ids[:1] != [BOS]:
        return [BOS, *ids]
    bare: list[int] = oracle(kind)(text, add_special_tokens=False)["input_ids"]
    return bare if bare[:1] == [BOS] else ids


KINDS = ("old", "new", "bos")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_transformers_with_bos_once(kind: str, text: str) -> None:
    ids = ours(kind).encode(text)
    assert ids == expected_ids(kind, text)
    assert ids[0] == BOS
    assert text.startswith("</s></s>") or ids[1:2] != [BOS]
    assert ours(kind).decode(ids) == oracle(kind).decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
@given(text=plain_text)
@settings(max_examples=60, deadline=None)
def test_any_text_comes_back(kind: str, text: str) -> None:
    ids = ours(kind).encode(text)
    assert ids == expected_ids(kind, text)
    assert ours(kind).decode(ids) == text


def test_the_old_folders_tokenizer_is_transformers_own() -> None:
    built = from_vocab_and_merges(folder(kind="old"))
    for text in TEXTS:
        assert built.encode(text).ids == oracle("old")(text)["input_ids"], "it adds BOS by itself"
        bare = oracle("old")(text, add_special_tokens=False)["input_ids"]
        assert built.encode(text, add_special_tokens=False).ids == bare
    converted = json.loads(oracle("old").backend_tokenizer.to_str())
    rebuilt = json.loads(built.to_str())
    assert rebuilt["model"] == converted["model"]
    assert rebuilt["pre_tokenizer"] == converted["pre_tokenizer"]
    assert rebuilt["decoder"] == converted["decoder"]
    assert [(t["id"], t["content"]) for t in rebuilt["added_tokens"] if t["special"]] == [(1, "<pad>"), (2, "</s>")]
    assert {t["content"] for t in converted["added_tokens"]} == {"<pad>", "</s>"}


def test_special_tokens_that_only_the_settings_name(tmp_path: Path) -> None:
    content = json.loads((folder(kind="new") / "tokenizer.json").read_text())
    content["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    untouched = tokenizer_files(tmp_path)
    assert untouched == {"tokenizer.json": (tmp_path / "tokenizer.json").read_bytes()}
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>", "bos_token": {"content": "<absent>"}}')
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_files(tmp_path)["tokenizer.json"])
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json", BOS)
    assert tokenizer.encode("x</s>")[-1] == BOS
    assert tokenizer.decode(tokenizer.encode("x</s>y")) == "xy"
    assert tokenizer_files(tmp_path)["tokenizer.json"] == (tmp_path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_damaged_vocabulary_files(name: str, tmp_path: Path) -> None:
    for path in folder(kind="old").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_text("{")
    with pytest.raises(CheckpointError, match=name):
        tokenizer_files(tmp_path)
    (tmp_path / name).unlink()
    if name != "tokenizer_config.json":
        with pytest.raises(CheckpointError, match="has no tokenizer"):
            tokenizer_files(tmp_path)


def test_a_vocabulary_of_another_kind_is_not_taken_for_gpt2s(tmp_path: Path) -> None:
    for path in folder(kind="old").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings_path = tmp_path / "tokenizer_config.json"
    config = json.loads(settings_path.read_text())
    for named in ("GPT2Tokenizer", "GPT2TokenizerFast", None):
        settings_path.write_text(json.dumps({**config, "tokenizer_class": named}))
        tokenizer_files(tmp_path)
    settings_path.write_text(json.dumps({**config, "tokenizer_class": "Qwen2Tokenizer"}))
    with pytest.raises(CheckpointError, match=r"of a Qwen2Tokenizer; make tokenizer\.json of it with transformers"):
        tokenizer_files(tmp_path)


def test_sentencepieces_own_file_alone_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model alone; make tokenizer\.json of it") as refused:
        tokenizer_files(tmp_path)
    (code,) = re.findall(r'python -c "(.*)"$', str(refused.value))
    compile(code, "advice", "exec")
    assert repr(str(tmp_path)) in code


def test_a_model_directory_without_a_usable_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is missing"):
        Tokenizer.load(tmp_path / "tokenizer.json", BOS)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        Tokenizer.load(tmp_path / "tokenizer.json", BOS)


def test_without_bos_none_is_added() -> None:
    tokenizer = ours("new", None)
    assert tokenizer.encode("The fox") == oracle("new")("The fox")["input_ids"]
    assert tokenizer.encode("") == []


SHAPE = ModelShape(
    num_layers=1, hidden_size=8, num_heads=1, num_kv_heads=1, head_size=8, ffn_size=8, vocab_size=512, max_positions=16,
    bos_token_id=BOS, eos_token_ids=(0,), workspace_values=1,
)  # fmt: skip


def with_shape(tmp_path: Path, kind: str = "bos", **changes: Any) -> Tokenizer:
    (tmp_path / "tokenizer.json").write_bytes((folder(kind=kind) / "tokenizer.json").read_bytes())
    return Tokenizer.of_model(tmp_path / "tokenizer.json", replace(SHAPE, **changes))


@pytest.mark.parametrize("kind", ["new", "bos"])
@pytest.mark.parametrize("text", TEXTS)
def test_without_a_rule_of_the_family_ids_are_those_of_the_tokenizers_own(kind: str, text: str, tmp_path: Path) -> None:
    assert with_shape(tmp_path, kind).encode(text) == oracle(kind)(text)["input_ids"]


@pytest.mark.parametrize("kind", ["new", "bos"])
def test_a_family_that_forces_bos_has_it_whatever_the_tokenizers_rule(kind: str, tmp_path: Path) -> None:
    for text in TEXTS:
        assert with_shape(tmp_path, kind, forces_bos=True).encode(text) == expected_ids(kind, text)


@pytest.mark.parametrize("context", ["Review: bad", "</s>Review: bad", " Review: bad \n"])
def test_a_context_that_the_tokenizer_puts_bos_before_keeps_it_in_a_pair(context: str, tmp_path: Path) -> None:
    context_ids, continuation_ids = with_shape(tmp_path).encode_pair(context, "is it")
    assert context_ids == oracle("bos")(context.rstrip())["input_ids"]
    assert context_ids + continuation_ids == oracle("bos")(context + "is it")["input_ids"]


def test_an_empty_context_is_scored_after_bos_else_eos(tmp_path: Path) -> None:
    bare = oracle("bos")("again", add_special_tokens=False)["input_ids"]
    assert with_shape(tmp_path).encode_pair("", "again") == ([BOS], bare)
    assert with_shape(tmp_path, bos_token_id=0).encode_pair("", "again") == ([0], bare)
    assert with_shape(tmp_path, bos_token_id=None).encode_pair("", "again") == ([0], bare)
    assert with_shape(tmp_path, bos_token_id=None, eos_token_ids=()).encode_pair("", "again") == ([], bare)


def test_what_a_tokenizer_puts_after_texts_is_not_between_context_and_continuation(tmp_path: Path) -> None:
    built = tokenizers.Tokenizer.from_file(str(folder(kind="new") / "tokenizer.json"))
    tokens = [("<s>", 0), ("</s>", BOS)]
    built.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=tokens)
    built.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.of_model(tmp_path / "tokenizer.json", SHAPE)
    bare = oracle("new")("The fox again")["input_ids"]
    assert tokenizer.encode("The fox again") == [0, *bare, BOS]
    context_ids, continuation_ids = tokenizer.encode_pair("The fox", " again")
    assert context_ids == [0, *oracle("new")("The fox")["input_ids"]]
    assert context_ids + continuation_ids == [0, *bare]


def test_a_batch_is_each_alone() -> None:
    assert ours("old").encode_batch(TEXTS) == [ours("old").encode(text) for text in TEXTS]
    assert ours("old").encode_batch([]) == []


@pytest.mark.parametrize("text", ["\ud800", "fine until \udfff here"])
def test_a_lone_surrogate_is_the_texts_fault(text: str) -> None:
    where = next(index for index, character in enumerate(text) if "\ud800" <= character <= "\udfff")
    for call in (
        lambda: ours("old").encode(text),
        lambda: ours("old").encode_batch(["good", text]),
        lambda: ours("old").encode_pair("context", text),
        lambda: ours("old").encode_pair("", text),
    ):
        with pytest.raises(UnencodableText, match=r"no valid Unicode: character \d+ is U\+D"):
            call()
    with pytest.raises(UnencodableText, match=f"character {where} is"):
        ours("old").encode(text)


def lm_eval_pair(kind: str, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """What lm-eval's TemplateLM does, on transformers' tokenizer with our BOS rule."""
    if context == "":
        ids = oracle(kind)(continuation, add_special_tokens=False)["input_ids"]
        return ([BOS], ids) if ids[:1] != [BOS] else (ids[:1], ids[1:])
    num_spaces = len(context) - len(context.rstrip())
    if num_spaces:
        continuation = context[-num_spaces:] + continuation
        context = context[:-num_spaces]
    whole = expected_ids(kind, context + continuation)
    context_ids = expected_ids(kind, context)
    return context_ids, whole[len(context_ids) :]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("context", "continuation"),
    [
        ("Review: bad\nSentiment:", " negative"),
        ("Review: bad\nSentiment: ", "negative"),
        ("Review: bad\nSentiment: \n\t ", "negative"),
        ("aga", "in and again"),
        ("", "negative"),
        ("", "</s>negative"),
        ("  ", "negative"),
        ("</s>Review", ": bad"),
        ("日", "本語"),
        ("context", ""),
        ("", ""),
    ],
)
def test_pairs_are_encoded_as_lm_eval_does(kind: str, context: str, continuation: str) -> None:
    assert ours(kind).encode_pair(context, continuation) == lm_eval_pair(kind, context, continuation)


@given(context=any_text, continuation=any_text)
@settings(max_examples=60, deadline=None)
def test_any_pair_is_encoded_as_lm_eval_does(context: str, continuation: str) -> None:
    assert ours("old").encode_pair(context, continuation) == lm_eval_pair("old", context, continuation)


def test_what_an_empty_context_is_scored_after(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder(kind="new") / "tokenizer.json").read_bytes())
    ids = oracle("new")("again")["input_ids"]
    assert Tokenizer.load(tmp_path / "tokenizer.json", None, 0).encode_pair("", "again") == ([0], ids)
    assert Tokenizer.load(tmp_path / "tokenizer.json", BOS, 0).encode_pair("", "again") == ([BOS], ids)
    assert Tokenizer.load(tmp_path / "tokenizer.json", None).encode_pair("", "again") == ([], ids)


def test_one_tokens_text() -> None:
    tokenizer = ours("old")
    assert tokenizer.token_text(BOS) == "</s>"
    assert tokenizer.token_text(100_000) == ""
    assert "".join(tokenizer.token_text(id) for id in tokenizer.encode("The fox")[1:]) == "The fox"
    assert tokenizer.token_text(tokenizer.encode("\u2603")[1]) == "\ufffd"


any_ids = st.lists(st.integers(0, 410), max_size=30)  # past the vocabulary too, as padded embeddings are


def texts_so_far(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.decode(ids[: end + 1]) for end in range(len(ids))]


@pytest.mark.parametrize("kind", KINDS)
@given(ids=any_ids)
@settings(max_examples=150, deadline=None)
def test_streamed_text_is_the_text_less_an_unfinished_character(kind: str, ids: list[int]) -> None:
    stream, text = ours(kind).stream(), ""
    for token_id, whole in zip(ids, texts_so_far(ours(kind), ids), strict=True):
        text += stream.push(token_id)
        assert whole.startswith(text)
        assert whole[len(text) :].strip("\ufffd") == ""
        assert len(whole) - len(text) <= 3


def stopped(tokenizer: Tokenizer, ids: list[int], stop: list[str]) -> str | None:
    """The plain way: decode all again after every token."""
    for text in texts_so_far(tokenizer, ids):
        begins = [text.find(string) for string in stop if string and string in text]
        if begins:
            return text[: min(begins)]
    return None


def pushed(tokenizer: Tokenizer, ids: list[int], stop: list[str]) -> str | None:
    checker = tokenizer.stop_checker(stop)
    for token_id in ids:
        text = checker.push(token_id)
        if text is not None:
            return text
    return None


@pytest.mark.parametrize("kind", KINDS)
@given(ids=any_ids, data=st.data())
@settings(max_examples=150, deadline=None)
def test_stop_strings_are_found_where_decoding_all_finds_them(kind: str, ids: list[int], data: st.DataObject) -> None:
    text = ours(kind).decode(ids).replace("\ufffd", "x") or "x"
    begins = st.integers(0, len(text) - 1)
    strings = st.builds(lambda begin, size: text[begin : begin + size], begins, st.integers(0, 6))
    # U+FFFD stands for a character that is not finished yet, and is no text to stop at.
    others = st.text(st.characters(exclude_characters="\ufffd"), max_size=2)
    stop = data.draw(st.lists(strings | others, max_size=3))
    assert pushed(ours(kind), ids, stop) == stopped(ours(kind), ids, stop)


@pytest.mark.parametrize(
    ("text", "stop", "before"),
    [
        ("one\n\ntwo", ["\n\n"], "one"),
        ("one🙂two", ["🙂"], "one"),
        ("日本語", ["本"], "日"),
        ("aaab", ["aab"], "a"),
        ("stop at once", ["stop"], ""),
        ("later, sooner", ["sooner", "later"], ""),
        ("never", ["nowhere"], None),
        ("never", [], None),
        ("never", [""], None),
    ],
)
def test_a_stop_string_across_tokens_and_characters(text: str, stop: list[str], before: str | None) -> None:
    single_bytes = [ours("old").encode(letter)[1:] for letter in text]  # the finest tokens there are
    ids = [id for letter in single_bytes for id in letter]
    assert ours("old").decode(ids) == text
    assert pushed(ours("old"), ids, stop) == before


def test_a_special_token_parts_no_stop_string() -> None:
    ids = [*ours("old").encode("ag")[1:], BOS, *ours("old").encode("ain")[1:]]
    assert pushed(ours("old"), ids, ["gai"]) == "a"


def test_long_outputs_are_not_searched_again() -> None:
    checker = ours("old").stop_checker(["never to be found"])
    for token_id in ours("old").encode("The quick brown fox. " * 500)[1:]:
        assert checker.push(token_id) is None
        assert len(checker._tail) < len("never to be found")


PIECES = ["▁", "a", "b", "▁a", "ab", "▁ab", "▁▁", "日", "日b", "é", "▁▁a"]
MERGES = [("▁", "a"), ("a", "b"), ("▁", "ab"), ("▁", "▁"), ("日", "b"), ("▁▁", "a")]
SENTENCEPIECE = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
NOT_BYTE_LEVEL: dict[str, tuple[Any, Any, Any]] = {
    # normalizer, pre-tokenizer, decoder
    "llama-2": (
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        None,
        decoders.Sequence([*SENTENCEPIECE, decoders.Strip(" ", 1, 0)]),
    ),
    "newer": (
        None,
        pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
        decoders.Sequence([*SENTENCEPIECE, decoders.Strip(" ", 1, 0)]),
    ),
    "gemma": (normalizers.Replace(" ", "▁"), None, decoders.Sequence(SENTENCEPIECE)),
    "metaspace": (None, pre_tokenizers.Metaspace(), decoders.Metaspace()),
    "two spaces go": (
        normalizers.Replace(" ", "▁"), None, decoders.Sequence([*SENTENCEPIECE, decoders.Strip(" ", 2, 0)]),
    ),
    "words": (None, pre_tokenizers.Whitespace(), None),
    "pieces of words": (None, pre_tokenizers.Whitespace(), decoders.WordPiece(prefix="▁")),
}  # fmt: skip


@cache
def not_byte_level(kind: str) -> Tokenizer:
    """SentencePiece's kind, and others: a text depends on the tokens around it."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    built = tokenizers.Tokenizer(
        models.BPE(
            {word: index for index, word in enumerate(words)}, MERGES, unk_token="<unk>", byte_fallback=True
        )
    )  # fmt: skip
    normalizer, pre_tokenizer, decoder = NOT_BYTE_LEVEL[kind]
    if normalizer is not None:
        built.normalizer = normalizer
    if pre_tokenizer is not None:
        built.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        built.decoder = decoder
    built.add_special_tokens(["<s>", "</s>"])
    built.add_tokens(["two words"])
    path = Path(mkdtemp(dir=SCRATCH)) / "tokenizer.json"
    built.save(str(path))
    return Tokenizer.load(path, None)


@pytest.mark.parametrize("kind", ["llama-2", "newer", "gemma"])
@pytest.mark.parametrize(
    ("text", "stop", "before"),
    [
        ("ab a日b ab", ["日b"], "ab a"),
        ("ab ab", ["b a"], "a"),
        ("a🙂", ["🙂"], "a"),
        ("a🙂🙃 b", ["🙃 b"], "a🙂"),
        ("ab", [" a"], None),  # no text, though the first token has a space
        ("ab", ["x"], None),
    ],
)
def test_stop_strings_of_sentencepieces_kind(kind: str, text: str, stop: list[str], before: str | None) -> None:
    tokenizer = not_byte_level(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert pushed(tokenizer, ids, stop) == stopped(tokenizer, ids, stop) == before


# Pieces of words and bytes in runs, special tokens, and numbers beyond the vocabulary.
mixed_ids = st.lists(st.integers(259, 272) | st.integers(0, 275) | st.sampled_from([0xF0, 0x9F, 0x99, 0x82]).map(
    lambda byte: byte + 3), max_size=20)  # fmt: skip


@pytest.mark.parametrize("kind", NOT_BYTE_LEVEL)
@given(ids=mixed_ids, data=st.data())
@settings(max_examples=150, deadline=None)
def test_stop_strings_of_other_kinds_are_found_where_decoding_all_finds_them(
    kind: str, ids: list[int], data: st.DataObject
) -> None:
    tokenizer = not_byte_level(kind)
    texts = "".join(texts_so_far(tokenizer, ids)).replace("\ufffd", "x") or "x"
    begins = st.integers(0, len(texts) - 1)
    strings = st.builds(lambda begin, size: texts[begin : begin + size], begins, st.integers(1, 5))
    stop = data.draw(st.lists(strings | st.text("ab 日🙂", min_size=1, max_size=3), min_size=1, max_size=3))
    assert pushed(tokenizer, ids, stop) == stopped(tokenizer, ids, stop)


@pytest.mark.parametrize("kind", ["llama-2", "newer", "gemma", "metaspace"])
@given(ids=mixed_ids)
@settings(max_examples=150, deadline=None)
def test_streamed_text_of_sentencepieces_kind_is_the_text(kind: str, ids: list[int]) -> None:
    """But for spaces at its start, an unfinished character, and what becomes of bytes that are none."""
    stream = not_byte_level(kind).stream()
    streamed = "".join(stream.push(token_id) for token_id in [*ids, 261])  # a letter ends what is unfinished
    whole = not_byte_level(kind).decode([*ids, 261])
    assert all(piece in streamed for piece in whole.split("\ufffd"))
    if "\ufffd" not in whole:
        assert streamed.endswith(whole)
        assert streamed.removesuffix(whole).strip(" ") == ""


def test_no_long_output_is_decoded_again_at_every_token() -> None:
    tokenizer = not_byte_level("llama-2")
    assert type(tokenizer.stream()) is type(ours("old").stream())
    assert type(not_byte_level("pieces of words").stream()) is not type(ours("old").stream())


def test_a_tokens_text_inside_a_text_has_its_space() -> None:
    tokenizer = not_byte_level("llama-2")
    assert [tokenizer.token_text(id) for id in tokenizer.encode("ab a日")] == [" a", "b", " a", "日"]
    assert tokenizer.token_text(2) == "</s>"
    assert tokenizer.token_text(3 + 0xE2) == "\ufffd"
    assert tokenizer.token_text(3 + 0x41) == "A"
    assert tokenizer.token_text(100_000) == ""
