"""FlexGen's published table on its own machine (T4), beside what is predicted of its schedule and of ours.

``python -m benchmarks.flexgen_table [--json]``. Published: Sheng et al. 2023, table 2 (32 new tokens each), with
the policies of its ``bench_suite.py``. Each is put through FlexGen's schedule of two phases (``benchmarks.flexgen``),
and the workload through our planner. Both predictions use the preset ``t4-gcp``, and nothing is measured here.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.flexgen import BlockPolicy, block_cost
from engine.planner.decide import input_for_machine
from engine.planner.known_models import KnownModel, known_model
from engine.planner.plan import PlanOptions
from engine.planner.profiles import load_hardware
from engine.planner.search import search
from engine.planner.workload import Lengths, Workload
from engine.tiers import Shares

MACHINE = "t4-gcp"
GENERATED = 32
REQUESTS = {"opt-6.7b": 2000, "opt-30b": 2000, "opt-175b": 5000}
"""How many requests our prediction is for: enough that filling and draining matter little.
FlexGen's figures are of one block each."""
DEVICE, HOST = Shares(100, 0, 0), Shares(0, 100, 0)


@dataclass(frozen=True, slots=True)
class Row:
    """One published figure."""

    model: str
    prompt_len: int
    policy: BlockPolicy
    published: float
    """Tokens generated per second: FlexGen's, and what it measured of two others."""
    published_accelerate: float
    published_deepspeed: float | None


def _resident(batch: int) -> BlockPolicy:
    return BlockPolicy(batch=batch, num_batches=1, weights=DEVICE, kv=DEVICE, activations=DEVICE)


def _offloaded(batch: int, num_batches: int, weights: Shares, kv: Shares) -> BlockPolicy:
    return BlockPolicy(
        batch=batch, num_batches=num_batches, weights=weights, kv=kv, activations=HOST, host_attention=True
    )


ROWS = (
    Row("opt-6.7b", 256, _resident(4), 53.29, 50.66, 14.52),
    Row("opt-6.7b", 512, _resident(2), 25.26, 25.12, 9.28),
    Row("opt-6.7b", 1024, _resident(1), 13.72, 13.01, 4.59),
    Row("opt-30b", 256, _offloaded(160, 2, Shares(10, 90, 0), HOST), 16.01, 1.34, 1.30),
    Row("opt-30b", 512, _offloaded(48, 3, Shares(20, 80, 0), HOST), 7.32, 0.62, 0.60),
    Row("opt-30b", 1024, _offloaded(20, 4, Shares(4, 96, 0), HOST), 3.50, 0.31, 0.29),
    Row("opt-175b", 256, _offloaded(64, 8, Shares(0, 50, 50), Shares(0, 0, 100)), 1.36, 0.02, 0.01),
    Row("opt-175b", 512, _offloaded(32, 8, Shares(0, 50, 50), Shares(0, 0, 100)), 0.69, 0.01, 0.01),
    Row("opt-175b", 1024, _offloaded(12, 12, Shares(0, 50, 50), Shares(0, 0, 100)), 0.35, 0.01, None),
)


def predicted(row: Row) -> dict[str, Any]:
    """A row of the table."""
    hardware, model = load_hardware(MACHINE), _model(row.model)
    theirs = block_cost(
        hardware, model.shape, model.stored(), row.policy, Lengths(row.prompt_len, GENERATED, 1)
    ).generated_per_s
    workload = Workload.uniform(row.prompt_len, GENERATED, REQUESTS[row.model])
    given = input_for_machine(
        hardware, shape=model.shape, stored=model.stored(), options=PlanOptions(), workload=workload
    )
    ours = search(given, hardware)
    return {
        "model": row.model,
        "prompt_len": row.prompt_len,
        "policy": _policy_text(row.policy),
        "compressed": False,
        "stages": 1,
        "published": row.published,
        "published_deepspeed": row.published_deepspeed,
        "published_accelerate": row.published_accelerate,
        "predicted_theirs": theirs,
        "predicted_ours": ours.prediction.generated_per_s,
        "lanes": _rounded(ours.prediction.steady_pass.lane_seconds),
        "bound_by": str(ours.prediction.bound_by),
        "host_attention": ours.plan.host_attention,
    }


def _model(name: str) -> KnownModel:
    found = known_model(f"facebook/{name}")
    assert found is not None
    return found


def _rounded(lane_seconds: Mapping[Any, float]) -> dict[str, float]:
    return {str(lane): round(seconds, 4) for lane, seconds in lane_seconds.items() if seconds}


def _policy_text(policy: BlockPolicy) -> str:
    """``48 x 3, weights 20/80/0, KV 0/100/0, activations 0/100/0, CPU attention``."""
    attends = ", CPU attention" if policy.host_attention else ""
    placed = f"weights {policy.weights}, KV {policy.kv}, activations {policy.activations}"
    return f"{policy.batch} x {policy.num_batches}, {placed}{attends}"


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flexgen_table", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one document on standard output")
    chosen = parser.parse_args(arguments)
    rows = [predicted(row) for row in ROWS]
    if chosen.json:
        named = {f"{row['model']} {row['prompt_len']}".replace(".", "_"): row for row in rows}
        off = {name: abs(row["predicted_theirs"] / row["published"] - 1) for name, row in named.items()}
        theirs, ours = (
            {name: row[f"predicted_{whose}"] for name, row in named.items()} for whose in ("theirs", "ours")
        )
        print(json.dumps({"rows": rows, "off_published": off, "theirs": theirs, "ours": ours}))
        return 0
    print(f"{'MODEL':<9} {'PROMPT':>6} {'PUBLISHED':>9} {'SO PREDICTED':>12} {'OURS':>7} {'TIMES':>5}  BOUND BY")
    for row in rows:
        print(
            f"{row['model']:<9} {row['prompt_len']:>6} {row['published']:>9.2f} {row['predicted_theirs']:>12.2f} "
            f"{row['predicted_ours']:>7.2f} {row['predicted_ours'] / row['published']:>5.1f}  {row['bound_by']}"
            f"{', the host attends' if row['host_attention'] else ''}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
