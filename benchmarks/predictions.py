"""``python -m benchmarks.predictions``: is the planner right about this machine? Predicted against measured.

Each configuration is planned, predicted from the machine's profile, and run on random weights, all in one process. It
is run twice, and the second time counts, as for a worker that goes on to its next job.

``--slow-gpu``: the same of a device with memory of its own (``benchmarks.slow_gpu``), keys and values in host memory,
each configuration once with them fetched and once with the host attending. ``--four-bits``: there, with weights or keys
and values in four bits, which take that device long to unpack.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from benchmarks.inprocess import generated, measured_here
from benchmarks.workload import Range
from benchmarks.workload import Workload as Texts
from engine.attention.sizes import kv_bytes_per_token
from engine.errors import EngineError
from engine.formats.int4_sizes import Int4
from engine.formats.sizes import Plain
from engine.kvcache.cache import unit_tokens
from engine.planner.hardware import Hardware
from engine.planner.plan import Plan, PlanOptions
from engine.planner.profiles import load_hardware
from engine.planner.workload import Workload
from engine.process import tune
from engine.shape import ModelShape
from engine.tiers import Shares, TierName
from engine.units import GIB, format_bytes

if TYPE_CHECKING:
    from engine.memory.device import Device

MEDIAN_LINE, WORST_LINE, MEMORY_LINE = 0.10, 0.25, 0.15


@dataclass(frozen=True, slots=True)
class Configuration:
    """One plan and workload."""

    shape: str
    requests: int
    prompt: tuple[int, int]
    out: tuple[int, int]
    weights: str
    kv: str = "100/0/0"
    memory: int = 3 * GIB
    options: dict[str, Any] = field(default_factory=dict)
    weight_format: str = Plain.name

    def __str__(self) -> str:
        spread = "{}-{}".format(*self.prompt) if self.prompt[0] < self.prompt[1] else str(self.prompt[0])
        attends = ", host attends" if self.options.get("host_attention") == "on" else ""
        weights = self.weights + ("" if self.weight_format == Plain.name else f" {self.weight_format}")
        kv = f"{self.kv} {self.options['kv_format']}" if "kv_format" in self.options else self.kv
        return f"{self.shape} {self.requests}x{spread} w {weights} kv {kv}{attends}"


CONFIGURATIONS = (
    Configuration("opt-125m", 256, (64, 64), (16, 16), "100/0/0"),
    Configuration("opt-125m", 64, (512, 512), (32, 32), "100/0/0"),
    Configuration("opt-125m", 128, (256, 256), (16, 16), "0/0/100", memory=GIB),
    Configuration("opt-125m", 64, (256, 256), (16, 16), "50/0/50", kv="0/100/0", memory=GIB),
    Configuration("opt-125m", 32, (256, 256), (8, 8), "100/0/0", kv="0/0/100", memory=GIB),
    Configuration("opt-125m", 128, (32, 800), (4, 64), "100/0/0"),
    Configuration("opt-125m", 128, (512, 512), (16, 16), "0/0/100", memory=GIB // 2),
    Configuration("opt-1.3b", 16, (512, 512), (16, 16), "100/0/0", memory=8 * GIB),
    Configuration("opt-1.3b", 32, (64, 64), (16, 16), "0/0/100", memory=2 * GIB),
    Configuration("opt-1.3b", 24, (512, 512), (8, 8), "50/0/50", memory=3 * GIB),
    Configuration("opt-1.3b", 32, (512, 512), (8, 8), "0/0/100", memory=2 * GIB),
    Configuration("opt-1.3b", 32, (64, 512), (4, 24), "0/0/100", kv="0/100/0", memory=3 * GIB),
)
_BESIDE = (
    Configuration("opt-125m", 24, (256, 256), (16, 16), "100/0/0", kv="0/100/0"),
    Configuration("opt-125m", 24, (64, 512), (4, 24), "100/0/0", kv="0/100/0"),
    Configuration("opt-125m", 24, (256, 256), (16, 16), "100/0/0", kv="50/50/0"),
    Configuration("opt-125m", 32, (128, 128), (16, 16), "0/100/0", kv="0/100/0"),
    Configuration("opt-125m", 32, (128, 128), (24, 24), "50/50/0", kv="20/80/0"),
    Configuration("opt-125m", 16, (512, 512), (12, 12), "0/0/100", kv="0/100/0"),
)
ON_SLOW_GPU = tuple(
    replace(each, options={"host_attention": how, "micro_batches": 2}) for each in _BESIDE for how in ("off", "on")
)
_PACKED: dict[str, Any] = {"weight_format": Int4.name}
_PACKED_KV: dict[str, Any] = {"options": {"kv_format": Int4.name}}
IN_FOUR_BITS = (
    Configuration("opt-125m", 32, (128, 128), (16, 16), "0/100/0", **_PACKED),
    Configuration("opt-125m", 32, (128, 128), (16, 16), "50/50/0", **_PACKED, options={"stay_packed": True}),
    Configuration("opt-125m", 16, (512, 512), (12, 12), "0/0/100", kv="0/100/0", **_PACKED),
    Configuration("opt-125m", 24, (256, 256), (16, 16), "100/0/0", **_PACKED_KV),
    Configuration("opt-125m", 24, (256, 256), (16, 16), "100/0/0", kv="0/100/0", **_PACKED_KV),
    Configuration("opt-125m", 24, (64, 512), (4, 24), "0/100/0", kv="0/100/0", **_PACKED, **_PACKED_KV),
)
SLOW_GPU = {"flops": 100e9, "memory_speed": 0.6e9, "link_speed": 0.5e9}
"""Operations and bytes a second: so slow that what the processor takes over them does not count (attention to many
sequences takes it up to 0.4 ms a sequence and layer while lanes copy), and links on which keys and values take about as
long as compute."""
HOST_LINE = 0.15
"""Error with the host attending, at worst."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Predicted and measured: generated tokens per second, and the most bytes of each tier."""

    name: str
    predicted: float
    measured: float
    predicted_bytes: dict[str, int]
    measured_bytes: dict[str, int]
    host_attends: bool

    @property
    def error(self) -> float:
        """How far the prediction is above what was measured, in proportion to that."""
        return self.predicted / self.measured - 1

    @property
    def memory_error(self) -> float:
        """The worst tier's; below 0: more was taken than predicted."""
        errors = [self.predicted_bytes[tier] / taken - 1 for tier, taken in self.measured_bytes.items() if taken]
        return max(errors, key=lambda each: (each < 0, abs(each)), default=0.0)


