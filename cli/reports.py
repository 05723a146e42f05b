"""The numbers people and machines see of a job and of a worker; pure, the time is an argument."""

from typing import TYPE_CHECKING, Any

from cli.display import counted

if TYPE_CHECKING:
    from storage.claims import Worker
    from storage.jobs import Job


def seconds_of(job: "Job", now: float) -> float:
    """How long the job has run, or ran; 0 before its first request was claimed."""
    if job.started_at is None:
        return 0.0
    return max(0.0, (now if job.finished_at is None else job.finished_at) - job.started_at)


def eta_of(job: "Job", now: float) -> float | None:
    """Seconds until the end if it goes on as it did so far; None where nothing tells."""
    if job.is_finished:
        return 0.0
    ended = job.num_done + job.num_failed
    seconds = seconds_of(job, now)
    if ended == 0 or seconds == 0:
        return None
    return (job.num_requests - ended) * seconds / ended


def rows_per_s_of(job: "Job", now: float) -> float:
    """Requests that ended in a second, errors included; 0 before the first request was claimed."""
    seconds = seconds_of(job, now)
    return (job.num_done + job.num_failed) / seconds if seconds else 0.0


def job_document(job: "Job", now: float, *, is_attended: bool = True) -> dict[str, Any]:
    """A job in the shape of the contract; tokens, seconds and tokens per second, times in unix seconds.

    ``is_attended``: somebody works on it, so that how fast it was says when it will end.
    """
    seconds = seconds_of(job, now)
    total_tokens = job.prompt_tokens + job.generated_tokens
    eta = eta_of(job, now) if is_attended or job.is_finished else None
    origin = job.origin or {}
    return {
        "id": job.id,
        "name": job.name,
        "state": str(job.state),
        "message": job.message,
        "model": job.model,
        "task": job.task,
        "exact": job.exact,
        "dataset": origin.get("dataset"),
        "prompt": origin.get("prompt"),
        "choices": origin.get("choices"),
        "plan": job.plan,
        "formats": _formats_of(job),
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
        "requests": {"total": job.num_requests, "done": job.num_done, "failed": job.num_failed},
        "tokens": {"prompt": job.prompt_tokens, "generated": job.generated_tokens},
        "seconds": round(seconds, 3),
        "throughput": {
            "generated_per_s": round(job.generated_tokens / seconds, 3) if seconds else 0.0,
            "total_per_s": round(total_tokens / seconds, 3) if seconds else 0.0,
        },
        "eta_s": None if eta is None else round(eta, 1),
    }


def _formats_of(job: "Job") -> dict[str, str] | None:
    """How weights and KV cache were stored, and what was computed with; a plan of before had plain ones alone."""
    if job.plan is None:
        return None
    names = (("weights", "weight_format"), ("kv", "kv_format"))
    return {**{name: job.plan.get(key, "plain") for name, key in names}, "dtype": job.plan["dtype"]}


def worker_document(worker: "Worker", *, crashes: int = 0) -> dict[str, Any]:
    """A live worker; times are unix seconds. ``crashes``: faults of its machine since all went well."""
    return {
        "id": worker.id,
        "hostname": worker.hostname,
        "pid": worker.pid,
        "queue": worker.queue,
        "device": worker.device,
        "model": worker.model,
        "state": worker.state,
        "message": worker.message,
        "retry_at": worker.retry_at,
        "crashes": crashes,
        "started_at": worker.started_at,
        "heartbeat_at": worker.heartbeat_at,
    }


def outcome_of(job: "Job") -> str | None:
    """Why a finished job is not what was hoped for, and what to do; None if all is well."""
    if job.state == "failed":
        reason = job.message or "no reason was recorded"
        return f"job {job.id} failed: {reason}; when that is mended: overnight retry {job.id}"
    if job.state == "cancelled":
        return f"job {job.id} was cancelled; to take it up again: overnight retry {job.id}"
    if job.num_failed:
        return (
            f"job {job.id} has {counted(job.num_failed, 'failed request')} of {job.num_requests:,}; "
            f"see them: overnight fetch {job.id} --errors"
        )
    return None
