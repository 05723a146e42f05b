"""Rows of a dataset into the requests of a job: what `generate`, `score` and `choose` read from a row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cli.datasets import BadLine, Row
from cli.display import some_of
from cli.errors import DatasetFault
from cli.row_limits import check_fields, checked_id
from cli.templates import PromptTemplate, RowFault
from worker.limits import DEFAULT_LIMITS, Limits
from worker.payloads import ChoosePayload, GeneratePayload, ScorePayload

if TYPE_CHECKING:
    from storage.jobs import NewRequest


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """What each row becomes."""

    task: str
    """`generate`, `score` or `choose`."""
    template: PromptTemplate
    choices: tuple[str, ...] = ()
    """The choices of every row; empty: each row has its own."""
    limits: Limits = DEFAULT_LIMITS
    """How large a row may be."""

    def payload(self, row: Row) -> GeneratePayload | ScorePayload | ChoosePayload:
        """The request of one row, as it is stored.

        Raises:
            RowFault: a field is missing or is not what the task needs.
        """
        prompt = self.template.render(row.fields)
        if self.task == "generate":
            return GeneratePayload(prompt=prompt)
        if self.task == "score":
            return ScorePayload(context=prompt, continuation=_continuation(row))
        return ChoosePayload(prompt=prompt, choices=list(self.choices or row_choices(row, self.limits)))


def split_choices(text: str) -> tuple[str, ...]:
    """``positive, negative`` as its parts, without the spaces around them.

    Raises:
        ValueError: fewer than two, an empty one, or one twice; a sentence for people.
    """
    choices = tuple(part.strip() for part in text.split(","))
    _check_choices(choices)
    return choices


def requests(rows: Iterator[Row | BadLine], spec: TaskSpec, *, label: str, keep_going: bool) -> "Iterator[NewRequest]":
    """One request a row, in order, as they are read.

    A line that is no row, and a fault of the first row that others would share, refuse the dataset unless
    ``keep_going``; the content faults of later rows, and what is above a limit in any row, are error rows. ``label`` is
    the dataset's name for messages.

    Raises:
        DatasetFault: names the line and, for the first row, the field.
    """
    from storage.jobs import NewRequest

    for index, row in enumerate(rows):
        if isinstance(row, BadLine):
            if not keep_going:
                raise DatasetFault(
                    f"{label}, line {row.line}: {row.reason}; mend the line, or make it an error row with --keep-going"
                )
            yield NewRequest(
                index=index, row_id=None, payload=None, error=("bad_line", f"line {row.line}: {row.reason}")
            )
            continue
        row_id = None
        try:
            row_id = checked_id(row.fields, spec.limits)
            check_fields(row.fields, spec.limits)
            yield NewRequest(index=index, row_id=row_id, payload=spec.payload(row))
        except RowFault as fault:
            if index == 0 and not keep_going and not fault.is_of_one_row:
                raise DatasetFault(
                    f"{label}, row 0 (line {row.line}): {fault}; rows like it would all fail: mend them, "
                    "or use --keep-going to make them error rows"
                ) from None
            message = f"row {index} (line {row.line}): {fault}"
            yield NewRequest(index=index, row_id=row_id, payload=None, error=(fault.code, message))


def _continuation(row: Row) -> str:
    return _text_field(row, "continuation", "the text whose probability `score` computes")


def _text_field(row: Row, name: str, meaning: str) -> str:
    if row.fields.get(name) is None:
        raise RowFault("missing_field", f"no field {name!r}, {meaning}; there: {_names(row)}")
    value = row.fields[name]
    if not isinstance(value, str):
        raise RowFault("bad_field", f"the field {name!r} is not text; put it in quotes")
    return value


def row_choices(row: Row, limits: Limits) -> tuple[str, ...]:
    """The labels that a row has of its own.

    Raises:
        RowFault: there are none, or they are no such list.
    """
    value = row.fields.get("choices")
    if value is None:
        raise RowFault("missing_field", f"no field 'choices', and no --choices was given; there: {_names(row)}")
    count = value.count(",") + 1 if isinstance(value, str) else len(value) if isinstance(value, list) else 0
    if count > limits.row_choices:
        raise RowFault("over_limit", f"the field 'choices' has {count:,} choices: {limits.told('row_choices')}")
    try:
        if isinstance(value, str):
            return split_choices(value)
        if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
            raise RowFault("bad_field", "the field 'choices' is not a list of texts")
        _check_choices(value)
    except ValueError as error:
        raise RowFault("bad_field", f"the field 'choices': {error}") from None
    return tuple(value)


def _check_choices(choices: Sequence[str]) -> None:
    if any(not choice for choice in choices):
        raise ValueError("a choice is empty; write for example positive,negative")
    if len(choices) < 2:
        raise ValueError(
            f"there {'is only one choice' if choices else 'are no choices'}; write at least two, for example "
            "positive,negative"
        )
    seen: set[str] = set()
    for choice in choices:
        if choice in seen:
            raise ValueError(f"the choice {some_of([choice])!r} is there twice")
        seen.add(choice)


def _names(row: Row) -> str:
    return some_of(row.fields)
