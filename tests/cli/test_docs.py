"""The commands of the documentation, as they stand: each is understood, and the first ones find what they name."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from cli.main import main
from tests.cli.conftest import ROOT

DOCUMENTS = ("README.md", "docs/guide.md", "examples/README.md", "examples/reviews/README.md")
_ENDS = {"&&", "||", "|", "&", ";", "<", ">", ">>"}


def fenced(text: str) -> Iterator[str]:
    """The code blocks of a document."""
    return (match[1] for match in re.finditer(r"^```(?:sh|console)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


def lines(block: str) -> Iterator[str]:
    """Commands as a shell takes them: over line ends within quotes or behind a backslash; here-documents left out."""
    pending, until = "", None
    for line in block.splitlines():
        if until is not None:
            until = None if line == until else until
            continue
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        try:
            shlex.split(pending, comments=True)
        except ValueError:
            pending += "\n"
            continue
        if document := re.search(r"<<-?\s*'?(\w+)'?", pending):
            until = document[1]
        yield pending
        pending = ""


def commands(document: str) -> Iterator[list[str]]:
    """The words after each `overnight` in a document's blocks."""
    for block in fenced((ROOT / document).read_text()):
        for line in lines(block):
            words = shlex.split(line, comments=True)
            starts = [i for i, word in enumerate(words) if re.fullmatch(r"(\w+=\$\()?overnight", word)]
            for start in starts:
                end = next((i for i in range(start, len(words)) if words[i] in _ENDS), len(words))
                inside = words[start] != "overnight"
                found = words[start + 1 : end]
                yield [*found[:-1], found[-1].removesuffix(")")] if inside else found


def of(document: str, heading: str) -> list[list[str]]:
    """The commands between a heading and the next of its kind."""
    text = (ROOT / document).read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    assert text, heading
    path = Path("part.md")
    path.write_text(text)
    return list(commands(str(path.absolute())))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_is_understood(document: str) -> None:
    found = list(commands(document))
    assert found or document == "examples/reviews/README.md"
    for given in found:
        words = ["7" if word.startswith("$") and word[1:].isupper() else word for word in given]
        if "…" in words or not words or words[0].startswith("-"):
            continue
        with click.Context(main) as context:
            command = main.get_command(context, words[0])
            assert command is not None, words
            try:
                with command.make_context(words[0], words[1:], parent=context):
                    pass
            except click.exceptions.Exit:  # --help
                pass
            except click.UsageError as error:
                raise AssertionError(f"{document}: overnight {' '.join(words)}: {error.format_message()}") from error


@pytest.mark.parametrize(
    ("document", "heading"), [("README.md", "A five-minute tour"), ("docs/guide.md", "Two ways to work")]
)
def test_the_first_commands_name_models_that_are_there(
    home: Path, document: str, heading: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, checked = {"facebook/opt-30b"}, 0
    for words in of(document, heading):
        if words[0] == "import":
            known.add(words[-1].rpartition("/")[2])
        elif "--model" in words and words[0] in ("run", "enqueue") and "opt-30b" not in words:
            checked += 1
            assert words[words.index("--model") + 1] in known
    assert checked == 2


def test_no_document_starts_a_redis_that_others_can_reach() -> None:
    for document in DOCUMENTS:
        for line in (ROOT / document).read_text().splitlines():
            if line.startswith("redis-server"):
                assert "--bind 127.0.0.1 --save ''" in line, document