def main(arguments: list[str] | None = None) -> int:
    """Run, print, and return 0 if all lines hold."""
    tune()
    from benchmarks.checkpoints import default_cache  # torch comes after that, or its threads spin as ever

    parser = argparse.ArgumentParser(prog="python -m benchmarks.predictions", description=__doc__)
    parser.add_argument("--profile", type=Path, metavar="FILE", help="default: the machine is measured now")
    parser.add_argument("--slow-gpu", action="store_true", help="a device with memory of its own, slow on purpose")
    parser.add_argument("--four-bits", action="store_true", help="that device, over weights or a cache in four bits")
    parser.add_argument("--only", metavar="TEXT", help="configurations whose name contains this")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cache-dir", type=Path, default=default_cache())
    asked = parser.parse_args(arguments)
    known = IN_FOUR_BITS if asked.four_bits else ON_SLOW_GPU if asked.slow_gpu else CONFIGURATIONS
    slow_gpu = asked.slow_gpu or asked.four_bits
    chosen = [each for each in known if asked.only is None or asked.only in str(each)]
    try:
        hardware = (
            load_hardware(asked.profile)
            if asked.profile
            else measured_here(asked.cache_dir, _say, _device(slow_gpu=slow_gpu))
        )
        outcomes = []
        for configuration in chosen:
            outcomes.append(_run(configuration, hardware, asked.cache_dir, _device(slow_gpu=slow_gpu)))
            _say(_line(outcomes[-1]))
    except (EngineError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    errors = [abs(each.error) for each in outcomes]
    memory = [each.memory_error for each in outcomes]
    attending = [abs(each.error) for each in outcomes if each.host_attends]
    holds = (
        median(errors) <= MEDIAN_LINE and max(errors) <= WORST_LINE and min(memory) >= 0 and max(memory) <= MEMORY_LINE
    ) and max(attending, default=0.0) <= HOST_LINE
    if asked.json:
        rows = [{**asdict(each), "error": each.error, "memory_error": each.memory_error} for each in outcomes]
        found = {
            "median": median(errors),
            "worst": max(errors),
            "least_memory": min(memory),
            "most_memory": max(memory),
            "worst_with_host": max(attending, default=0.0),
        }
        print(json.dumps({"outcomes": rows, **found}, indent=1))
    else:
        for each in outcomes:
            print(_line(each))
        print(f"token/s: median error {median(errors):.1%} (line 10%), worst {max(errors):.1%} (line 25%)")
        print(f"memory: predicted {min(memory):+.1%} to {max(memory):+.1%} of measured (line 0 to +15%)")
    return 0 if holds else 1


def _device(*, slow_gpu: bool) -> "Device | None":
    """A new one for each use, since an engine closes its own; ``None``: the processor, which an engine opens itself."""
    if not slow_gpu:
        return None
    from benchmarks.slow_gpu import SlowGpu

    return SlowGpu(**SLOW_GPU)


def _run(configuration: Configuration, hardware: Hardware, cache: Path, device: "Device | None") -> Outcome:
    from benchmarks.checkpoints import make_checkpoint
    from engine.loading import load_engine
    from engine.model.registry import sizes_for
    from engine.planner.predict import predict
    from engine.weights.layout import stored_in
    from engine.weights.manifest import read_manifest

    checkpoint = make_checkpoint(configuration.shape, "bfloat16", cache, _say, configuration.weight_format)
    manifest = read_manifest(checkpoint.model_dir)
    stored, shape = stored_in(manifest), sizes_for(manifest.config).shape
    texts = Texts(
        task="generate", prompt=Range(*configuration.prompt), out=Range(*configuration.out), vocabulary=50272, seed=1
    )
    items = texts.items(configuration.requests)
    kv = Shares.parse(configuration.kv)
    with tempfile.TemporaryDirectory(dir=cache) as spill:
        options = PlanOptions(
            device=device.name if device else "cpu", weights=Shares.parse(configuration.weights), kv=kv,
            device_memory=configuration.memory,
            host_memory=configuration.memory if kv.host else None, disk_dir=Path(spill), **configuration.options,
        )  # fmt: skip
        with load_engine(checkpoint.model_dir, options, device=device) as engine:
            workload = Workload.of((len(item.prompt), len(item.continuation)) for item in items)
            prediction = predict(hardware, shape, stored, engine.plan, workload)
            taken = bytes_taken(engine.plan, shape, workload)
            generated(engine, items)  # a worker's first job touches memory and compiles kernels
            start = perf_counter()
            tokens = generated(engine, items)
            seconds = perf_counter() - start
            return Outcome(
                name=str(configuration),
                predicted=prediction.generated_per_s,
                measured=tokens / seconds,
                predicted_bytes={str(tier): taken[tier] for tier in TierName},
                measured_bytes={str(tier): engine.tiers[tier].peak for tier in TierName},
                host_attends=engine.plan.host_attention,
            )


def bytes_taken(plan: Plan, shape: ModelShape, workload: Workload) -> dict[TierName, int]:
    """Bytes of each tier that a run will hold at its peak: the cache's share of memory is taken at once, that of the
    disk as sequences come."""
    taken = plan.used_bytes
    token_bytes = kv_bytes_per_token(shape, plan.kv_format)
    unit = unit_tokens(plan.kv_layouts[TierName.DISK], plan.extent_tokens)
    needed = workload.reserved_tokens(unit) * token_bytes
    taken[TierName.DISK] -= max(0, plan.kv_bytes[TierName.DISK] - needed)
    return taken


def _line(outcome: Outcome) -> str:
    taken = ", ".join(
        f"{tier} {format_bytes(outcome.predicted_bytes[tier])} / {format_bytes(num_bytes)}"
        for tier, num_bytes in outcome.measured_bytes.items()
        if num_bytes
    )
    return (
        f"{outcome.name:44} predicted {outcome.predicted:8.1f}  measured {outcome.measured:8.1f}  "
        f"{outcome.error:+6.1%}   {taken}"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
