"""``python -m benchmarks.outputs FILE``: outputs of one commit under every placement, to be compared with another's.

The demo's 500 labels and 200 seeded generations by the shipped model, in float32, with compute on the CPU and on the
simulated device, which really copies.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from math import isnan
from pathlib import Path
from typing import Any

from engine import engine as engine_module
from engine.devices.host import HostDevice
from engine.devices.simulated import SimulatedDevice
from engine.loading import load_engine
from engine.memory.device import Device
from engine.request import Choose, Generate, Request, SamplingParams
from engine.weights.importing import import_checkpoint
from tests.engine.placements import PLACEMENTS, options_of

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "reviews"
GENERATIONS = 200
TOLERANCE = 1e-5
"""Difference of two log-probabilities that count as equal: kernels for one row and for two sum in different orders."""
DEVICES: dict[str, type[Device]] = {"cpu": HostDevice, "simulated": SimulatedDevice}


def requests(texts: list[str]) -> Iterator[Request]:
    """The demo's rows, and prompts of many lengths to go on with, half of them drawn."""
    for index, text in enumerate(texts):
        yield Request(f"label {index}", Choose(f"Review: {text}\nSentiment:", ("positive", "negative")))
    for index, text in enumerate(texts[:GENERATIONS]):
        drawn = {"temperature": 0.8, "top_p": 0.95, "seed": 7} if index % 2 else {}
        sampling = SamplingParams(max_new_tokens=4 + index % 40, ignore_eos=index % 4 < 2, **drawn)  # type: ignore[arg-type]
        yield Request(f"text {index}", Generate(f"Review: {text}", sampling, sample_index=index))


def record(model_dir: Path) -> dict[str, dict[str, Any]]:
    """Every output as plain JSON, by ``device, placement`` and by the request's key."""
    lines = (EXAMPLE / "sample.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    found: dict[str, dict[str, Any]] = {}
    for device, make in DEVICES.items():
        for name in PLACEMENTS:
            with tempfile.TemporaryDirectory() as folder:
                options = options_of(name, dtype="float32", disk_dir=Path(folder), micro_batch=512, micro_batches=4)
                with load_engine(model_dir, options, device=make()) as engine:
                    outputs = {str(output.key): asdict(output) for output in engine.run(requests(texts))}
            found[f"{device}, {name}"] = json.loads(json.dumps(outputs))
            print(f"{device}, {name}: {len(outputs)} outputs", file=sys.stderr, flush=True)
    return found


def differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """Where two records differ: floats by more than ``TOLERANCE``, everything else at all."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            if key not in before or key not in after:
                yield f"{where}/{key}: only {'after' if key in after else 'before'}"
            else:
                yield from differences(before[key], after[key], f"{where}/{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from differences(one, other, f"{where}/{index}")
    elif isinstance(before, float) and isinstance(after, float):
        # Asked so that a NaN on one side differs from everything.
        if not (abs(before - after) <= TOLERANCE or before == after or (isnan(before) and isnan(after))):
            yield f"{where}: {before} and {after}"
    elif before != after or type(before) is not type(after):
        yield f"{where}: {before!r:.60} and {after!r:.60}"


def main() -> int:
    """Record into a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.outputs", description=__doc__)
    parser.add_argument("file", type=Path)
    asked = parser.parse_args()
    found = Path(engine_module.__file__).resolve()
    if not found.is_relative_to(ROOT):
        parser.error(f"the engine is loaded from {found}, not from this tree")
    with tempfile.TemporaryDirectory() as folder:
        # Of this tree's own importer and example, whatever another tree has imported before.
        model_dir = Path(folder) / "reviews"
        import_checkpoint(EXAMPLE, model_dir)
        asked.file.write_text(json.dumps(record(model_dir)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
