"""From a model directory to an engine: what its plan is made from, and how it is loaded by it."""

from pathlib import Path

from engine.devices.open import facts_of, open_device
from engine.engine import Engine
from engine.memory.device import Device
from engine.model.registry import sizes_for
from engine.planner.decide import decide
from engine.planner.hardware import Hardware
from engine.planner.plan import PlanOptions
from engine.planner.plan_input import PlanInput, check_asked
from engine.planner.workload import Workload
from engine.trace import Recorder
from engine.weights.checks import check_units
from engine.weights.layout import stored_in
from engine.weights.manifest import read_manifest


def plan_input(model_dir: Path, options: PlanOptions, device: Device, workload: Workload | None = None) -> PlanInput:
    """What a plan for a model on this machine, as it is now, is made from.

    Raises:
        CheckpointError: the model directory is absent, half-written or damaged.
        PlanDoesNotFit: more memory is asked for than is free.
    """
    manifest = read_manifest(model_dir)
    check_units(manifest, model_dir)
    facts = facts_of(device)
    check_asked(options, facts, model_dir)
    return PlanInput(
        shape=sizes_for(manifest.config).shape,
        stored=stored_in(manifest),
        device=device.name,
        facts=facts,
        options=options,
        disk_dir=model_dir,
        workload=workload,
    )


def load_engine(
    model_dir: Path,
    options: PlanOptions | None = None,
    *,
    device: Device | None = None,
    recorder: Recorder | None = None,
    workload: Workload | None = None,
    hardware: Hardware | None = None,
) -> Engine:
    """Decide a plan and load a model with it, in one.

    Args:
        model_dir: made by ``overnight import``.
        options: what the caller fixes of the plan; the rest is chosen.
        device: an open device to use (and close) instead of the one that ``options`` names.
        recorder: is told what the lanes and passes do; stays the caller's to close.
        workload: what will be computed, if that is known.
        hardware: the machine's figures; without them, or the workload, the plan follows simple rules.

    Raises:
        CheckpointError: the model directory is absent, half-written or damaged.
        DeviceUnavailable: there is no such device.
        PlanDoesNotFit: the plan needs more than a tier's budget; nothing was allocated.
    """
    options = options or PlanOptions()
    device = device or open_device(options.device)
    try:
        decision = decide(plan_input(model_dir, options, device, workload), hardware)
    except BaseException:
        device.close()
        raise
    return Engine.load(model_dir, decision.plan, device=device, recorder=recorder, expects=decision.expects)
