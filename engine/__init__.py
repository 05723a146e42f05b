"""The inference engine: requests in, outputs out; it knows no queue and no database.

Names load lazily, so that planning and reading a manifest never import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.engine import Engine as Engine
    from engine.errors import CheckpointError as CheckpointError
    from engine.errors import DeviceUnavailable as DeviceUnavailable
    from engine.errors import DiskFull as DiskFull
    from engine.errors import EngineError as EngineError
    from engine.errors import LaneFailed as LaneFailed
    from engine.errors import PlanDoesNotFit as PlanDoesNotFit
    from engine.errors import TierFull as TierFull
    from engine.loading import load_engine as load_engine
    from engine.planner.plan import Plan as Plan
    from engine.planner.plan import PlanOptions as PlanOptions
    from engine.request import Choice as Choice
    from engine.request import Choose as Choose
    from engine.request import FinishReason as FinishReason
    from engine.request import Generate as Generate
    from engine.request import Generation as Generation
    from engine.request import Output as Output
    from engine.request import Rejection as Rejection
    from engine.request import Request as Request
    from engine.request import SamplingParams as SamplingParams
    from engine.request import Score as Score
    from engine.request import Scoring as Scoring
    from engine.request import TokenScore as TokenScore
    from engine.schedule.passes import PassReport as PassReport
    from engine.schedule.passes import PassStats as PassStats
    from engine.tiers import Shares as Shares

_NAMES_IN = {
    "engine.engine": ("Engine",),
    "engine.loading": ("load_engine",),
    "engine.errors": (
        "CheckpointError",
        "DeviceUnavailable",
        "DiskFull",
        "EngineError",
        "LaneFailed",
        "PlanDoesNotFit",
        "TierFull",
    ),
    "engine.schedule.passes": ("PassReport", "PassStats"),
    "engine.planner.plan": ("Plan", "PlanOptions"),
    "engine.request": (
        "Choice",
        "Choose",
        "FinishReason",
        "Generate",
        "Generation",
        "Output",
        "Rejection",
        "Request",
        "SamplingParams",
        "Score",
        "Scoring",
        "TokenScore",
    ),
    "engine.tiers": ("Shares",),
}
_MODULE_OF = {name: module for module, names in _NAMES_IN.items() for name in names}

__all__ = sorted(_MODULE_OF)  # noqa: PLE0605 - one list of names, above


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)
