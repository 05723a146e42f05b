"""Text to token ids and back, as the model's makers meant it, on the ``tokenizers`` library alone."""

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import decoders, pre_tokenizers

from engine.errors import CheckpointError
from engine.shape import ModelShape


class UnencodableText(ValueError):
    """A text that no tokenizer can take, because it is no valid Unicode; the fault of a request's content."""


class Tokenizer:
    """The tokenizer of one model directory; stateless, so threads may share it."""

    def __init__(self, backend: tokenizers.Tokenizer, bos_token_id: int | None, prefix_token_id: int | None) -> None:
        backend.no_truncation()  # what a training run left in the file is not wanted here
        backend.no_padding()
        self._backend = backend
        self._bos = bos_token_id
        self._prefix = prefix_token_id if bos_token_id is None else bos_token_id
        self._adds_bos = bos_token_id is not None and backend.encode("").ids[:1] == [bos_token_id]
        self._num_after = _num_after(backend)
        self._special = frozenset(id for id, token in backend.get_added_tokens_decoder().items() if token.special)
        self._byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        steps = _steps(backend.decoder)
        self._local = all(map(_is_local, steps))
        self._byte_tokens = any(step["type"] == "ByteFallback" for step in steps)

    @classmethod
    def load(cls, path: Path, bos_token_id: int | None, prefix_token_id: int | None = None) -> Self:
        """The tokenizer in a file.

        Args:
            path: a model directory's tokenizer.json.
            bos_token_id: what every encoded text begins with, once. None: texts are encoded by the file's own rule,
                which may put BOS before them, too.
            prefix_token_id: what an empty context is scored after where ``bos_token_id`` is None.

        Raises:
            CheckpointError: absent or damaged.
        """
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; import the model again")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
            return cls(backend, bos_token_id, prefix_token_id)
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} is damaged ({error}); import the model again") from error

    @classmethod
    def of_model(cls, path: Path, shape: ModelShape) -> Self:
        """The same, with the special tokens of a configuration; an empty context is scored after BOS, else EOS.

        Raises:
            CheckpointError: absent or damaged.
        """
        first = next((each for each in (shape.bos_token_id, *shape.eos_token_ids) if each is not None), None)
        return cls.load(path, shape.bos_token_id if shape.forces_bos else None, first)

    @property
    def largest_id(self) -> int:
        """The highest number of a token, be it added, special or put around every text; -1: there are none."""
        around = self._backend.encode("").ids
        return max(*self._backend.get_vocab(with_added_tokens=True).values(), *around, -1, -1)

    def encode(self, text: str) -> list[int]:
        """Token ids by the tokenizer's own rule; where a BOS is given, with it exactly once at their start.

        Raises:
            UnencodableText: the text holds a lone surrogate.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of each, on all cores and without Python's lock.

        Raises:
            UnencodableText: a text holds a lone surrogate.
        """
        return [self._with_bos(ids) for ids in self._ids(texts, special=True)]

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """A context and its continuation as lm-eval encodes them.

        White space at the end of the context moves to the continuation; both are encoded as one text, which is cut
        where the context's own encoding ends. What the tokenizer's rule puts before a text is part of the context, what
        it puts after one (an EOS, with some) is left out. An empty context becomes the BOS (or prefix) token.

        Raises:
            UnencodableText: a text holds a lone surrogate.
        """
        stripped = context.rstrip()
        if not stripped:
            (ids,) = self._ids([context + continuation], special=False)
            if self._prefix is None:
                return [], ids
            return [self._prefix], ids[1:] if ids[:1] == [self._prefix] else ids
        pair = self.encode_batch([stripped, context + continuation])
        context_ids, whole_ids = (ids[: len(ids) - self._num_after] for ids in pair)
        return context_ids, whole_ids[len(context_ids) :]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of all ids at once, special tokens skipped."""
        return self._backend.decode(list(token_ids), skip_special_tokens=True)

    def token_text(self, token_id: int) -> str:
        """One token as people read it inside a text, special ones too; a piece of a character is U+FFFD."""
        alone = self._backend.decode([token_id], skip_special_tokens=False)
        if self._byte_level or not self._local:
            return alone
        # SentencePiece's decoders take spaces from the first token of a text, which the second still has.
        return self._backend.decode([token_id, token_id], skip_special_tokens=False)[len(alone) :]

    def stop_checker(self, stop: Sequence[str]) -> "StopChecker":
        """A new watch for stop strings over one sequence's output."""
        return StopChecker(self, stop)

    def stream(self) -> "TextStream":
        """A new incremental ``decode``."""
        return _ByteStream(self) if self._byte_level or self._local else _WholeStream(self)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to the decoded bytes inside a text; nothing if special or unknown."""
        text = None if token_id in self._special else self._backend.id_to_token(token_id)
        if text is None:
            return b""
        if not self._byte_level:
            is_byte = self._byte_tokens and _BYTE_TOKEN.fullmatch(text)
            return bytes([int(text[3:5], 16)]) if is_byte else self.token_text(token_id).encode()
        try:
            return bytes(_BYTE_OF[character] for character in text)
        except KeyError:  # an added token, which is its own text
            return text.encode()

    def _with_bos(self, ids: list[int]) -> list[int]:
        if self._bos is None:
            return ids
        if ids[:1] != [self._bos]:
            return [self._bos, *ids]
        # A text that begins with the BOS token's own text would get a second one from the tokenizer.
        return ids[1:] if self._adds_bos and ids[1:2] == [self._bos] else ids

    def _ids(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=special)
        except TypeError:
            for text in texts:
                _check_unicode(text)
            raise
        return [encoding.ids for encoding in encodings]


class StopChecker:
    """Finds the first stop string in the text of a growing sequence of tokens.

    Stop strings are found across the borders of tokens, and of tokens that are pieces of a character. Each token costs
    time for its own text and the longest stop string, however long the output is.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(text for text in stop if text)
        self._overlap = max((len(text) for text in self._stop), default=1) - 1
        self._stream = tokenizer.stream()
        self._token_ids: list[int] = []
        self._tail = ""  # the end of the text: before it, no stop string can begin any more

    def push(self, token_id: int) -> str | None:
        """Takes the next token; the text before the earliest stop string if there is one now, else None."""
        if not self._stop:
            return None
        self._token_ids.append(token_id)
        tail = self._tail + self._stream.push(token_id)
        if any(text in tail for text in self._stop):
            # The stream may differ from the text in spaces at its start and in bytes that are no characters.
            whole = self._tokenizer.decode(self._token_ids)
            begins = [begin for begin in (whole.find(text) for text in self._stop) if begin >= 0]
            if begins:
                return whole[: min(begins)]
        self._tail = tail[max(0, len(tail) - self._overlap) :]
        return None


