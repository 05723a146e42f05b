"""What lies where under a job's plan, in one line."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

_PLACES = {"device": "on the device", "host": "in host memory", "disk": "on disk"}


def model_name(reference: str) -> str:
    """A model as people call it: its name, or the last part of its path."""
    return PurePath(reference).name or reference


def plan_in_words(plan: Mapping[str, Any]) -> str:
    """Layers and KV cache by place, the dtype, and the tokens of a pass; ``plan`` as the database has it."""
    from engine.units import format_bytes

    layers, cache = (_by_place(plan, plan[name]) for name in ("layers", "kv_bytes"))
    total = sum(layers.values())
    parts = [f"{number:,} {place}" for place, number in layers.items()]
    where = f"all {total:,} layers {next(iter(layers))}" if len(layers) == 1 else _first_of(parts, total)
    kv = ", ".join(f"up to {format_bytes(num_bytes)} {place}" for place, num_bytes in cache.items()) or "none"
    tokens = f"{plan['micro_batches']:,} x {plan['micro_batch']:,} tokens a pass"
    packed = [f"{what} in {form}" for what, form in _packed(plan)]
    return "; ".join([where, f"KV cache {kv}", plan["dtype"], *packed, tokens])


def _packed(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is stored in another format than plainly."""
    named = (("weights", plan.get("weight_format")), ("KV cache", plan.get("kv_format")))
    return [(what, form) for what, form in named if form not in (None, "plain")]


def _by_place(plan: Mapping[str, Any], numbers: Mapping[str, int]) -> dict[str, int]:
    """Without the places that hold nothing. On a CPU, device and host are one memory."""
    on_cpu = str(plan["device"]).startswith("cpu")
    found: dict[str, int] = {}
    for tier, number in numbers.items():
        place = "in memory" if on_cpu and tier != "disk" else _PLACES[tier]
        if number:
            found[place] = found.get(place, 0) + number
    return found


def _first_of(parts: list[str], total: int) -> str:
    number, _, place = parts[0].partition(" ")
    return ", ".join([f"{number} of {total:,} layers {place}", *parts[1:]])
