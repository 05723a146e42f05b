"""Jobs in words: all about one, and a table of many. Pure, the time is an argument."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import PurePath
from typing import TYPE_CHECKING

from cli.display import format_count, format_rate, format_rows, format_seconds
from cli.reports import job_document, rows_per_s_of

if TYPE_CHECKING:
    from storage.jobs import Job

_SHOWN_LINES = 3
_SHOWN_CHARACTERS = 100
_INDENT = " " * 12


def describe(job: "Job", now: float, *, is_attended: bool = True) -> list[tuple[str, str]]:
    """Names and values, in the order in which people ask. ``is_attended``: see `cli.reports.job_document`."""
    from cli.plans import plan_in_words

    document = job_document(job, now, is_attended=is_attended)
    counts, origin = document["requests"], job.origin or {}
    lines = [("job", str(job.id))]
    if job.name:
        lines.append(("name", job.name))
    lines += [
        ("state", f"{job.state}" + (f": {job.message}" if job.message else "")),
        ("model", job.model),
        ("task", job.task),
    ]
    if origin.get("dataset"):
        lines.append(("dataset", origin["dataset"]))
    if origin.get("prompt"):
        lines.append(("prompt", shortened(origin["prompt"])))
    if origin.get("choices"):
        lines.append(("choices", ", ".join(origin["choices"])))
    lines.append(("queue", f"{job.queue}, priority {job.priority}"))
    if job.exact:
        lines.append(("exact", "only workers that round nothing to four bits take it"))
    if job.plan:
        lines.append(("plan", plan_in_words(job.plan)))
    lines += [
        ("requests", f"{counts['done']:,} done, {counts['failed']:,} failed, {counts['total']:,} in all"),
        ("tokens", f"{job.prompt_tokens:,} prompt, {job.generated_tokens:,} generated"),
    ]
    times = (("created", job.created_at), ("started", job.started_at), ("finished", job.finished_at))
    lines += [(name, format_time(moment)) for name, moment in times if moment is not None]
    lines += [("time", format_seconds(document["seconds"]))]
    if is_attended or job.is_finished:
        lines.append(("throughput", throughput_of(job, now)))
    if document["eta_s"]:
        lines.append(("left", f"about {format_seconds(document['eta_s'])}"))
    return lines


def throughput_of(job: "Job", now: float) -> str:
    """Generated tokens where that is the work; elsewhere rows."""
    speed = job_document(job, now)["throughput"]
    total = format_rate(speed["total_per_s"])
    if job.task == "generate":
        return f"{format_rate(speed['generated_per_s'])} generated, {total} in all"
    return f"{format_rows(rows_per_s_of(job, now))}, {total}"


def jobs_table(jobs: "Sequence[Job]", now: float) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Headings and rows; a column of names only where a job has one."""
    headings = ["JOB", "STATE", "DONE", "FAILED", "TOTAL", "PRIORITY", "AGE", "TASK", "DATASET", "MODEL"]
    rows = [_cells(job, now) for job in jobs]
    if any(job.name for job in jobs):
        headings.insert(1, "NAME")
        for job, row in zip(jobs, rows, strict=True):
            row.insert(1, job.name or "-")
    return headings, list[Sequence[str]](rows)


def _cells(job: "Job", now: float) -> list[str]:
    counts = [format_count(number) for number in (job.num_done, job.num_failed, job.num_requests)]
    dataset = (job.origin or {}).get("dataset")
    file = PurePath(dataset).name if dataset else "-"
    return [str(job.id), str(job.state), *counts, str(job.priority), format_age(now - job.created_at), job.task, file,
            job.model]  # fmt: skip


def format_age(seconds: float) -> str:
    """In the largest unit that fits: ``12 s``, ``5 min``, ``3 h``, ``2 d``."""
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{int(seconds // unit)} {name}"
    return f"{max(0, int(seconds))} s"


def format_time(moment: float) -> str:
    """In the local time of this machine: ``2026-03-01 23:10:05``."""
    return datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M:%S")


def shortened(template: str) -> str:
    """Its first lines, the later ones below the first, with a sign where something is left out."""
    lines = template.splitlines()
    shown = [
        line if len(line) <= _SHOWN_CHARACTERS else f"{line[: _SHOWN_CHARACTERS - 1]}…" for line in lines[:_SHOWN_LINES]
    ]
    if len(lines) > _SHOWN_LINES:
        shown.append("…")
    return f"\n{_INDENT}".join(shown)
