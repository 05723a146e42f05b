"""``python -m benchmarks.gpu.streamed``: ``overnight run`` of a model that the GPU cannot hold, with no flag.

The weights are random; where the disk has no room for a model that is larger than the GPU, a small one is run within a
third of what its weights take.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.checkpoints import default_cache, make_checkpoint
from benchmarks.gpu.steps import ROOT
from benchmarks.shapes import shape_of
from benchmarks.workload import Range, Workload
from engine.devices.facts import free_disk_space
from engine.dtypes import DType
from engine.planner.known_models import known_model
from engine.units import format_bytes

SMALL, LARGE = "opt-1.3b", ("opt-6.7b", "opt-13b", "opt-30b")
"""Shapes, each larger than the one before. OPT-66B would be made for an hour."""
DTYPE = DType.FLOAT16
"""As OPT's own weights are."""
COPIES = 2.2
"""A checkpoint lies on the disk as Hugging Face has it and as we have it; and some room is left to others."""
ROWS, NEW_TOKENS = 64, 16


@dataclass(frozen=True, slots=True)
class Choice:
    """What is run."""

    shape: str
    device_memory: int | None
    """Bytes; ``None``: the flag is not given."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the model, run it, and return an exit code: 0 where every row has an output."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.streamed", description=__doc__)
    parser.add_argument("--cache-dir", type=Path, default=default_cache(), help="where checkpoints are kept")
    cache: Path = parser.parse_args(arguments).cache_dir
    choice = choose(torch.cuda.get_device_properties(0).total_memory, free_disk_space(cache), made_in(cache))
    print(f"{choice.shape} has {format_bytes(weight_bytes(choice.shape))} of weights")
    checkpoint = make_checkpoint(choice.shape, DTYPE, cache, print)
    with tempfile.TemporaryDirectory(prefix="overnight-gpu-") as folder:
        rows, outputs = Path(folder) / "rows.jsonl", Path(folder) / "outputs.jsonl"
        write_rows(rows, choice.shape)
        begin = time.monotonic()
        command = command_for(choice, checkpoint.model_dir, rows, outputs)
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code:
            return code
        done = count_done(outputs)
    print(f"{done} of {ROWS} rows of {choice.shape} in {time.monotonic() - begin:.0f} s, loading included")
    return 0 if done == ROWS else 1


def choose(card_bytes: int, disk_bytes: int, made: Sequence[str] = ()) -> Choice:
    """The smallest shape that the card cannot hold, if the disk has room for it; else a small one in little memory.

    Args:
        card_bytes: the card's memory.
        disk_bytes: what is free where checkpoints are made.
        made: shapes whose checkpoints are there already.
    """
    for shape in LARGE:
        size = weight_bytes(shape)
        if size > card_bytes and (shape in made or COPIES * size <= disk_bytes):
            return Choice(shape, None)
    return Choice(SMALL, weight_bytes(SMALL) // 3)


def made_in(cache: Path) -> tuple[str, ...]:
    """Shapes whose checkpoints need no more room."""
    return tuple(shape for shape in LARGE if (cache / f"{shape}-{DTYPE}.overnight").is_dir())


def weight_bytes(shape: str) -> int:
    """Bytes of a shape's weights."""
    known = known_model(shape)
    assert known is not None
    return sum(known.stored(DTYPE).unit_bytes.values())


def write_rows(path: Path, shape: str) -> None:
    """Prompts of many lengths, as JSON lines."""
    vocabulary = shape_of(shape).vocab_size
    work = Workload(task="generate", prompt=Range(16, 512), out=Range(NEW_TOKENS, NEW_TOKENS), vocabulary=vocabulary)
    lines = [json.dumps({"id": index, "prompt": item.prompt_text}) for index, item in enumerate(work.items(ROWS))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def command_for(choice: Choice, model_dir: Path, rows: Path, outputs: Path) -> list[str]:
    """``overnight run``, as a person would give it."""
    asked = ("run", rows, "--model", model_dir, "--task", "generate", "--max-new-tokens", NEW_TOKENS, "-o", outputs)
    within = () if choice.device_memory is None else ("--device-memory", choice.device_memory)
    return [sys.executable, "-m", "cli", *map(str, (*asked, *within))]


def count_done(outputs: Path) -> int:
    """Rows with an output."""
    lines = outputs.read_text(encoding="utf-8").splitlines()
    return sum(json.loads(line)["status"] == "ok" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
