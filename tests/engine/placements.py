"""Where weights, KV cache and activations may lie: every kind of placement, for tests and for benchmarks alike."""

from pathlib import Path

from engine.planner.plan import PlanOptions
from engine.tiers import Shares
from engine.units import MIB

BUDGETS = {"device_memory": 64 * MIB, "host_memory": 64 * MIB, "disk_space": 64 * MIB}

PLACEMENTS: dict[str, dict[str, str]] = {
    "all-device": {"weights": "100/0/0", "kv": "100/0/0"},
    "all-host": {"weights": "0/100/0", "kv": "0/100/0", "activations": "host"},
    "all-disk": {"weights": "0/0/100", "kv": "0/0/100", "activations": "disk"},
    "weights-on-disk": {"weights": "0/0/100", "kv": "100/0/0"},
    "kv-on-host": {"weights": "100/0/0", "kv": "0/100/0"},
    "kv-on-disk": {"weights": "100/0/0", "kv": "0/0/100"},
    "activations-on-host": {"weights": "100/0/0", "kv": "100/0/0", "activations": "host"},
    "activations-on-disk": {"weights": "100/0/0", "kv": "100/0/0", "activations": "disk"},
    "split": {"weights": "20/30/50", "kv": "20/30/50"},
    "split-activations-on-disk": {"weights": "50/30/20", "kv": "50/20/30", "activations": "disk"},
}


BESIDE_A_DEVICE: dict[str, dict[str, str]] = {
    "attended-on-host": {"weights": "100/0/0", "kv": "0/100/0", "host_attention": "on"},
    "all-host-and-attended-there": {"weights": "0/100/0", "kv": "0/100/0", "host_attention": "on"},
    "split-and-attended-on-host": {"weights": "20/30/50", "kv": "20/30/50", "host_attention": "on"},
}
"""Those that only a device with memory of its own has."""


def options_of(name: str, **more: object) -> PlanOptions:
    """The options of a placement, within ``BUDGETS`` unless ``more`` says otherwise."""
    placement = {**PLACEMENTS, **BESIDE_A_DEVICE}[name]
    shares = {which: Shares.parse(placement[which]) for which in ("weights", "kv")}
    return PlanOptions(**{**BUDGETS, **placement, **shares, **more})  # type: ignore[arg-type]


def spills(name: str) -> bool:
    """Whether a spill file is needed: weights on disk lie in the model directory."""
    placement = {**PLACEMENTS, **BESIDE_A_DEVICE}[name]
    return placement.get("activations") == "disk" or not placement["kv"].endswith("/0")


def scattered(disk_dir: Path) -> dict[str, object]:
    """Options that make several micro-batches and extents of small work."""
    return {"disk_dir": disk_dir, "micro_batch": 48, "micro_batches": 4, "extent_tokens": 32}
