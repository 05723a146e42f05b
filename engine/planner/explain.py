"""What there is to say about a plan: as one JSON document. Pure; no torch."""

from dataclasses import asdict

from engine.memory.lane import LaneName
from engine.planner.advice import Advised
from engine.planner.hardware import Hardware
from engine.planner.plan import FLAGS, PlanOptions, flag_name
from engine.planner.plan_input import PlanInput
from engine.planner.predict import compute_ceiling_per_s
from engine.planner.search import Found


def flags_of(options: PlanOptions) -> str:
    """The placement as a person would write it, to fix it by hand."""
    given = ((flag_name(name), getattr(options, name)) for name, flag in FLAGS.items() if flag.by_hand)
    return " ".join(f"{name} {value}" for name, value in given if value is not None)


def product_ceiling_per_s(given: PlanInput, hardware: Hardware) -> float:
    """Generated tokens per second that no plan on this machine exceeds: nothing takes time but products."""
    assert given.workload is not None
    return compute_ceiling_per_s(hardware, given.shape, given.stored, given.workload, given.dtype)


def rows_per_s(given: PlanInput, found: Found) -> float:
    """Rows of a dataset per second: a row may be several sequences."""
    assert given.workload is not None
    return given.workload.rows / found.prediction.seconds


def document(given: PlanInput, hardware: Hardware, found: Found, advised: Advised) -> dict[str, object]:
    """Plan, prediction, memory and advice in plain JSON values; bytes, seconds, tokens and rows per second."""
    assert given.workload is not None
    prediction = found.prediction
    return {
        "plan": found.plan.to_json(),
        "flags": flags_of(found.options),
        "formats": {"weights": given.stored.weight_format, "kv": found.plan.kv_format.name, "dtype": found.plan.dtype},
        "machine": {
            "name": hardware.name,
            "memory": {str(tier): figure.value for tier, figure in hardware.capacity.items()},
            "link_per_s": hardware.lanes[LaneName.HOST_TO_DEVICE].fastest,
            "disk_per_s": hardware.lanes[LaneName.DISK_READ].fastest,
        },
        "predicted": {
            "rows_per_s": rows_per_s(given, found),
            "rows": given.workload.rows,
            "pass_s": prediction.steady_pass.seconds,
            "lanes": {str(lane): seconds for lane, seconds in prediction.steady_pass.lane_seconds.items() if seconds},
            "generated_per_s": prediction.generated_per_s,
            "total_per_s": prediction.total_per_s,
            "bound_by": str(prediction.bound_by),
            "steady_generated_per_s": prediction.steady_generated_per_s,
            "lane_ceiling_per_s": prediction.lane_ceiling_per_s,
            "product_ceiling_per_s": product_ceiling_per_s(given, hardware),
            "seconds": prediction.seconds,
            "requests": given.workload.requests,
        },
        "memory": {
            str(tier): {"used": used, "budget": found.plan.budgets[tier]}
            for tier, used in found.plan.used_bytes.items()
        },
        "advice": [asdict(each) for each in advised.changes],
        "four_bits_in_vain": list(advised.in_vain),
    }