class TextStream:
    """An incremental ``decode``: the pieces that ``push`` returns are the text so far, less an unfinished character.

    They may begin with spaces that ``decode`` takes from the start of a text, and may make something else of bytes
    that are no characters.
    """

    def push(self, token_id: int) -> str:
        """The text that this token completes."""
        raise NotImplementedError


class _ByteStream(TextStream):
    """For tokenizers whose text is the concatenation of what each token stands for, in bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))


class _WholeStream(TextStream):
    """For decoders that we know nothing of: decodes all again at every token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._num_emitted = 0

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids).rstrip("\ufffd")
        new = text[self._num_emitted :]
        self._num_emitted = max(self._num_emitted, len(text))
        return new


def _steps(decoder: decoders.Decoder | None) -> list[dict[str, Any]]:
    """The settings of what a decoder does with tokens, one after the other, as tokenizer.json has them."""
    if decoder is None:
        return []
    settings = json.loads(decoder.__getstate__())
    return list(settings["decoders"]) if settings["type"] == "Sequence" else [settings]


def _is_local(step: Mapping[str, Any]) -> bool:
    """Whether a token's text then depends on those around it in nothing but the first spaces and the bytes of a
    character, as with SentencePiece's vocabularies."""
    return (
        step["type"] in ("Metaspace", "ByteFallback", "Fuse")
        or (step["type"] == "Replace" and len(step["pattern"].get("String", "")) == 1)
        or (step["type"] == "Strip" and step["start"] <= 1 and step["stop"] == 0)
    )


def _num_after(backend: tokenizers.Tokenizer) -> int:
    """How many tokens the tokenizer's rule puts after a text."""
    mask = backend.encode("a").special_tokens_mask
    return 0 if all(mask) else mask[::-1].index(0)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise UnencodableText(f"the text is no valid Unicode: character {error.start} is {code}, alone") from None


def _byte_of() -> dict[str, int]:
    """Which byte each character of a byte-level vocabulary stands for.

    GPT-2 writes the bytes that are printable in Latin-1 as themselves, the others as characters from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    assert len(pre_tokenizers.ByteLevel.alphabet()) == len(printable) + len(others)
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_of()
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
