"""When nothing fits: the nearest plan that would. Pure; no torch."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from engine.errors import PlanDoesNotFit
from engine.model.family import ModelShape
from engine.planner.default import StoredWeights, kv_bytes_per_token, resolve_plan
from engine.planner.machine import MachineFacts
from engine.planner.plan import Plan, PlanOptions, Shares
from engine.units import MIB, align_up, format_bytes

SMALLEST_MICRO_BATCH = 256
_MOST = 1 << 50
_STEP = 64 * MIB
"""Budgets are told in steps of this."""


def nearest_fit(
    options: PlanOptions,
    *,
    shape: ModelShape,
    stored: StoredWeights,
    facts: MachineFacts,
    tokens: int,
    device: str,
) -> str | None:
    """Flags of a plan near ``options`` that fits, with room for a sequence of ``tokens``; ``None``: there is none.

    First within the same memory, if another placement or batch would do; else the least device memory.
    """

    def fits(asked: PlanOptions) -> bool:
        try:
            plan = resolve_plan(
                asked, shape=shape, stored=stored, device=device, facts=facts, disk_dir=options.disk_dir or Path()
            )
        except PlanDoesNotFit:
            return False
        return _longest_sequence(plan, shape) >= tokens

    freed = replace(options, weights=None, kv=None, micro_batch=None, micro_batches=None, activations=None)
    if freed != options and fits(freed):
        return _said(options, "without " + ", ".join(_fixed(options)))
    least = replace(freed, weights=Shares(0, 0, 100), micro_batch=SMALLEST_MICRO_BATCH, micro_batches=1)
    if fits(least):
        return _said(options, _flags(least))
    needed = _least(lambda num_bytes: fits(replace(least, device_memory=num_bytes)))
    if needed is None:
        return None
    return _said(options, f"--device-memory {format_flag(needed)} with {_flags(least)}")


def format_flag(num_bytes: int) -> str:
    """Bytes as a flag takes them, rounded up."""
    mib = align_up(num_bytes, MIB) // MIB
    return f"{mib}MiB" if mib < 1024 else f"{-(-mib * 10 // 1024) / 10:g}GiB"


def _longest_sequence(plan: Plan, shape: ModelShape) -> int:
    return max(plan.kv_bytes.values()) // kv_bytes_per_token(shape, plan.dtype)


def _fixed(options: PlanOptions) -> list[str]:
    names = ("weights", "kv", "activations", "micro_batch", "micro_batches")
    return [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]


def _flags(options: PlanOptions) -> str:
    return f"--weights {options.weights} --micro-batch {options.micro_batch} --micro-batches {options.micro_batches}"


def _said(options: PlanOptions, flags: str) -> str:
    memory = options.device_memory
    within = f" within {format_bytes(memory)}" if memory is not None and "--device-memory" not in flags else ""
    return f"the nearest plan that fits{within}: {flags}"


def _least(fits: Callable[[int], bool]) -> int | None:
    """The least device budget that fits, to a step; more never fits less."""
    if not fits(_MOST):
        return None
    high = _STEP
    while not fits(high):
        high *= 2
    low = high // 2
    while high - low > _STEP:
        middle = (low + high) // 2 // _STEP * _STEP
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
