"""`overnight demo`: the whole path on the model and the reviews that are shipped, with nothing else running."""

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.context import App
from cli.display import emit, emit_json, format_rate, format_seconds, say
from cli.job_options import JobOptions
from cli.options import json_option, settings_options
from cli.workers import PRIVATE_QUEUE
from engine.planner.plan import PlanOptions

if TYPE_CHECKING:
    from storage.database import Database
    from storage.jobs import Job

_MODEL_NAME = "reviews"
_PROMPT = "Review: {{ text }}\nSentiment:"
_CHOICES = ("positive", "negative")
_SHOWN_ROWS = 5
_SHOWN_CHARACTERS = 72


@dataclass(frozen=True, slots=True)
class Labelled:
    """A review, what it is, and what the model says it is (None: an error row)."""

    text: str
    truth: str
    label: str | None


@click.command("demo", short_help="The whole path on a model and data of ours.")
@json_option
@settings_options
@click.pass_obj
def command(app: App, as_json: bool) -> None:
    """Label 500 movie reviews with the small model that is shipped: import, enqueue, work and fetch in one."""
    from cli.errors import JobUnfinished
    from cli.reports import job_document, outcome_of
    from cli.serving import work_off

    folder = shipped_folder()
    model_dir = _import_model(app, folder)
    with app.open_database() as database:
        submitted = _enqueue(app, database, folder / "sample.jsonl")
        again = f"overnight run --resume {submitted.id} -o labels.jsonl"
        job = work_off(database, app.settings, submitted, PlanOptions(), resume=again)
        labelled = list(_join(folder / "sample.jsonl", database, job.id)) if job.state == "done" else []
    problem = outcome_of(job)
    if problem:
        raise JobUnfinished(problem)
    correct = sum(row.label == row.truth for row in labelled)
    report = job_document(job, now=0.0)  # it has ended, so the time does not matter
    if as_json:
        result = {"accuracy": correct / len(labelled), "correct": correct, "rows": len(labelled)}
        more = {"throughput": report["throughput"], "seconds": report["seconds"], "tokens": report["tokens"]}
        where = {"job": job.id, "model": str(model_dir), "plan": report["plan"], "database": app.database_name}
        emit_json({**result, **more, **where})
        return
    for line in _lines_for_people(labelled, report, app.database_name):
        emit(line)
    emit(f"accuracy {correct / len(labelled):.3f} ({correct} of {len(labelled)})")


def shipped_folder() -> Path:
    """The Hugging Face folder with the demo's model and its sample.

    Raises:
        FileAbsent: this installation came without it.
    """
    from cli.errors import FileAbsent

    folder = Path(__file__).resolve().parent.parent / "examples" / "reviews"
    for name in ("config.json", "sample.jsonl"):
        if not (folder / name).is_file():
            raise FileAbsent(f"the demo's {folder / name} is missing; install overnight again")
    return folder


def _import_model(app: App, folder: Path) -> Path:
    from cli.import_ import make_model
    from engine.weights.manifest import is_model_dir

    target = app.settings.models_dir / _MODEL_NAME
    if not is_model_dir(target):
        make_model(app, folder, target, None)
    return target


def _enqueue(app: App, database: "Database", sample: Path) -> "Job":
    from cli.submission import prepare
    from storage.jobs import get_job

    options = JobOptions(model=_MODEL_NAME, task="choose", prompt=_PROMPT, choices=_CHOICES)
    submission = prepare(str(sample), options, app.settings)
    job = get_job(database, submission.store(database, f"{PRIVATE_QUEUE}{uuid.uuid4().hex[:8]}"))
    say(f"job {job.id}: {job.num_requests} reviews in {app.database_name}; starting a Redis and a worker for it")
    return job


def _join(sample: Path, database: "Database", job_id: int) -> Iterator[Labelled]:
    from storage.results import stream_outputs

    with sample.open(encoding="utf-8") as lines:
        for line, output in zip(lines, stream_outputs(database, job_id), strict=True):
            row = json.loads(line)
            yield Labelled(row["text"], row["label"], output.output["label"] if output.output else None)


def _lines_for_people(labelled: list[Labelled], report: dict[str, Any], database: str) -> Iterator[str]:
    from cli.plans import plan_in_words

    yield ""
    for row in labelled[:_SHOWN_ROWS]:
        text = " ".join(row.text.split())
        cut = text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
        verdict = "right" if row.label == row.truth else f"wrong, it is {row.truth}"
        yield f"  {row.label:<9} {cut}  ({verdict})"
    yield ""
    speed = format_rate(report["throughput"]["total_per_s"])
    yield f"speed      {speed}; {len(labelled)} reviews in {format_seconds(report['seconds'])}"
    yield f"plan       {plan_in_words(report['plan'])}"
    yield f"database   {database}"
    yield f"next       overnight fetch {report['id']} --format csv -o labels.csv   the labels as a table"
    yield "           overnight models                                the model, ready for your own reviews"
    yield "           overnight run --help                            the same for your dataset and your model"
