"""`overnight plan`: what the planner would do on a machine, and why. It loads no weights and needs no GPU."""

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from cli import templates
from cli.context import App
from cli.display import emit, emit_json, emit_table, format_count, format_rate, format_seconds
from cli.options import Number, Text, json_option, settings_options
from cli.placement import placement_options, take_placement
from cli.planning import DEFAULT_GEN_LEN, DEFAULT_PROMPT_LEN, DEFAULT_REQUESTS, LengthOptions, read_input

if TYPE_CHECKING:
    from engine.planner.advice import Advice
    from engine.planner.hardware import Hardware
    from engine.planner.plan_input import PlanInput
    from engine.planner.search import Found

_SWEEPS = ("device-memory", "host-memory")


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
    type=Text(),
    metavar="FILE|PRESET",
    help="Another machine, such as t4-gcp. Default: this, if measured.",
)
@click.option("--prompt-len", type=_tokens(), help=f"Tokens of a prompt. [default: {DEFAULT_PROMPT_LEN}]")
@click.option(
    "--gen-len", type=_tokens(), default=DEFAULT_GEN_LEN, show_default=True, help="Tokens generated for each."
)
@click.option("--requests", type=_tokens(), help=f"How many. [default: {DEFAULT_REQUESTS}]")
@click.option("--dataset", type=Text(), metavar="FILE", help="Number and lengths of the prompts from this dataset.")
@click.option(
    "--prompt",
    type=Text(),
    metavar="TEMPLATE|@FILE",
    help=f"With --dataset: Jinja2 template over a row's fields. [default: {templates.DEFAULT}]",
)
@click.option("--sweep", type=click.Choice(_SWEEPS), help="Show the speed with less and with more of this memory.")
@click.option("--no-advice", is_flag=True, help="Do not look for what would help most: it takes most of the time.")
@json_option
@partial(placement_options, least_device_memory=0)  # the answer says what the least would be
@settings_options
@click.pass_obj
def command(
    app: App, /, model: str, hardware: str | None, sweep: str | None, no_advice: bool, as_json: bool, **values: Any
) -> None:
    """Show the plan that a worker would choose, what it predicts, what bounds it and what would help most.

    \b
    Examples:
      overnight plan --model opt-1.3b --dataset reviews.jsonl
      overnight plan --model facebook/opt-175b --hardware t4-gcp
      overnight plan --model facebook/opt-30b --hardware t4-gcp --sweep device-memory
    """
    lengths = LengthOptions.take(values)
    given, machine = read_input(app, model, hardware, take_placement(values), lengths)
    if sweep is not None:
        _emit_sweep(given, machine, sweep, as_json)
        return
    from engine.planner.advice import advise
    from engine.planner.decide import best_plan
    from engine.planner.explain import document

    found = best_plan(given, machine)
    if as_json:
        emit_json(document(given, machine, found, [] if no_advice else advise(given, machine, found)))
        return
    _explain(given, machine, found, model)
    if not no_advice:
        _emit_advice(advise(given, machine, found))


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
    from engine.planner.explain import flags_of, product_ceiling_per_s
    from engine.tiers import TierName
    from engine.units import format_bytes

    plan, prediction, workload = found.plan, found.prediction, given.workload
    assert workload is not None
    prompts = sorted({each.prompt for each in workload.lengths})
    spread = f"{prompts[0]}" if len(prompts) == 1 else f"{prompts[0]} to {prompts[-1]}"
    generated = workload.generated / workload.requests
    emit(f"model     {model}, {plan.dtype}, {given.shape.num_layers} layers")
    emit(f"machine   {machine.name}")
    emit(f"workload  {format_count(workload.requests)} requests, prompts of {spread} tokens, {generated:.3g} generated")
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
        f"predicted {format_rate(prediction.generated_per_s)} generated, {format_rate(prediction.total_per_s)} with "
        f"prompts: {format_count(workload.requests)} requests in {format_seconds(prediction.seconds)}"
    )
    emit(
        f"bound by  {prediction.bound_by}, which alone would allow {format_rate(prediction.lane_ceiling_per_s)}; "
        f"products alone {format_rate(product_ceiling_per_s(given, machine))}"
    )


def _emit_advice(advice: "list[Advice]") -> None:
    for index, each in enumerate(advice):
        label = "advice" if index == 0 else ""
        emit(f"{label:<9} +{100 * each.gain:.0f}%: {each.change} ({format_rate(each.generated_per_s)})")
    if not advice:
        emit("advice    nothing would help by more than 1%")
