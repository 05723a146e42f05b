"""`overnight plan`: what the planner would do on a machine, and why. It loads no weights and needs no GPU."""

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from cli import exit_codes, templates
from cli.context import App
from cli.display import counted, emit, emit_json, emit_table, format_count, format_rate, format_seconds
from cli.job_options import Choices
from cli.options import Number, PathName, Size, Text, json_option, settings_options
from cli.placement import placement_options, take_placement
from cli.planning import DEFAULT_GEN_LEN, DEFAULT_PROMPT_LEN, DEFAULT_REQUESTS, LengthOptions, read_input
from engine.formats.sizes import TENSOR_FORMATS
from engine.units import MIB
from worker.payloads import TASKS

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.planner.advice import Advised
    from engine.planner.hardware import Hardware
    from engine.planner.plan_input import PlanInput
    from engine.planner.search import Found

_SWEEPS = ("device-memory", "host-memory")


def format_rows(per_second: float) -> str:
    """``12.3 rows/s``, or ``45 rows/hour`` where a second sees none."""
    return f"{per_second:.3g} rows/s" if per_second >= 0.1 else f"{3600 * per_second:.3g} rows/hour"


def format_memory(num_bytes: float) -> str:
    """``15.0 GiB``."""
    from engine.units import format_bytes

    return format_bytes(int(num_bytes))


def _tokens() -> Number:
    return Number(minimum=1, maximum=2**31 - 1, whole=True)


