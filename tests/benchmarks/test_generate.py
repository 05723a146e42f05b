"""One real call on a small shape: ours and a peer in processes of their own."""

import json
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from benchmarks.generate import main
from benchmarks.memory import allowed_bytes
from benchmarks.turns import positive
from engine.units import GIB

SMALL = ["--shape", "tiny", "--prompt-len", "5-20", "--gen-len", "3-6", "--dtype", "float32", "--peer-batches", "2"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def test_one_call_measures_both_sides_and_compares_their_tokens(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--requests", "6", "--weights", "disk", "--memory-cap", "2GiB", "--peers", "accelerate", "--json"]
    assert main([*SMALL, *asked, "--cache-dir", str(cache), "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"machine", "limits", "ours", "peers", "ratio", "tokens_agree", "cap_missing"}
    assert set(found["ours"]) == {
        "tok_s", "peak_bytes", "peak_over_budget", "bound_fraction", "peak_fraction", "bound_by",
    }  # fmt: skip
    assert found["ours"]["peak_over_budget"] > 0
    assert found["tokens_agree"] is True
    assert found["peers"]["accelerate"]["batch"] == 2
    assert found["peers"]["accelerate"]["error"] is None
    assert found["ratio"]["accelerate"] == pytest.approx(found["ours"]["tok_s"] / found["peers"]["accelerate"]["tok_s"])
    assert found["ours"]["bound_by"] in found["limits"]["busy"]
    assert min(found["limits"]["alone"].values()) > 0


def test_scores_are_timed_too_and_text_is_for_people(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--requests", "4", "--weights", "device", "--task", "score", "--peers", "none", "--slices"]
    assert main([*SMALL, *asked, "--cache-dir", str(cache), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "scored token/s" in out
    assert "of the matrix peak" in out


def test_a_run_that_cannot_be_is_a_sentence(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--requests", "2", "--weights", "device", "--device-memory", "1KiB", "--peers", "none", "--device", "cpu"]
    assert main([*SMALL, *asked, "--cache-dir", str(cache)]) == 1
    assert "raise --device-memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--shape", "opt-9b"], "opt-9b"),
        (["--prompt-len", "9-3"], "is not a length"),
        (["--prompt-len", "300"], "at most 257 tokens"),
        (["--memory-cap", "much"], "is not a size"),
        (["--peers", "flexgen"], "peers are transformers, accelerate"),
        (["--requests", "0"], "positive"),
        (["--slices", "--memory-cap", "1GiB"], "in memory on the CPU, without a cap"),
    ],
)
def test_wrong_arguments_are_explained(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*SMALL, "--requests", "1", "--weights", "device", *arguments])
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_an_all_disk_placement_may_hold_a_third_of_the_model() -> None:
    assert allowed_bytes(2 * GIB) == pytest.approx(GIB, rel=0.001)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "²", "", "x"])
def test_nothing_is_timed_less_than_once(text: str) -> None:
    assert positive("3") == 3
    with pytest.raises(ArgumentTypeError, match="is not a positive whole number"):
        positive(text)
