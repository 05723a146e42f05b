"""From the words of `overnight plan` to what a plan is made for: model, machine and lengths. Loads no weights."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import click

from cli import templates
from cli.context import App
from cli.display import say, warn
from cli.machine import exact_facts
from cli.sizes import Sizes, sizes_of

if TYPE_CHECKING:
    from engine.devices.facts import MachineFacts
    from engine.dtypes import DType
    from engine.planner.hardware import Hardware
    from engine.planner.plan import PlanOptions
    from engine.planner.plan_input import PlanInput
    from engine.planner.workload import Workload
    from engine.shape import ModelShape
    from worker.limits import Limits

DEFAULT_PROMPT_LEN, DEFAULT_GEN_LEN, DEFAULT_REQUESTS = 512, 32, 1000
_MEASURED_ROWS = 5000
"""Rows of a dataset whose prompts are measured; the others are taken to be like them."""
_CHARACTERS_A_TOKEN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthOptions:
    """What a person said of the workload; None: not given."""

    task: str
    choices: tuple[str, ...] | None
    """The labels to choose from."""
    prompt_len: int | None
    gen_len: int | None
    requests: int | None
    dataset: str | None
    prompt: str | None
    """The template, for ``dataset``."""

    @classmethod
    def take(cls, options: dict[str, Any]) -> Self:
        """Moves the values out of a command's keyword arguments.

        Raises:
            UsageError: the dataset and an option say the same thing, or one is of no use without the other.
        """
        names = ("task", "choices", "prompt_len", "gen_len", "requests", "dataset", "prompt")
        values = cls(**{name: options.pop(name) for name in names})
        if values.choices is not None and values.task != "choose":
            raise click.UsageError("--choices are for --task choose; leave them out, or name that task")
        if values.chooses_by_row and values.dataset is None:
            raise click.UsageError(
                "--task choose needs labels: name them with --choices, separated by commas, or a --dataset whose rows "
                "have a field 'choices'"
            )
        if values.task == "choose" and values.gen_len is not None:
            raise click.UsageError("--gen-len: nothing is generated where labels are chosen; leave it out")
        for name in ("prompt_len", "requests"):
            if values.dataset is not None and getattr(values, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise click.UsageError(f"{flag} and --dataset: the dataset says that already; leave one of them out")
        if values.prompt is not None and values.dataset is None:
            raise click.UsageError("--prompt is a template over the rows of a dataset: name it with --dataset")
        return values

    @property
    def chooses_by_row(self) -> bool:
        """Each row of the dataset has labels of its own."""
        return self.task == "choose" and self.choices is None


def read_input(
    app: App,
    model_name: str,
    hardware_name: str | None,
    options: "PlanOptions",
    lengths: LengthOptions,
    disk_speed: int | None = None,
    weight_format: str | None = None,
) -> "tuple[PlanInput, Hardware]":
    """Everything that a plan is made from, and the machine's figures.

    Raises:
        ModelNotFound, CheckpointError: there is no such model, or it is damaged.
        HardwareAbsent, HardwareError: there is no such machine, its profile is damaged, or it lacks a figure.
        FileAbsent, DatasetFault, TemplateFault: the dataset or the template cannot be used.
        PlanDoesNotFit: the model is larger than the disk, or every prompt longer than the model.
    """
    from engine.dtypes import DType
    from engine.formats.int4_sizes import Int4
    from engine.planner.decide import input_for_machine
    from engine.weights.layout import in_format

    hardware = _read_hardware(app, hardware_name, options.device)
    if disk_speed is not None:
        hardware = with_disk_speed(hardware, disk_speed)
    known_as = DType.FLOAT16 if DType.FLOAT16 in hardware.matmul else next(iter(hardware.matmul))
    model = _read_model(app, model_name, options.dtype or known_as)
    if weight_format is not None and weight_format != model.stored.weight_format:
        matrices = Int4() if weight_format == Int4.name else None
        model = replace(model, stored=in_format(model.stored, matrices))
    if options.device is not None and options.device.partition(":")[0] != hardware.device:
        raise click.UsageError(
            f"--device {options.device}: {hardware.name} is described as {hardware.device}; name another machine with "
            "--hardware, or leave --device out"
        )
    workload = _read_workload(lengths, model, app.settings.limits)
    if hardware_name is not None:
        given = input_for_machine(hardware, shape=model.shape, stored=model.stored, options=options, workload=workload)
    else:
        device = options.device or hardware.identity.get("device", hardware.device)
        given = model.plan_input(
            options, device, _facts_now(hardware, device), options.disk_dir or app.settings.spill_dir, workload
        )
    return given, hardware


def _facts_now(hardware: "Hardware", device: str) -> "MachineFacts":
    """What is free on this machine; of a GPU, where a worker may have a model, all that was free when it was measured.

    The GPU itself is left alone: looking at it takes some of its memory.
    """
    if hardware.shares_host_memory:
        return exact_facts(device)[1]
    from engine.devices.facts import MachineFacts, free_host_memory
    from engine.tiers import TierName

    return MachineFacts(int(hardware.capacity[TierName.DEVICE].value), free_host_memory(), shares_host_memory=False)


def _read_model(app: App, name: str, dtype: "DType") -> Sizes:
    """A model that is here, else one whose shape is known, as if it were stored in ``dtype``."""
    from engine.planner.known_models import known_model
    from worker.errors import ModelNotFound
    from worker.models import resolve_model

    try:
        return sizes_of(resolve_model(name, app.settings), app.settings)
    except ModelNotFound as error:
        known = known_model(name)
        if known is None:
            raise ModelNotFound(f"{error}; or name one whose shape is known, such as facebook/opt-30b") from error
        return Sizes(known.shape, known.stored(dtype), None)


def _read_hardware(app: App, name: str | None, device: str | None) -> "Hardware":
    """``device``: the one of this machine that is meant; ``None``: the one that was measured last."""
    from engine.errors import HardwareAbsent, HardwareError
    from engine.planner.profiles import load_hardware, preset_names
    from engine.profile import profile_path, profile_paths

    if name is not None:
        return load_hardware(name)
    home = app.settings.home
    measured = profile_paths(home)
    if device is not None:
        path = profile_path(home, "cuda:0" if device == "cuda" else device)
        measured = [each for each in measured if each == path]
    if not measured:
        option = f" --device {device}" if device else ""
        raise HardwareAbsent(
            f"this machine has not been measured yet; run: overnight doctor --measure{option}, or name another with "
            f"--hardware: {', '.join(preset_names())}"
        )
    try:
        return load_hardware(measured[0])
    except HardwareError as error:
        raise HardwareError(f"{error}; measure this machine again: overnight doctor --measure") from error


def _read_workload(lengths: LengthOptions, model: Sizes, limits: "Limits") -> "Workload":
    from engine.planner.workload import Workload

    generated, ends = lengths.gen_len or DEFAULT_GEN_LEN, [1]
    if lengths.task != "generate":
        # What is scored is computed as a prompt is, but for its last token.
        ends = [generated] if lengths.choices is None else _token_counts(list(lengths.choices), model)
        generated = 1
    if lengths.dataset is None:
        most = model.shape.max_positions - generated - max(ends) + 1
        measured = [lengths.prompt_len or max(1, min(DEFAULT_PROMPT_LEN, most))]
        rows, ends_of_rows = lengths.requests or DEFAULT_REQUESTS, [ends]
    else:
        prompts = _prompts(lengths, limits)
        read = list(itertools.islice(prompts, _MEASURED_ROWS))
        measured = _token_counts([text for text, _ in read], model)
        rows, ends_of_rows = len(measured) + sum(1 for _ in prompts), [ends] * len(measured)
        if lengths.chooses_by_row:
            tokens = iter(_token_counts([label for _, labels in read for label in labels], model))
            ends_of_rows = [list(itertools.islice(tokens, len(labels))) for _, labels in read]
    counts = [count + end - 1 for count, ends in zip(measured, ends_of_rows, strict=True) for end in ends]
    # Of lengths that were typed in, the planner says what would fit.
    pairs = [(count, generated) for count in counts]
    if lengths.dataset is not None:
        pairs = _that_fit(counts, generated, model.shape)
    return replace(Workload.of(pairs).times(rows / len(measured)), per_row=len(counts) / len(measured))


def with_disk_speed(hardware: "Hardware", per_second: int) -> "Hardware":
    """The same machine with a disk that reads ``per_second`` bytes a second."""
    from engine.memory.lane import LaneName
    from engine.planner.rates import Rate

    rate = Rate.constant(float(per_second), "as asked for: --disk-speed")
    return replace(hardware, lanes={**hardware.lanes, LaneName.DISK_READ: rate})


def _token_counts(texts: list[str], model: Sizes) -> list[int]:
    from engine.weights.manifest import TOKENIZER_NAME

    if model.folder is None or not (model.folder / TOKENIZER_NAME).is_file():
        say(f"no tokenizer for this model here: taking {_CHARACTERS_A_TOKEN} characters for a token")
        return [max(1, len(text) // _CHARACTERS_A_TOKEN) for text in texts]
    from engine.tokenizer import Tokenizer

    tokenizer = Tokenizer.of_model(model.folder / TOKENIZER_NAME, model.shape)
    return [max(1, len(token_ids)) for token_ids in tokenizer.encode_batch(texts)]


def _that_fit(counts: list[int], generated: int, shape: "ModelShape") -> list[tuple[int, int]]:
    """Pairs for a workload, as the engine treats them: too long a prompt is an error row, too long an output is cut.

    Raises:
        PlanDoesNotFit: no prompt is short enough.
    """
    from engine.errors import PlanDoesNotFit

    positions = shape.max_positions
    pairs = [(count, min(generated, positions - count)) for count in counts if count < positions]
    if not pairs:
        shortest = min(counts)
        raise PlanDoesNotFit(
            f"every prompt of the dataset is longer than the model: the shortest has {shortest} tokens, "
            f"{shortest - positions + 1} more than fit into {positions} positions with one generated; shorten them"
        )
    if len(pairs) < len(counts):
        warn(f"{len(counts) - len(pairs)} of {len(counts)} prompts are longer than the model and will be error rows")
    return pairs


def _prompts(lengths: LengthOptions, limits: "Limits") -> Iterator[tuple[str, tuple[str, ...]]]:
    """Rendered prompts, each with labels of its own row; one that lacks a field will be an error row and costs nothing.

    Raises:
        FileAbsent, DatasetFault, TemplateFault: the dataset, a line of it or its first row cannot be used.
    """
    from cli.datasets import BadLine, Dataset
    from cli.errors import DatasetFault
    from cli.tasks import row_choices
    from cli.templates import PromptTemplate, RowFault, read_template

    assert lengths.dataset is not None
    dataset = Dataset(lengths.dataset, limits)
    dataset.check()
    compiled = PromptTemplate(read_template(lengths.prompt or templates.DEFAULT), limits)
    for index, row in enumerate(dataset.rows()):
        if isinstance(row, BadLine):
            raise DatasetFault(f"{dataset.label}, line {row.line}: {row.reason}; mend the line")
        try:
            yield compiled.render(row.fields), row_choices(row, limits) if lengths.chooses_by_row else ()
        except RowFault as fault:
            if index == 0:
                raise DatasetFault(f"{dataset.label}, row 0 (line {row.line}): {fault}") from None
