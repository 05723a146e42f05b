"""Whether a Hugging Face folder has a tokenizer at all; loads no library."""

from pathlib import Path

from engine.errors import CheckpointError
from engine.weights.manifest import TOKENIZER_NAME

IN_PARTS = ("vocab.json", "merges.txt")
"""From which one is built, in folders of the first OPT releases."""
SENTENCEPIECE = "tokenizer.model"
"""What older folders of other families have; only their own code, in transformers, says what it means."""


def how_to_make(source: Path) -> str:
    """What to do where only transformers can make tokenizer.json."""
    folder = repr(str(source))
    return (
        f'make {TOKENIZER_NAME} of it with transformers: python -c "from transformers import AutoTokenizer; '
        f'AutoTokenizer.from_pretrained({folder}).save_pretrained({folder})"'
    )


def check_tokenizer(source: Path) -> None:
    """Return if the files are there.

    Raises:
        CheckpointError: they are not; the sentence names those to copy.
    """
    if (source / TOKENIZER_NAME).is_file() or all((source / name).is_file() for name in IN_PARTS):
        return
    if (source / SENTENCEPIECE).is_file():
        raise CheckpointError(f"{source} has its tokenizer as {SENTENCEPIECE} alone; {how_to_make(source)}")
    raise CheckpointError(
        f"{source} has no tokenizer; copy tokenizer.json, or vocab.json and merges.txt, into it from where the "
        "checkpoint comes from"
    )
