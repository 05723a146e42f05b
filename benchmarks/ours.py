"""Ours, timed: one engine, one run over all requests, after a warm-up."""

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, sleep
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.jobs import Job, PeakMemory
from benchmarks.workload import Item, as_text
from engine.dtypes import DType
from engine.engine import Engine
from engine.loading import load_engine
from engine.model.family import layer_name
from engine.planner.plan import PlanOptions
from engine.planner.profiles import hardware_from_json
from engine.planner.workload import Workload
from engine.request import Generate, Generation, Output, Rejection, Request, SamplingParams, Score
from engine.schedule.passes import PassStats
from engine.tiers import Shares
from engine.tokenizer import Tokenizer
from engine.units import MIB
from engine.weights.files import WeightFiles
from engine.weights.layout import stored_in
from engine.weights.manifest import read_manifest

_SHARES = {"device": Shares(100, 0, 0), "host": Shares(0, 100, 0), "disk": Shares(0, 0, 100), "planned": None}
_MARGIN = 1.05, 100 * MIB
"""How far the process may go beyond its plan's budgets: an engine that is told what a capped process may use leaves
as much to the interpreter's allocators."""


def run(job: Job) -> dict[str, Any]:
    """Seconds, peak memory and what each pass did.

    Raises:
        EngineError: the plan does not fit, or a tier, a lane or the device failed.
    """
    items = job.items()
    tokenizer = Tokenizer.load(Path(job.model_dir) / "tokenizer.json", None)
    tokenizer.encode("w4")
    torch.ones(64, 64) @ torch.ones(64, 64)  # the thread pool belongs to the idle process
    gc.collect()
    memory = PeakMemory()
    hardware = hardware_from_json(job.profile) if job.profile else None
    workload = _workload(items) if hardware else None
    options = _options(job, memory.idle_bytes)
    loaded = load_engine(Path(job.model_dir), options, workload=workload, hardware=hardware)
    with held(job.disk_rate), loaded as engine:
        _warm_up(engine, job, items)
        reports: list[PassStats] = []
        outputs: list[Output] = []
        start = perf_counter()
        for report in engine.passes(_requests(job, items)):
            reports.append(report.stats)
            outputs += report.outputs
        seconds = perf_counter() - start
        plan, unpacked = engine.plan.to_json(), _unpacked_values(job, engine)
    for output in outputs:
        _check(output.result)
    result: dict[str, Any] = {
        "seconds": seconds,
        "began": start,
        "peak_bytes": memory.bytes(),
        "idle_bytes": memory.idle_bytes,
        "plan": {name: plan[name] for name in ("budgets", "layers", "kv_bytes", "micro_batch", "micro_batches")},
        "num_tokens": sum(output.completion_tokens for output in outputs),
        "passes": [
            {
                "seconds": stats.seconds,
                "prefill_tokens": stats.prefill_tokens,
                "decode_tokens": stats.decode_tokens,
                "lane_bytes": {str(lane): num_bytes for lane, num_bytes in stats.lane_bytes.items()},
                "unpacked": unpacked,
            }
            for stats in reports
        ],
    }
    if job.keep_tokens:
        found = {out.key: list(out.result.token_ids) for out in outputs if isinstance(out.result, Generation)}
        result["tokens"] = [found[index] for index in range(len(items))]
    return result


@contextmanager
def held(bytes_per_s: int | None) -> Iterator[None]:
    """Units of weights are read no faster than that, as from a slower disk."""
    if bytes_per_s is None:
        yield
        return
    read = WeightFiles.read_unit

    def slowly(self: WeightFiles, name: str, out: Tensor) -> int:
        begin = perf_counter()
        count = read(self, name, out)
        sleep(max(0.0, begin + count / bytes_per_s - perf_counter()))
        return count

    with patch.object(WeightFiles, "read_unit", slowly):
        yield


def _warm_up(engine: Engine, job: Job, items: list[Item]) -> None:
    """Prompts until the KV cache is full or all have been admitted, then dropped: what is timed runs on memory that the
    process has used before, as a worker's does for all but its first minute."""
    passes = engine.passes(_requests(job, items))
    for report in passes:
        if report.outputs or not report.stats.prefill_tokens:
            break
    passes.close()


def _unpacked_values(job: Job, engine: Engine) -> float:
    """Values that a pass unpacks from four bits: those of layers that do not lie there as they are computed with."""
    stored, plan = stored_in(read_manifest(Path(job.model_dir))), engine.plan
    layers = [layer_name(index) for index, tier in enumerate(plan.layers) if plan.stay_packed or tier != "device"]
    sizes = (stored.computed_bytes(layer, plan.dtype) for layer in layers if stored.is_packed(layer, plan.dtype))
    return sum(sizes) / plan.dtype.num_bytes


def _requests(job: Job, items: list[Item]) -> Iterator[Request]:
    return (_request(job, index, item) for index, item in enumerate(items))


def _request(job: Job, index: int, item: Item) -> Request:
    if job.workload.task == "score":
        return Request(index, Score(item.prompt_text, " " + as_text(item.continuation)))
    sampling = SamplingParams(max_new_tokens=len(item.continuation), ignore_eos=True)
    return Request(index, Generate(item.prompt_text, sampling))


def _options(job: Job, idle_bytes: int) -> PlanOptions:
    """The placement that was asked for; all the memory that a cap leaves, and every other choice the engine's own."""
    device_memory = job.device_memory
    host_memory = None
    if job.device == "cpu" and device_memory is None and job.memory_cap is not None:
        factor, slack = _MARGIN
        device_memory = max(0, int((job.memory_cap - idle_bytes - slack) / factor))
    if job.device == "cpu" and job.weights == "host" and device_memory is not None:
        # Device and host are one memory here: what the layers take of it is not there twice.
        units = read_manifest(Path(job.model_dir)).units
        host_memory = sum(unit.num_bytes for unit in units if unit.name.startswith("layer."))
        device_memory -= host_memory
    if job.device == "cpu" and job.weights == "planned" and device_memory is not None:
        host_memory = 0  # likewise
    return PlanOptions(
        device=job.device,
        dtype=DType(job.dtype),
        weights=_SHARES[job.weights],
        device_memory=device_memory,
        host_memory=host_memory,
        micro_batch=job.micro_batch,
        micro_batches=job.micro_batches,
        schedule=job.schedule,
        kv_format=job.kv_format,
    )


def _workload(items: Iterable[Item]) -> Workload:
    return Workload.of((len(item.prompt), len(item.continuation)) for item in items)


def _check(result: object) -> None:
    if isinstance(result, Rejection):
        raise RuntimeError(f"a request was rejected: {result.message}")
