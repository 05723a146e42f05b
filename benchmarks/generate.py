"""``python -m benchmarks.generate``: ours against the peers on one machine, under one memory cap, in one call."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from benchmarks.checkpoints import default_cache, make_checkpoint
from benchmarks.compare import PLAIN, Runner, compare
from benchmarks.jobs import Job, JobFailed
from benchmarks.machine import default_dtype, describe_machine
from benchmarks.peers import PEERS
from benchmarks.report import to_json, to_text
from benchmarks.shapes import SHAPES, shape_of
from benchmarks.turns import positive
from benchmarks.workload import Range, Workload
from engine.errors import EngineError
from engine.units import parse_bytes

T = TypeVar("T")
_BUSY = 0.5
"""Load average a core above which nothing can be timed."""


def main(arguments: list[str] | None = None) -> int:
    """Run, print, and return an exit code: 0, or 1 where ours could not run or tokens disagree."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    try:
        vocabulary, positions = shape_of(asked.shape).vocab_size, shape_of(asked.shape).max_positions
        if asked.prompt_len.high + asked.gen_len.high > positions + 1:
            raise ValueError(f"prompt and output together have at most {positions + 1} tokens")
    except ValueError as error:
        parser.error(str(error))
    if asked.peers and PLAIN in asked.peers and asked.weight_format == asked.kv_format == "plain":
        parser.error(f"--peers {PLAIN}: ours has nothing in four bits, either")
    if asked.slices and (asked.weights != "device" or asked.memory_cap or asked.device != "cpu"):
        parser.error("--slices: for models in memory on the CPU, without a cap")
    peers: tuple[str, ...] = asked.peers or (("transformers",) if asked.weights == "device" else ("accelerate",))
    try:
        checkpoint = make_checkpoint(asked.shape, asked.dtype, asked.cache_dir, _say, asked.weight_format)
        rounds = asked.weight_format != "plain" or asked.kv_format != "plain"
        plain = make_checkpoint(asked.shape, asked.dtype, asked.cache_dir, _say) if rounds else checkpoint
        small = make_checkpoint("tiny", "float32", asked.cache_dir, _say)
        job = Job(
            role="ours",
            shape=asked.shape,
            dtype=asked.dtype,
            device=asked.device,
            weights=asked.weights,
            folder=str(checkpoint.folder),
            model_dir=str(checkpoint.model_dir),
            workload=Workload(
                task=asked.task, prompt=asked.prompt_len, out=asked.gen_len, vocabulary=vocabulary, seed=asked.seed
            ),
            num_requests=asked.requests,
            schedule=asked.schedule,
            device_memory=asked.device_memory,
            micro_batch=asked.micro_batch,
            micro_batches=asked.micro_batches,
            plain_dir=str(plain.model_dir) if rounds else None,
            kv_format=None if asked.kv_format == "plain" else asked.kv_format,
            disk_rate=asked.disk_rate,
        )
        machine = describe_machine(asked.cache_dir)
        load = os.getloadavg()[0]
        if load > _BUSY * (os.cpu_count() or 1):
            _say(f"load average {load:.1f}: this machine is busy, and that is what the figures will show")
        runner = Runner(asked.memory_cap, asked.timeout, _say)
        none = peers == ("none",)
        comparison = compare(
            runner,
            job,
            small=None if none else small,
            peers=() if none else peers,
            batches=asked.peer_batches,
            repeat=asked.repeat,
            in_slices=asked.slices,
            say=_say,
        )
    except (JobFailed, EngineError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    if asked.json:
        print(json.dumps(to_json(comparison, machine), indent=1))
        for name, peer in comparison.peers.items():
            for failure in peer.failed:
                _say(f"{name}, {failure}")
    else:
        print(to_text(comparison, machine, asked.task))
    return 1 if comparison.tokens_agree is False else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate", description=__doc__)
    add = parser.add_argument
    add("--shape", required=True, help=", ".join(SHAPES))
    add("--requests", type=positive, required=True, metavar="N")
    add("--prompt-len", type=_as(Range.parse), required=True, metavar="N|LO-HI", help="tokens, the BOS among them")
    add("--gen-len", type=_as(Range.parse), required=True, metavar="N|LO-HI", help="tokens generated (or scored)")
    add(
        "--weights",
        choices=("device", "host", "disk", "planned"),
        required=True,
        help="where the layers live; planned: where the planner finds best, and on disk for a peer",
    )
    add("--memory-cap", type=_as(parse_bytes), metavar="SIZE", help="of each process, page cache included")
    add("--peers", type=_as(_peers), metavar="NAME,…", help=f"{', '.join(PEERS)}, {PLAIN}, or none")
    add(
        "--peer-batches",
        type=_as(_batches),
        default=(8, 16),
        metavar="N,…",
        help="a peer is timed at its best of these",
    )
    add("--repeat", type=positive, default=1, metavar="N", help="time all in turn N times; medians are given")
    add(
        "--slices",
        action="store_true",
        help="all at the same time, a second each in turn: for machines whose neighbours make them slow for a while",
    )
    add("--schedule", choices=("mixed", "block"), help="ours: mixed passes, or FlexGen's two phases")
    add("--task", choices=("generate", "score"), default="generate")
    add("--json", action="store_true", help="one JSON document on standard output")
    add("--device", default=_default_device())
    add(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default=default_dtype(),
        help="of all that are compared: bfloat16, or float32 on a CPU that is slow in it (default here: %(default)s)",
    )
    add("--weight-format", choices=("plain", "int4"), default="plain", help="ours")
    add("--kv-format", choices=("plain", "int4"), default="plain", help="ours")
    add("--disk-rate", type=_as(parse_bytes), metavar="SIZE", help="ours: read the disk no faster, in bytes a second")
    add("--device-memory", type=_as(parse_bytes), metavar="SIZE", help="ours: by default what the cap leaves")
    add("--micro-batch", type=positive, metavar="N", help="ours: tokens computed together")
    add("--micro-batches", type=positive, metavar="N", help="ours: of a pass, at most")
    add("--seed", type=int, default=0)
    add("--timeout", type=positive, default=3600, metavar="SECONDS", help="for each process")
    add("--cache-dir", type=Path, default=default_cache(), help="where checkpoints are kept (default: %(default)s)")
    return parser


def _default_device() -> str:
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


def _peers(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if names != ("none",) and not set(names) <= {*PEERS, PLAIN}:
        raise ValueError(f"{text!r}: peers are {', '.join(PEERS)}, {PLAIN} (ours with nothing in four bits); or none")
    return names


def _batches(text: str) -> tuple[int, ...]:
    return tuple(sorted({positive(part) for part in text.split(",")}))


def _as(parse: Callable[[str], T]) -> Callable[[str], T]:
    """``argparse`` shows the sentence of an ``ArgumentTypeError``, but not that of a ``ValueError``."""

    def parsed(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