@click.command("plan", short_help="What would run how fast, on this machine or another.")
@click.option(
    "--model",
    required=True,
    type=Text(),
    help="A name from `overnight models`, a folder, or a known one: facebook/opt-30b.",
)
@click.option(
    "--hardware",
    type=PathName(),
    metavar="FILE|PRESET,…|all",
    help="Other machines, such as t4-gcp, or all that are known, in one table. Default: this, if measured.",
)
@click.option("--task", type=click.Choice(TASKS), default=TASKS[0], show_default=True, help="As with enqueue.")
@click.option("--choices", type=Choices(), help="With --task choose: the labels, split at commas.")
@click.option("--prompt-len", type=_tokens(), help=f"Tokens of a prompt. [default: {DEFAULT_PROMPT_LEN}, or what fits]")
@click.option("--gen-len", type=_tokens(), help=f"Tokens generated, or scored, for each. [default: {DEFAULT_GEN_LEN}]")
@click.option("--requests", type=_tokens(), help=f"How many. [default: {DEFAULT_REQUESTS}]")
@click.option("--dataset", type=PathName(), metavar="FILE", help="Number and lengths of the prompts from this dataset.")
@click.option(
    "--prompt",
    type=Text(),
    metavar="TEMPLATE|@FILE",
    help=f"With --dataset: Jinja2 template over a row's fields. [default: {templates.DEFAULT}]",
)
@click.option(
    "--weight-format",
    type=click.Choice(TENSOR_FORMATS),
    help="As if the layers' weights were stored so. Default: as they are; those of a known model are plain.",
)
@click.option(
    "--disk-speed",
    type=Size(minimum=MIB, too_small="is too slow for a disk"),
    help="Bytes that the disk reads a second, if another: 3GB.",
)
@click.option("--sweep", type=click.Choice(_SWEEPS), help="Show the speed with less and with more of this memory.")
@click.option("--no-advice", is_flag=True, help="Do not look for what would help most: it takes most of the time.")
@json_option
@partial(placement_options, least_device_memory=0)  # the answer says what the least would be
@settings_options
@click.pass_obj
def command(
    app: App,
    /,
    model: str,
    hardware: str | None,
    weight_format: str | None,
    disk_speed: int | None,
    sweep: str | None,
    no_advice: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Show the plan that a worker would choose, what it predicts, what bounds it and what would help most.

    \b
    Examples:
      overnight plan --model opt-1.3b --dataset reviews.jsonl
      overnight plan --model facebook/opt-175b --hardware t4-gcp
      overnight plan --model facebook/opt-30b --hardware t4-gcp --sweep device-memory
    """
    lengths = LengthOptions.take(values)
    placement = take_placement(values)
    machines = _machines(hardware)
    if len(machines) > 1:
        if sweep is not None:
            raise click.UsageError("--sweep is of one machine: name it with --hardware")
        _compare(
            partial(
                read_input,
                app,
                model,
                options=placement,
                lengths=lengths,
                disk_speed=disk_speed,
                weight_format=weight_format,
            ),
            machines,
            as_json,
        )
        return
    given, machine = read_input(app, model, machines[0], placement, lengths, disk_speed, weight_format)
    if sweep is not None:
        _emit_sweep(given, machine, sweep, as_json)
        return
    from engine.planner.advice import Advised, advise
    from engine.planner.decide import best_plan
    from engine.planner.explain import document

    found = best_plan(given, machine)
    if as_json:
        emit_json(document(given, machine, found, Advised() if no_advice else advise(given, machine, found)))
        return
    _explain(given, machine, found, model)
    if not no_advice:
        _emit_advice(advise(given, machine, found))


def _machines(named: str | None) -> list[str | None]:
    """Those that were named; ``None``: this one."""
    if named is None:
        return [None]
    if named == "all":
        from engine.planner.profiles import preset_names

        return list(preset_names())
    return [name for name in named.split(",") if name] or [named]


def _compare(read: "Callable[..., tuple[PlanInput, Hardware]]", machines: list[str | None], as_json: bool) -> None:
    """One line for each machine, the fastest first; those that the model does not fit come last, with the reason."""
    from engine.errors import HardwareAbsent, HardwareError, PlanDoesNotFit
    from engine.planner.advice import Advised
    from engine.planner.decide import best_plan
    from engine.planner.explain import document

    documents: list[dict[str, Any]] = []
    refused: list[tuple[str, str]] = []
    for name in machines:
        try:
            given, machine = read(hardware_name=name)
            documents.append(document(given, machine, best_plan(given, machine), Advised()))
        except HardwareAbsent:
            raise
        except (PlanDoesNotFit, HardwareError) as error:
            refused.append((str(name), str(error)))
    documents.sort(key=lambda each: -each["predicted"]["rows_per_s"])
    if as_json:
        emit_json({"machines": documents, "refused": [{"name": name, "why": why} for name, why in refused]})
    else:
        _emit_machines(documents, refused)
    if not documents:
        raise click.exceptions.Exit(exit_codes.USAGE)


def _emit_machines(documents: list[dict[str, Any]], refused: list[tuple[str, str]]) -> None:
    rows = [
        (
            each["machine"]["name"],
            format_rows(each["predicted"]["rows_per_s"]),
            format_seconds(each["predicted"]["seconds"]),
            format_rate(each["predicted"]["generated_per_s"]),
            *(format_memory(each["machine"]["memory"][tier]) for tier in ("device", "host")),
            each["predicted"]["bound_by"],
        )
        for each in documents
    ]
    if rows:
        emit_table(("MACHINE", "ROWS", "IN ALL", "GENERATED", "DEVICE", "HOST", "BOUND BY"), rows)
    for name, why in refused:
        emit(f"{name}: {why}")


def _emit_sweep(given: "PlanInput", machine: "Hardware", sweep_of: str, as_json: bool) -> None:
    from engine.planner.sweep import sweep
    from engine.tiers import TierName
    from engine.units import format_bytes

    tier = TierName(sweep_of.partition("-")[0])
    if not given.budgets[tier]:
        raise click.UsageError(
            f"--sweep {sweep_of}: there is nothing to begin with, since the budget is 0"
            + (" where device and host are one memory" if machine.shares_host_memory else "")
        )
    points: list[dict[str, Any]] = []
    for point in sweep(given, machine, tier):
        prediction = point.found.prediction if point.found else None
        points.append(
            {
                "bytes": point.num_bytes,
                "generated_per_s": prediction.generated_per_s if prediction else None,
                "total_per_s": prediction.total_per_s if prediction else None,
                "bound_by": str(prediction.bound_by) if prediction else None,
            }
        )
    if as_json:
        emit_json({"sweep": sweep_of, "points": points})
        return
    rows = [
        (format_bytes(point["bytes"]), "does not fit", "", "")
        if point["generated_per_s"] is None
        else (
            format_bytes(point["bytes"]),
            format_rate(point["generated_per_s"]),
            format_rate(point["total_per_s"]),
            point["bound_by"],
        )
        for point in points
    ]
    emit_table((sweep_of.upper(), "GENERATED", "WITH PROMPTS", "BOUND BY"), rows)


def _explain(given: "PlanInput", machine: "Hardware", found: "Found", model: str) -> None:
    """For people: what is where, how fast that is, and why not faster."""
    from engine.formats.sizes import Plain
    from engine.planner.explain import flags_of, product_ceiling_per_s, rows_per_s
    from engine.tiers import TierName
    from engine.units import format_bytes

    plan, prediction, workload = found.plan, found.prediction, given.workload
    assert workload is not None
    prompts = sorted({each.prompt for each in workload.lengths})
    spread = f"{prompts[0]}" if len(prompts) == 1 else f"{prompts[0]} to {prompts[-1]}"
    generated = workload.generated / workload.requests
    packed = "" if given.stored.weight_format == Plain.name else f" with weights in {given.stored.weight_format}"
    emit(f"model     {model}, {plan.dtype}{packed}, {given.shape.num_layers} layers")
    emit(f"machine   {machine.name}: {_facts(machine)}")
    in_all = counted(round(workload.rows), "row")
    what = (
        f"{in_all} of {workload.per_row:.3g} choices"
        if workload.per_row != 1
        else counted(workload.requests, "request")
    )
    emit(f"workload  {what}, prompts of {spread} tokens, {generated:.3g} generated")
    emit(f"predicted {format_rows(rows_per_s(given, found))}: {in_all} in {format_seconds(prediction.seconds)}")
    click.echo()
    pool = sum(plan.kv_bytes.values()) or 1
    rows = [
        (
            str(tier),
            str(plan.num_layers_in(tier)),
            f"{100 * plan.kv_bytes[tier] / pool:.0f}%",
            "all" if plan.activations is tier else "",
            format_bytes(plan.used_bytes[tier]),
            format_bytes(plan.budgets[tier]),
        )
        for tier in TierName
    ]
    emit_table(("TIER", "LAYERS", "KV CACHE", "ACTIVATIONS", "USED", "BUDGET"), rows)
    click.echo()
    emit(f"batches   {plan.micro_batches} of {format_count(plan.micro_batch)} tokens a pass")
    emit(f"by hand   {flags_of(found.options)}")
    emit(
        f"tokens    {format_rate(prediction.generated_per_s)} generated, {format_rate(prediction.total_per_s)} with "
        f"prompts: {counted(workload.requests, 'request')} in {format_seconds(prediction.seconds)}"
    )
    emit(
        f"bound by  {prediction.bound_by}, which alone would allow {format_rate(prediction.lane_ceiling_per_s)}; "
        f"products alone {format_rate(product_ceiling_per_s(given, machine))}"
    )


def _facts(machine: "Hardware") -> str:
    """Memories, link and disk."""
    from engine.memory.lane import LaneName
    from engine.tiers import TierName

    memories = [f"{tier} {format_memory(machine.capacity[tier].value)}" for tier in TierName]
    lanes = {"link": LaneName.HOST_TO_DEVICE, "disk reads": LaneName.DISK_READ}
    if machine.shares_host_memory:
        del lanes["link"]
    speeds = [f"{name} {format_memory(machine.lanes[lane].fastest)}/s" for name, lane in lanes.items()]
    return ", ".join([*memories, *speeds])


def _emit_advice(advised: "Advised") -> None:
    from engine.planner.advice import KV, WEIGHTS

    said = [
        f"+{100 * each.gain:.0f}%: {each.change} ({format_rate(each.generated_per_s)})" for each in advised.changes
    ] or ["nothing would help by more than 1%"]
    if advised.in_vain:
        names = {WEIGHTS: "for weights", KV: "for the KV cache"}
        said.append(f"four bits would gain nothing {' or '.join(names[each] for each in advised.in_vain)}")
    for index, line in enumerate(said):
        emit(f"{'' if index else 'advice':<9} {line}")
