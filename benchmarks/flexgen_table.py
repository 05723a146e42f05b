"""FlexGen's published table on its own machine (T4), beside what is predicted of its schedule and of ours.

``python -m benchmarks.flexgen_table [--json]``. Published: Sheng et al., ICML 2023, table 2 (32 new tokens each), with
the policies of its ``bench_suite.py``. Each is put through FlexGen's schedule of two phases (``benchmarks.flexgen``),
and the workload through our planner. Both predictions use the preset ``t4-gcp``, and nothing is measured here.

A second table is of four bits: that table's row "FlexGen (c)" beside our plans with plain weights and keys, either in
four bits, and both. FlexGen's are not predicted there, since nobody fitted what its unpacking takes.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from benchmarks.flexgen import BlockPolicy, block_cost
from engine.dtypes import DType
from engine.formats.int4_sizes import Int4
from engine.formats.sizes import Plain
from engine.planner.advice import LEAST_GAIN
from engine.planner.decide import input_for_machine
from engine.planner.hardware import PACKED_BYTES, UNPACKED_BYTES
from engine.planner.known_models import KnownModel, known_model
from engine.planner.plan import PlanOptions
from engine.planner.profiles import load_hardware
from engine.planner.search import Found, search
from engine.planner.workload import Lengths, Workload
from engine.tiers import Shares
from engine.weights.layout import in_format

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


@dataclass(frozen=True, slots=True)
class CompressedRow:
    """One published figure with four bits."""

    model: str
    prompt_len: int
    policy: BlockPolicy
    compresses: str
    """What FlexGen had in four bits."""
    published: float


def _on_host(batch: int, num_batches: int) -> BlockPolicy:
    return BlockPolicy(batch=batch, num_batches=num_batches, weights=HOST, kv=HOST, activations=HOST)


COMPRESSED_ROWS = (
    CompressedRow("opt-30b", 512, _on_host(64, 8), "KV", 8.70),
    CompressedRow("opt-175b", 512, _on_host(48, 3), "weights and KV", 1.12),
)
PLAIN, BOTH = "plain", "both"
FORMATS = {
    PLAIN: (Plain.name, Plain.name),
    "int4 weights": (Int4.name, Plain.name),
    "int4 KV": (Plain.name, Int4.name),
    BOTH: (Int4.name, Int4.name),
}
"""How weights and the KV cache are stored."""


def predicted(row: Row) -> dict[str, Any]:
    """A row of the table."""
    hardware, model = load_hardware(MACHINE), _model(row.model)
    theirs = block_cost(
        hardware, model.shape, model.stored(), row.policy, Lengths(row.prompt_len, GENERATED, 1)
    ).generated_per_s
    ours = _found(row.model, row.prompt_len, PLAIN)
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
        **_details(ours),
    }


def in_four_bits(row: CompressedRow) -> dict[str, Any]:
    """A row of the table of four bits."""
    found = {name: _found(row.model, row.prompt_len, name) for name in FORMATS}
    rates = {name: each.prediction.generated_per_s for name, each in found.items()}
    return {
        "model": row.model,
        "prompt_len": row.prompt_len,
        "policy": _policy_text(row.policy),
        "in_four_bits": row.compresses,
        "published": row.published,
        "predicted_ours": rates,
        "details": {name: _details(each) for name, each in found.items()},
        "best": max(rates, key=rates.__getitem__),
        "gain": max(rate for name, rate in rates.items() if name != PLAIN) / rates[PLAIN] - 1,
    }


@cache
def _found(name: str, prompt_len: int, formats: str) -> Found:
    """Our plan for one of the published workloads, in some of ``FORMATS``."""
    hardware, model = load_hardware(MACHINE), _model(name)
    weights, kv = FORMATS[formats]
    given = input_for_machine(
        hardware,
        shape=model.shape,
        stored=in_format(model.stored(), Int4() if weights == Int4.name else None),
        options=PlanOptions(kv_format=kv),
        workload=Workload.uniform(prompt_len, GENERATED, REQUESTS[name]),
    )
    return search(given, hardware)


def _details(found: Found) -> dict[str, Any]:
    """What bounds a plan; ``lanes``: their busy seconds in a steady pass, which takes ``pass_s``."""
    steady = found.prediction.steady_pass
    return {
        "pass_s": steady.seconds,
        "lanes": _rounded(steady.lane_seconds),
        "bound_by": str(found.prediction.bound_by),
        "host_attention": found.plan.host_attention,
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
    rows, four_bits = [predicted(row) for row in ROWS], [in_four_bits(row) for row in COMPRESSED_ROWS]
    if chosen.json:
        print(json.dumps(document(rows, four_bits)))
        return 0
    print(f"{'MODEL':<9} {'PROMPT':>6} {'PUBLISHED':>9} {'SO PREDICTED':>12} {'OURS':>7} {'TIMES':>5}  BOUND BY")
    for row in rows:
        print(
            f"{row['model']:<9} {row['prompt_len']:>6} {row['published']:>9.2f} {row['predicted_theirs']:>12.2f} "
            f"{row['predicted_ours']:>7.2f} {row['predicted_ours'] / row['published']:>5.1f}  {_bound_by(row)}"
        )
    print()
    print_four_bits(four_bits)
    return 0


def document(rows: list[dict[str, Any]], four_bits: list[dict[str, Any]]) -> dict[str, Any]:
    """Both tables, and by row what claims are made of."""
    named, packed = ({_row_name(row): row for row in each} for each in (rows, four_bits))
    off = {name: abs(row["predicted_theirs"] / row["published"] - 1) for name, row in named.items()}
    theirs, ours = ({name: row[f"predicted_{whose}"] for name, row in named.items()} for whose in ("theirs", "ours"))
    return {
        "rows": rows,
        "off_published": off,
        "theirs": theirs,
        "ours": ours,
        "four_bits": four_bits,
        "bytes_a_value": {"unpacking": UNPACKED_BYTES, "packing": PACKED_BYTES},
        "both_in_four_bits": {name: row["predicted_ours"][BOTH] for name, row in packed.items()},
        "gain_of_four_bits": {name: row["gain"] for name, row in packed.items()},
    }


def _row_name(row: Mapping[str, Any]) -> str:
    """Without a full stop: those part the keys of a claim's figure."""
    return f"{row['model']} {row['prompt_len']}".replace(".", "_")


