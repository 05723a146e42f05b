"""``python -m benchmarks.accuracy [--numberings N] [--json]``: what four bits do to the answers of the shipped model.

A thousand movie reviews are labelled with it in float32: plain, with weights, with the KV cache and with both in four
bits. *Drift* is the mean difference of a label's log-probability from the plain one. Beside it, what FlexGen's axis of
groups would give. With more numberings, all of it again with the model's channels in other orders, which change nothing
but which weights share a group (see ``renumbered``); figures are means.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.renumbered import along_outputs, load, renumbered, save
from engine import Choice, Choose, PlanOptions, Request
from engine.dtypes import DType
from engine.formats.int4_sizes import Int4
from engine.loading import load_engine
from engine.units import GIB
from engine.weights.importing import import_checkpoint

ROOT = Path(__file__).resolve().parents[1]
MODEL, REVIEWS = ROOT / "examples" / "reviews", Path(__file__).parent / "data" / "movie_reviews.test.jsonl"
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
Answers = list[dict[str, float]]
"""Of each row, the log-probability of each label."""


def answers(model_dir: Path, rows: list[dict[str, Any]], kv_format: str) -> Answers:
    """What a model says."""
    options = PlanOptions(device="cpu", dtype=DType.FLOAT32, device_memory=GIB, kv_format=kv_format, prefill_chunk=16)
    asked = [Request(index, Choose(f"Review: {row['text']}\nSentiment:", LABELS)) for index, row in enumerate(rows)]
    found: dict[object, dict[str, float]] = {}
    with load_engine(model_dir, options) as engine:
        for output in engine.run(asked):
            if not isinstance(output.result, Choice):
                raise RuntimeError(f"row {output.key} was not labelled")
            found[output.key] = dict(output.result.logprobs)
    return [found[index] for index in range(len(rows))]


def of_numbering(seed: int, rows: list[dict[str, Any]], folder: Path, say: Callable[[str], None]) -> dict[str, Answers]:
    """By variant; numbering 0 is the model as it came."""
    source = folder / "hf"
    config = json.loads((MODEL / "config.json").read_text())
    state = load(MODEL) if not seed else renumbered(load(MODEL), config, seed)
    save(state, MODEL, source)
    save(along_outputs(state, GROUP), MODEL, folder / "hf-other")
    found = {}
    for name, each in VARIANTS.items():
        say(f"numbering {seed}: {name}")
        model_dir = folder / name
        import_checkpoint(
            folder / "hf-other" if each.other_axis else source,
            model_dir,
            DType.FLOAT32,
            matrices=each.matrices,
            tables=each.tables,
        )
        found[name] = answers(model_dir, rows, each.kv_format)
    return found


def drift(one: Answers, other: Answers) -> float:
    """The mean difference of a label's log-probability."""
    return mean(abs(a[label] - b[label]) for a, b in zip(one, other, strict=True) for label in a)


def accuracy(found: Answers, rows: list[dict[str, Any]]) -> float:
    """The share of rows that are labelled as people did."""
    return mean(float(max(a, key=lambda label: a[label]) == row["label"]) for a, row in zip(found, rows, strict=True))


def measure(numberings: int, most: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Drifts and accuracies, means over numberings; and each numbering's drifts."""
    rows = [json.loads(line) for line in REVIEWS.read_text(encoding="utf-8").splitlines()][:most]
    drifts: dict[str, list[float]] = {name: [] for name in VARIANTS}
    right: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for seed in range(numberings):
        with tempfile.TemporaryDirectory() as folder:
            found = of_numbering(seed, rows, Path(folder), say)
        for name, its in found.items():
            drifts[name].append(drift(its, found["plain"]))
            right[name].append(accuracy(its, rows))
    means = {name: mean(each) for name, each in drifts.items()}
    return {
        "rows": len(rows),
        "numberings": numberings,
        "accuracy": {name: mean(each) for name, each in right.items()},
        "lost": {name: mean(right["plain"]) - mean(each) for name, each in right.items()},
        "drift": means,
        "drifts": drifts,
        "axis_ratio": means["weights"] / means["other_axis"],
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--numberings", type=int, default=1, help="orders of the model's channels (default: its own)")
    parser.add_argument("--rows", type=int, default=1000, help="reviews, at most (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one document on standard output")
    asked = parser.parse_args(arguments)
    found = measure(asked.numberings, asked.rows, lambda text: print(text, file=sys.stderr, flush=True))
    if asked.json:
        print(json.dumps(found, indent=1))
        return 0
    for name in VARIANTS:
        print(f"{name:20} {found['accuracy'][name]:.3f} right, drift {found['drift'][name]:.4f}")
    print(f"groups along our axis drift {found['axis_ratio']:.3f} times as far as along FlexGen's")
    return 0


if __name__ == "__main__":
    sys.exit(main())
