"""`overnight plan`: what the planner would do on a machine, and why. It loads no weights and needs no GPU."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli import templates
from cli.context import App
from cli.display import emit_json, emit_table, format_count, format_rate, format_seconds, say
from cli.options import Number, Text, json_option, placement_options, settings_options
from cli.placement import Placement

if TYPE_CHECKING:
    from engine.planner.advice import Advice
    from engine.planner.decide import Question
    from engine.planner.hardware import Hardware
    from engine.planner.search import Found
    from engine.planner.workload import Workload

_SWEEPS = ("device-memory", "host-memory")
_SWEEP_FACTORS = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
_MEASURED_ROWS = 5000
"""Rows of a dataset whose prompts are measured; the others are taken to be like them."""
_CHARACTERS_A_TOKEN = 4


def _tokens() -> Number:
    return Number(minimum=1, maximum=2**31 - 1, whole=True)


@click.command("plan", short_help="What would run how fast, on this machine or another.")
@click.option(
    "--model", required=True, type=Text(), help="A name from `overnight models`, a folder, or facebook/opt-…."
)
@click.option(
    "--hardware",
    type=Text(),
    metavar="PRESET|FILE",
    help="Another machine. Default: this one, once measured.",
)
@click.option("--prompt-len", type=_tokens(), help="Tokens of a prompt. [default: 512]")
@click.option("--gen-len", type=_tokens(), default=32, show_default=True, help="Tokens generated for each.")
@click.option("--requests", type=_tokens(), help="How many. [default: 1000]")
@click.option(
    "--dataset", type=Text(), metavar="FILE", help="Take number and lengths of the prompts from this dataset."
)
@click.option(
    "--prompt",
    default=templates.DEFAULT,
    show_default=True,
    type=Text(),
    metavar="TEMPLATE|@FILE",
    help="With --dataset: template over a row's fields.",
)
@click.option("--sweep", type=click.Choice(_SWEEPS), help="Token/s against this much memory, more or less.")
@json_option
@placement_options
@settings_options
@click.pass_obj
def command(app: App, /, model: str, hardware: str | None, sweep: str | None, as_json: bool, **values: Any) -> None:
    """Show the plan that a worker would choose, what it predicts, what bounds it and what would help most.

    \b
    Examples:
      overnight plan --model opt-1.3b --dataset reviews.jsonl
      overnight plan --model facebook/opt-175b --hardware t4-gcp
      overnight plan --model facebook/opt-30b --hardware t4-gcp --sweep device-memory
    """
    lengths = {name: values.pop(name) for name in ("prompt_len", "gen_len", "requests", "dataset", "prompt")}
    placement = Placement.take(values)
    question = _question(app, model, hardware, placement, lengths)
    if sweep is not None:
        _emit_sweep(question, sweep, as_json)
        return
    from engine.planner.advice import advise

    found = question.decide()
    budgets = {tier: found.plan.budgets[tier] for tier in found.plan.budgets}
    advice = advise(question.decide, question.hardware, budgets, found)
    if as_json:
        emit_json(_document(found, advice, question.workload))
    else:
        _explain(found, advice, question, model)


def _question(
    app: App, model: str, hardware_name: str | None, placement: Placement, lengths: dict[str, Any]
) -> "Question":
    from engine.planner.decide import Question, budgets_of_machine
    from engine.planner.default import budgets_of
    from engine.planner.machine import MachineFacts, free_host_memory
    from engine.planner.plan import TierName

    shape, stored, folder = _model(app, model, placement.dtype)
    options = placement.plan_options()
    workload = _workload(lengths, folder, shape.bos_token_id)
    hardware = _hardware(app, hardware_name)
    if hardware_name is not None:
        budgets = budgets_of_machine(hardware, stored)
        return Question(
            hardware=hardware, shape=shape, stored=stored, workload=workload, options=options, budgets=budgets
        )
    host_free = free_host_memory()
    shares = hardware.shares_host_memory
    device_free = host_free if shares else int(hardware.capacity[TierName.DEVICE].value)
    facts = MachineFacts(device_free, host_free, shares, attention_threads=(os.cpu_count() or 1) if shares else 0)
    budgets = budgets_of(options, facts, placement.disk_dir or app.settings.spill_dir)
    return Question(
        hardware=hardware, shape=shape, stored=stored, workload=workload, options=options, budgets=budgets, facts=facts
    )


def _model(app: App, name: str, dtype: str | None) -> tuple[Any, Any, Path | None]:
    """Shape, stored weights, and the folder with its tokenizer if it is here."""
    from engine.planner.default import StoredWeights
    from engine.planner.shapes import known_model
    from worker.errors import ModelNotFound
    from worker.models import resolve_model

    try:
        ref = resolve_model(name, app.settings)
    except ModelNotFound as error:
        known = known_model(name)
        if known is None:
            raise ModelNotFound(f"{error}; or name one whose shape is known, such as facebook/opt-30b") from error
        return known.shape, known.stored(dtype or "float16"), None
    from engine.errors import CheckpointError
    from engine.model.opt_shape import shape_of
    from engine.weights.manifest import read_manifest

    if not ref.is_imported:
        raise CheckpointError(f"{ref.path} is not imported yet; run: overnight import {ref.path}")
    manifest = read_manifest(ref.path)
    if manifest.model_type != "opt":
        raise CheckpointError(f"model_type {manifest.model_type!r} cannot be planned for; only 'opt' can")
    stored = StoredWeights(manifest.dtype, {unit.name: unit.num_bytes for unit in manifest.units})
    return shape_of(manifest.config), stored, ref.path


def _hardware(app: App, name: str | None) -> "Hardware":
    from engine.errors import HardwareAbsent
    from engine.planner.hardware import PROFILE_NAME, load_hardware, preset_names

    if name is not None:
        return load_hardware(name)
    path = app.settings.home / PROFILE_NAME
    if not path.exists():
        raise HardwareAbsent(
            "this machine has not been measured yet; run: overnight doctor --measure, or name another with --hardware: "
            f"{', '.join(preset_names())}"
        )
    return load_hardware(path)


def _workload(lengths: dict[str, Any], folder: Path | None, bos: int | None) -> "Workload":
    from engine.planner.workload import Workload

    generated = lengths["gen_len"]
    if lengths["dataset"] is None:
        return Workload.uniform(lengths["prompt_len"] or 512, generated, lengths["requests"] or 1000)
    for name in ("prompt_len", "requests"):
        if lengths[name] is not None:
            raise click.UsageError(f"--{name.replace('_', '-')} and --dataset: the dataset says that already")
    prompts = _prompts(lengths["dataset"], lengths["prompt"])
    measured = list(itertools.islice(prompts, _MEASURED_ROWS))
    more = sum(1 for _ in prompts)
    if folder is None:
        say(f"no tokenizer here: taking {_CHARACTERS_A_TOKEN} characters for a token")
        counts = [max(1, len(text) // _CHARACTERS_A_TOKEN) for text in measured]
    else:
        from engine.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(folder, bos)
        counts = [max(1, len(tokenizer.encode(text))) for text in measured]
    workload = Workload.of((count, generated) for count in counts)
    return workload.times((len(measured) + more) / len(measured))


def _prompts(dataset_name: str, template: str) -> Iterator[str]:
    """Rendered prompts; what is no row, or lacks a field, will be an error row and costs nothing.

    Raises:
        FileAbsent, DatasetFault, TemplateFault: the dataset or its first row cannot be used.
    """
    from cli.datasets import BadLine, Dataset
    from cli.errors import DatasetFault
    from cli.tasks import TaskSpec
    from cli.templates import PromptTemplate, RowFault, read_template

    dataset = Dataset(dataset_name)
    dataset.check()
    spec = TaskSpec("generate", PromptTemplate(read_template(template)))
    some = False
    for row in dataset.rows():
        if isinstance(row, BadLine):
            continue
        try:
            prompt = str(spec.payload(row)["prompt"])
        except RowFault as error:
            if not some:
                raise DatasetFault(f"{dataset.label}, line {row.line}: {error}") from error
            continue
        some = True
        yield prompt
    if not some:
        raise DatasetFault(f"{dataset.label} has no rows")


def _emit_sweep(question: "Question", sweep: str, as_json: bool) -> None:
    from engine.errors import PlanDoesNotFit
    from engine.planner.plan import TierName
    from engine.units import format_bytes

    tier = TierName(sweep.partition("-")[0])
    asked = question.options
    fixed = {
        TierName.DEVICE: asked.device_memory, TierName.HOST: asked.host_memory, TierName.DISK: asked.disk_space,
    }  # fmt: skip
    budgets = {each: question.budgets[each] if fixed[each] is None else int(fixed[each] or 0) for each in TierName}
    question = replace(question, options=replace(asked, device_memory=None, host_memory=None, disk_space=None))
    if not budgets[tier]:
        raise click.UsageError(f"--sweep {sweep}: a plan for this machine takes none; device and host are one memory")
    points: list[dict[str, Any]] = []
    best = None
    for factor in _SWEEP_FACTORS:
        room = {**budgets, tier: int(budgets[tier] * factor)}
        try:
            found = question.decide(budgets=room)
        except PlanDoesNotFit:
            points.append({"bytes": room[tier], "generated_per_s": None, "bound_by": None})
            continue
        # A plan that fits into less fits into more.
        if best is None or found.prediction.generated_per_s > best.prediction.generated_per_s:
            best = found
        points.append(
            {
                "bytes": room[tier],
                "generated_per_s": best.prediction.generated_per_s,
                "bound_by": str(best.prediction.bound_by),
            }
        )
    if as_json:
        emit_json({"sweep": sweep, "points": points})
        return
    rows = [
        (
            format_bytes(point["bytes"]),
            "does not fit" if point["generated_per_s"] is None else format_rate(point["generated_per_s"]),
            point["bound_by"] or "",
        )
        for point in points
    ]
    emit_table((sweep.upper(), "GENERATED", "BOUND BY"), rows)


def _document(found: "Found", advice: "list[Advice]", workload: "Workload") -> dict[str, Any]:
    prediction = found.prediction
    return {
        "plan": found.plan.to_json(),
        "predicted": {
            "generated_per_s": prediction.generated_per_s,
            "total_per_s": prediction.total_per_s,
            "bound_by": str(prediction.bound_by),
            "lane_ceiling_per_s": prediction.lane_ceiling_per_s,
            "seconds": prediction.seconds,
            "requests": workload.requests,
        },
        "memory": {
            str(tier): {"used": found.used[tier], "budget": budget} for tier, budget in found.plan.budgets.items()
        },
        "advice": [asdict(each) for each in advice],
    }


def _explain(found: "Found", advice: "list[Advice]", question: "Question", model: str) -> None:
    from engine.planner.cost import compute_ceiling_per_s
    from engine.planner.plan import TierName
    from engine.units import format_bytes

    plan, prediction, workload = found.plan, found.prediction, question.workload
    prompts = sorted({each.prompt for each in workload.lengths})
    spread = f"{prompts[0]}" if len(prompts) == 1 else f"{prompts[0]} to {prompts[-1]}"
    click.echo(f"model     {model}, {plan.dtype}, {question.shape.num_layers} layers")
    click.echo(f"machine   {question.hardware.name}")
    click.echo(f"workload  {format_count(workload.requests)} requests, prompts of {spread} tokens")
    click.echo()
    pool = sum(plan.kv_bytes.values()) or 1
    rows = [
        (
            str(tier),
            str(plan.num_layers_in(tier)),
            f"{100 * plan.kv_bytes[tier] / pool:.0f}%",
            "all" if plan.activations is tier else "",
            format_bytes(found.used[tier]),
            format_bytes(plan.budgets[tier]),
        )
        for tier in TierName
    ]
    emit_table(("TIER", "LAYERS", "KV CACHE", "ACTIVATIONS", "USED", "BUDGET"), rows)
    click.echo()
    click.echo(f"batches   {plan.micro_batches} of {format_count(plan.micro_batch)} tokens a pass")
    click.echo(
        f"predicted {format_rate(prediction.generated_per_s)} generated, {format_rate(prediction.total_per_s)} with "
        f"prompts: {format_count(workload.requests)} requests in {format_seconds(prediction.seconds)}"
    )
    products = compute_ceiling_per_s(question.hardware, question.shape, question.stored, workload, plan.dtype)
    click.echo(
        f"bound by  {prediction.bound_by}, which alone would allow {format_rate(prediction.lane_ceiling_per_s)}; "
        f"products alone {format_rate(products)}"
    )
    for index, each in enumerate(advice):
        label = "advice" if index == 0 else ""
        click.echo(f"{label:<9} +{100 * each.gain:.0f}%: {each.change} ({format_rate(each.generated_per_s)})")
    if not advice:
        click.echo("advice    nothing would help by more than 1%")
