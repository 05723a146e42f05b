"""A comparison as JSON and as text."""

from collections.abc import Iterator

from benchmarks.bound import COMPUTE, UNPACKING
from benchmarks.compare import PLAIN, Comparison
from engine.units import format_bytes


def to_json(comparison: Comparison, machine: dict[str, object]) -> dict[str, object]:
    """The document of ``--json``."""
    ours = comparison.ours
    return {
        "machine": machine,
        "limits": {"alone": dict(comparison.limits.alone), "busy": dict(comparison.limits.busy)},
        "ours": {
            "tok_s": ours.tok_s,
            "peak_bytes": ours.peak_bytes,
            "peak_over_budget": ours.peak_bytes / ours.budget_bytes if ours.budget_bytes else None,
            "bound_fraction": ours.bound_fraction,
            "peak_fraction": ours.peak_fraction,
            "bound_by": ours.bound_by,
        },
        "peers": {
            name: {"tok_s": peer.tok_s, "batch": peer.batch, "error": peer.error}
            for name, peer in comparison.peers.items()
        },
        "ratio": comparison.ratio,
        "tokens_agree": comparison.tokens_agree,
        "cap_missing": comparison.cap_missing,
    }


def to_text(comparison: Comparison, machine: dict[str, object], task: str) -> str:
    """For people."""
    return "\n".join(_lines(comparison, machine, task))


def _lines(comparison: Comparison, machine: dict[str, object], task: str) -> Iterator[str]:
    ours = comparison.ours
    yield "machine"
    for name, value in machine.items():
        shown = format_bytes(value) if name == "memory_bytes" and isinstance(value, int) else value
        yield f"  {name:16} {shown}"
    yield "limits                alone         with all lanes of this run busy"
    for lane, rate in comparison.limits.alone.items():
        yield f"  {lane:16} {_rate(lane, rate):>14} {_rate(lane, comparison.limits.busy[lane]):>14}"
    unit = "token/s" if task == "generate" else "scored token/s"
    yield f"ours                  {ours.tok_s:.2f} {unit}{_spread(ours.tok_s_each)}, {ours.num_passes} passes"
    yield f"  of the bound        {ours.bound_fraction:.2f}, bound by {ours.bound_by}"
    yield f"  of the matrix peak  {ours.peak_fraction:.2f}"
    yield f"  peak memory         {format_bytes(ours.peak_bytes)} above idle; budgets {format_bytes(ours.budget_bytes)}"
    for name, peer in comparison.peers.items():
        if peer.tok_s is None:
            yield f"{name:21} {peer.error}"
        else:
            ratio = comparison.ratio[name]
            how = f", {peer.num_requests} requests in batches of {peer.batch}, its best" if name != PLAIN else ""
            yield f"{name:21} {peer.tok_s:.2f} {unit}{_spread(peer.tok_s_each)}{how}; ours is {ratio:.2f} times as fast"
        yield from (f"  {failure}" for failure in peer.failed if peer.error is None)
    if comparison.tokens_agree is not None:
        yield f"same greedy tokens    {'yes' if comparison.tokens_agree else 'NO'} (float32, small shape)"
        yield from (f"  {each}" for each in comparison.disagreements)
    if comparison.cap_missing:
        yield f"memory cap            NOT enforced: {comparison.cap_missing}"


def _rate(lane: str, rate: float) -> str:
    if lane == UNPACKING:
        return f"{rate / 1e9:.2f} G weights/s"
    return f"{rate / 1e12:.3f} TFLOP/s" if lane == COMPUTE else f"{rate / 1e9:.2f} GB/s"


def _spread(each: tuple[float, ...]) -> str:
    return f" ({min(each):.2f}–{max(each):.2f}, median of {len(each)})" if len(each) > 1 else ""
