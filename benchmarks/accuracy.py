"""``python -m benchmarks.accuracy [--model M] [--numberings N] [--json]``: what four bits do to a model's answers.

A thousand movie reviews are labelled and scored by a model in float32: plain, with weights, with the KV cache and with
both in four bits. *Drift* is the mean difference from the plain one of a label's log-probability, and of a token's of
a review. Beside it, what FlexGen's axis of groups would give. With more numberings, all of it again with the model's
channels in other orders, which change nothing but which weights share a group (see ``renumbered``); figures are means.

The model is the shipped one, or SmolLM2-135M (see ``smollm2``). Of that one, the order it came in tells little: its
weights were in four bits before, in the very groups that ``weights_in_32`` makes. ``--first 1`` leaves it out.

Reviews are short. With ``--shots N``, N others stand in front of each, with their labels: prompts so long that most of
what they attend to lies in the cache. ``--only`` leaves variants out.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import smollm2
from benchmarks.renumbered import along_outputs, error, load, renumbered, save
from engine import Choice, Choose, PlanDoesNotFit, PlanOptions, Request, Score, Scoring
from engine.dtypes import DType
from engine.formats.int4_sizes import Int4
from engine.loading import load_engine
from engine.units import GIB
from engine.weights.importing import import_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SHIPPED, REVIEWS = ROOT / "examples" / "reviews", Path(__file__).parent / "data" / "movie_reviews.test.jsonl"
MODELS = ("reviews", "smollm2")
LABELS = ("positive", "negative")
GROUP = 64


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to store the model and its cache."""

    matrices: Int4 | None = None
    tables: bool = False
    kv_format: str = "plain"
    other_axis: bool = False


VARIANTS = {
    "plain": Variant(),
    "weights": Variant(Int4(GROUP)),
    "weights_in_32": Variant(Int4(32)),
    "weights_in_128": Variant(Int4(128)),
    "weights_and_tables": Variant(Int4(GROUP), tables=True),
    "kv": Variant(kv_format="int4"),
    "both": Variant(Int4(GROUP), kv_format="int4"),
    "other_axis": Variant(other_axis=True),
}

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model says of each row."""

    labels: list[dict[str, float]]
    """The log-probability of each label."""
    tokens: list[tuple[float, ...]]
    """The log-probability of each token of the text."""


def answers(model_dir: Path, rows: list[dict[str, Any]], kv_format: str, shown: str = "") -> Answers:
    """Ask a model; ``shown`` stands in front of each review.

    Raises:
        PlanDoesNotFit: the model cannot be run so.
    """
    options = PlanOptions(
        device="cpu",
        dtype=DType.FLOAT32,
        device_memory=2 * GIB,
        kv_format=kv_format,
        prefill_chunk=256 if shown else 16,
    )
    asked = []
    for index, row in enumerate(rows):
        asked.append(Request(("label", index), Choose(f"{shown}Review: {row['text']}\nSentiment:", LABELS)))
        asked.append(Request(("text", index), Score(f"{shown}Review:", f" {row['text']}")))
    labels: dict[object, dict[str, float]] = {}
    tokens: dict[object, tuple[float, ...]] = {}
    with load_engine(model_dir, options) as engine:
        for output in engine.run(asked):
            if isinstance(output.result, Choice):
                labels[output.key] = dict(output.result.logprobs)
            elif isinstance(output.result, Scoring):
                tokens[output.key] = tuple(token.logprob for token in output.result.tokens)
    every = range(len(rows))
    return Answers([labels["label", index] for index in every], [tokens["text", index] for index in every])


def shots(rows: list[dict[str, Any]]) -> str:
    """Reviews with their labels, as they stand in front of others."""
    return "".join(f"Review: {row['text']}\nSentiment: {row['label']}\n\n" for row in rows)


def of_numbering(
    original: Path,
    seed: int,
    rows: list[dict[str, Any]],
    folder: Path,
    say: Callable[[str], None],
    shown: str = "",
    only: Collection[str] = VARIANTS,
) -> tuple[dict[str, Figures], dict[str, str]]:
    """By variant: its figures, or why it cannot be run; numbering 0 is the model as it came."""
    source = folder / "hf"
    config = json.loads((original / "config.json").read_text())
    state = load(original) if not seed else renumbered(load(original), config, seed)
    save(state, original, source)
    save(along_outputs(state, GROUP), original, folder / "hf-other")
    errors = {each.group: error(state, each) for each in {v.matrices for v in VARIANTS.values()} if each is not None}
    found, refused = {}, {}
    for name, each in VARIANTS.items():
        if name not in {"plain", *only}:
            continue
        say(f"numbering {seed}: {name}")
        model_dir = folder / name
        import_checkpoint(
            folder / "hf-other" if each.other_axis else source,
            model_dir,
            DType.FLOAT32,
            matrices=each.matrices,
            tables=each.tables,
        )
        try:
            found[name] = answers(model_dir, rows, each.kv_format, shown)
        except PlanDoesNotFit as refusal:
            if each.kv_format == "plain":
                raise
            refused[name] = str(refusal)
        shutil.rmtree(model_dir)
    figures = {name: figures_of(its, found["plain"], rows) for name, its in found.items()}
    for name in found:
        stored = VARIANTS[name].matrices
        if stored is not None:
            figures[name]["weight_error"] = errors[stored.group]
    return figures, refused


def figures_of(its: Answers, plain: Answers, rows: list[dict[str, Any]]) -> Figures:
    """What becomes of the plain answers."""
    return {
        "accuracy": accuracy(its, rows),
        "drift": drift(its, plain),
        "logprob": mean(logprob for tokens in its.tokens for logprob in tokens),
        "token_drift": token_drift(its, plain),
    }


def drift(one: Answers, other: Answers) -> float:
    """The mean difference of a label's log-probability."""
    pairs = zip(one.labels, other.labels, strict=True)
    return mean(abs(a[label] - b[label]) for a, b in pairs for label in a)