def _bound_by(details: Mapping[str, Any]) -> str:
    return f"{details['bound_by']}{', the host attends' if details['host_attention'] else ''}"


def print_four_bits(rows: list[dict[str, Any]]) -> None:
    """For people."""
    unpacked = load_hardware(MACHINE).unpack_rate(DType.FLOAT16)
    print(
        f"Four bits: unpacking is priced at {UNPACKED_BYTES} bytes moved for each value, {unpacked:.3g} values/s, "
        f"packing at {PACKED_BYTES}"
    )
    for row in rows:
        rates = row["predicted_ours"]
        print(
            f"\n{row['model']}, prompts of {row['prompt_len']}: FlexGen (c) {row['published']:.2f}, with "
            f"{row['in_four_bits']} in four bits, {row['policy']}"
        )
        print(f"{'OURS':<12} {'TOKENS/S':>8} {'TIMES':>5}  BOUND BY; BUSY SECONDS OF A STEADY PASS")
        for name, rate in rates.items():
            details = row["details"][name]
            lanes = ", ".join(f"{lane} {seconds:.2f}" for lane, seconds in details["lanes"].items())
            times = rate / row["published"]
            print(f"{name:<12} {rate:>8.2f} {times:>5.1f}  {_bound_by(details)}; {lanes} of {details['pass_s']:.2f}")
        gains = f"gain {100 * row['gain']:.0f}%" if row["gain"] >= LEAST_GAIN else "gain nothing"
        attends = " with host attention" if row["details"][row["best"]]["host_attention"] else ""
        print(f"best: {row['best']}{attends}; four bits {gains} over plain")


if __name__ == "__main__":
    sys.exit(main())