def token_drift(one: Answers, other: Answers) -> float:
    """The mean difference of a token's log-probability."""
    pairs = zip(one.tokens, other.tokens, strict=True)
    return mean(abs(a - b) for row, its in pairs for a, b in zip(row, its, strict=True))


def accuracy(found: Answers, rows: list[dict[str, Any]]) -> float:
    """The share of rows that are labelled as people did."""
    return mean(
        float(max(a, key=lambda label: a[label]) == row["label"]) for a, row in zip(found.labels, rows, strict=True)
    )


def measure(
    model: str,
    numberings: range,
    most: int,
    say: Callable[[str], None],
    num_shots: int = 0,
    only: Collection[str] = VARIANTS,
) -> dict[str, Any]:
    """Figures by variant, means over numberings; and those of each numbering."""
    rows = [json.loads(line) for line in REVIEWS.read_text(encoding="utf-8").splitlines()]
    shown, rows = shots(rows[len(rows) - num_shots :]), rows[: min(most, len(rows) - num_shots)]
    figures: dict[str, dict[str, list[float]]] = {}
    refused: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        original = SHIPPED
        if model == "smollm2":
            original = Path(temporary) / "smollm2"
            smollm2.make_folder(original)
        for seed in numberings:
            with tempfile.TemporaryDirectory() as folder:
                found, refused = of_numbering(original, seed, rows, Path(folder), say, shown, only)
            for name, its in found.items():
                for figure, value in its.items():
                    figures.setdefault(figure, {}).setdefault(name, []).append(value)
    means = {figure: {name: mean(each) for name, each in by_name.items()} for figure, by_name in figures.items()}
    return {
        "model": model,
        "rows": len(rows),
        "numberings": list(numberings),
        **means,
        "lost": {name: means["accuracy"]["plain"] - each for name, each in means["accuracy"].items()},
        "token_lost": {name: means["logprob"]["plain"] - each for name, each in means["logprob"].items()},
        "each": figures,
        "refused": refused,
        **_axis_ratios(means),
    }


def _axis_ratios(means: dict[str, dict[str, float]]) -> Figures:
    drifts = {"axis_ratio": means["drift"], "token_axis_ratio": means["token_drift"]}
    return {
        name: its["weights"] / its["other_axis"] for name, its in drifts.items() if {"weights", "other_axis"} <= {*its}
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="default: %(default)s, which is shipped")
    parser.add_argument("--numberings", type=int, default=1, help="orders of the model's channels (default: one)")
    parser.add_argument("--first", type=int, default=0, help="of these (default: 0, the model's own)")
    parser.add_argument("--rows", type=int, default=1000, help="reviews, at most (default: %(default)s)")
    parser.add_argument("--shots", type=int, default=0, help="labelled reviews in front of each (default: none)")
    parser.add_argument(
        "--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="beside plain (default: all)"
    )
    parser.add_argument("--json", action="store_true", help="one document on standard output")
    asked = parser.parse_args(arguments)
    numberings = range(asked.first, asked.first + asked.numberings)
    say = partial(print, file=sys.stderr, flush=True)
    found = measure(asked.model, numberings, asked.rows, say, asked.shots, asked.only)
    if asked.json:
        print(json.dumps(found, indent=1))
        return 0
    print(f"{'':20} {'right':>6} {'drift':>7} {'a token':>8} {'drift':>7} {'weights off':>12}")
    for name in {"plain": None, **dict.fromkeys(asked.only)}:
        if name in found["refused"]:
            print(f"{name:20} {found['refused'][name]}")
            continue
        right, label, logprob, token = (found[each][name] for each in ("accuracy", "drift", "logprob", "token_drift"))
        off = found.get("weight_error", {}).get(name, 0)
        print(f"{name:20} {right:6.3f} {label:7.4f} {logprob:8.4f} {token:7.4f} {off:12.4f}")
    if "axis_ratio" not in found:
        return 0
    ratios = f"{found['axis_ratio']:.3f} times (tokens: {found['token_axis_ratio']:.3f})"
    print(f"groups along our axis drift {ratios} as far as along FlexGen's")
    return 0


if __name__ == "__main__":
    sys.exit(main())
