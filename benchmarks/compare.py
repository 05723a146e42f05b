"""The comparison: ours and the peers in turn, each measurement in a process of its own."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from benchmarks.bound import COMPUTE, Limits, PassWork, bound_of, raised
from benchmarks.caps import Cap, CapUnavailable, cap
from benchmarks.checkpoints import Checkpoint
from benchmarks.jobs import Finished, Job, JobFailed, measure, measure_in_slices
from benchmarks.shapes import Flops, shape_of
from benchmarks.workload import Range, Work, Workload
from engine.units import div_ceil

Say = Callable[[str], None]
BATCHES_TIMED = 2
PLAIN = "plain"
"""A peer that is ours, with nothing in four bits."""


@dataclass(frozen=True, slots=True)
class Ours:
    """Medians over the repetitions."""

    tok_s: float
    peak_bytes: int
    bound_fraction: float
    peak_fraction: float
    bound_by: str
    tok_s_each: tuple[float, ...]
    budget_bytes: int
    """The plan's budgets, device and host together."""
    num_passes: int


@dataclass(frozen=True, slots=True)
class PeerResult:
    """A peer at its best batch size; no figures where it could not run."""

    tok_s: float | None
    batch: int | None
    error: str | None
    tok_s_each: tuple[float, ...] = ()
    num_requests: int = 0
    """That were timed."""
    failed: tuple[str, ...] = ()
    """Batch sizes that could not run, and why."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that one call found out."""

    limits: Limits
    ours: Ours
    peers: dict[str, PeerResult]
    tokens_agree: bool | None
    """``None``: there was no peer to compare with."""
    disagreements: tuple[str, ...]
    cap_missing: str | None
    """Why a cap that was asked for could not be enforced."""

    @property
    def ratio(self) -> dict[str, float | None]:
        """Ours over each peer."""
        return {name: self.ours.tok_s / peer.tok_s if peer.tok_s else None for name, peer in self.peers.items()}


class Runner:
    """Starts measuring processes, each in a memory group of its own if there is a cap."""

    def __init__(self, memory_cap: int | None, timeout_s: float, say: Say) -> None:
        self.memory_cap = memory_cap
        self.cap_missing: str | None = None
        self._timeout_s = timeout_s
        self._say = say
        if memory_cap is not None:
            try:
                with cap(memory_cap):
                    pass
            except CapUnavailable as error:
                self.cap_missing = str(error)
                say(f"the memory cap is NOT enforced: {error}")

    def run_in_slices(self, jobs: Sequence[Job], limits: Job | None, what: str) -> tuple[list[Finished], Finished]:
        """Measurements beside each other, with the rate of products beside the first."""
        self._say(what)
        found, rate = measure_in_slices(jobs, limits, timeout_s=self._timeout_s)
        for each in found:
            if each.error:
                self._say(f"  {each.error}")
        return found, rate

    def run(self, job: Job, what: str) -> Finished:
        """One measurement."""
        self._say(what)
        with contextlib.ExitStack() as stack:
            group: Cap | None = None
            if self.memory_cap is not None and self.cap_missing is None:
                group = stack.enter_context(cap(self.memory_cap))
            finished = measure(replace(job, memory_cap=self.memory_cap), group, timeout_s=self._timeout_s)
        if finished.error:
            self._say(f"  {finished.error}")
        return finished


def compare(
    runner: Runner,
    job: Job,
    *,
    small: Checkpoint | None,
    peers: tuple[str, ...],
    batches: tuple[int, ...],
    repeat: int,
    in_slices: bool,
    say: Say,
) -> Comparison:
    """Everything, in turn.

    Args:
        runner: starts the processes.
        job: ours; what the peers are asked is derived from it.
        small: a float32 checkpoint to compare tokens on; ``None``: they are not compared.
        peers: names of ``peers.PEERS``.
        batches: sizes from which each peer takes its best.
        repeat: how often everything is timed.
        in_slices: all at the same time, in slices, rather than one after another.
        say: told what happens.

    Raises:
        JobFailed: ours could not run.
    """
    wrong = _disagreements(runner, job, small, peers) if small else ()
    if job.weights == "planned":
        job = replace(job, profile=_profile(runner, job))
    # Plain weights run as ours do, all requests at once.
    best = {
        peer: PeerResult(None, job.num_requests, None)
        if peer == PLAIN
        else _best_batch(runner, job, peer, batches, in_slices=in_slices)
        for peer in peers
    }
    limits: list[Limits] = []
    ours: list[Finished] = []
    timed: dict[str, list[Finished]] = {peer: [] for peer in peers}
    peer_jobs = {
        peer: _peer_job(
            job, peer, result.batch, div_ceil(job.num_requests, result.batch) if in_slices else BATCHES_TIMED
        )
        for peer, result in best.items()
        if result.batch is not None
    }
    for turn in range(1, repeat + 1):
        mine, theirs, found = _measured(runner, job, peer_jobs, f"{turn} of {repeat}", in_slices=in_slices)
        limits.append(Limits(found.of("alone"), found.of("busy")))
        ours.append(mine)
        say(f"  {mine.of('num_tokens') / mine.of('seconds'):.2f} token/s")
        for peer, each in zip(peer_jobs, theirs, strict=True):
            timed[peer].append(each)
    best_limits = Limits.best(limits)
    return Comparison(
        limits=best_limits,
        ours=_ours(job, ours, limits if in_slices else [best_limits] * repeat),
        peers={peer: _peer_result(best[peer], peer_jobs.get(peer), timed[peer]) for peer in peers},
        tokens_agree=not wrong if small and peers else None,
        disagreements=wrong,
        cap_missing=runner.cap_missing,
    )


def _profile(runner: Runner, job: Job) -> dict[str, object]:
    found = runner.run(replace(job, role="profile"), "measuring the machine for the planner")
    if found.result is None:
        raise JobFailed(f"the machine could not be measured: {found.error}")
    return found.result


def _measured(
    runner: Runner, job: Job, peers: Mapping[str, Job], turn: str, *, in_slices: bool
) -> tuple[Finished, list[Finished], Finished]:
    """Ours, each of the peers, and the limits, once."""
    probe = replace(job, role="limits", num_requests=1)
    if in_slices:
        what = f"in slices, {turn}: ours, {', '.join([*map(_called, peers), 'products'])}"
        (ours, *theirs), found = runner.run_in_slices([job, *peers.values()], probe, what)
        return ours, theirs, found
    found = runner.run(probe, f"measuring limits, {turn}")
    ours = runner.run(job, f"ours, {turn}: {job.num_requests} requests")
    # Without ours there is nothing to compare with.
    ours.of("seconds")
    theirs = [
        runner.run(asked, f"{_called(peer)}, {turn}: {asked.num_requests} requests") for peer, asked in peers.items()
    ]
    return ours, theirs, found


def _peer_job(job: Job, peer: str, batch: int, num_batches: int) -> Job:
    if peer == PLAIN:
        assert job.plain_dir is not None
        return replace(job, model_dir=job.plain_dir, kv_format=None)
    return replace(job, role=peer, batch=batch, num_requests=batch * num_batches)


def _called(peer: str) -> str:
    return "ours with plain weights and KV cache" if peer == PLAIN else peer


def _best_batch(runner: Runner, job: Job, peer: str, batches: tuple[int, ...], *, in_slices: bool) -> PeerResult:
    """The fastest size on one batch each; with a single size there is nothing to find out."""
    if len(batches) == 1:
        return PeerResult(None, batches[0], None)
    speeds: dict[int, float] = {}
    failed = []
    asked = [_peer_job(job, peer, batch, 1) for batch in batches]
    if in_slices:
        tried, _ = runner.run_in_slices(
            asked, None, f"{peer}: which of {', '.join(map(str, batches))} is its best batch?"
        )
    else:
        tried = [runner.run(each, f"{peer}: is {each.batch} its best batch?") for each in asked]
    for batch, found in zip(batches, tried, strict=True):
        if found.error is None:
            speeds[batch] = found.of("num_tokens") / found.of("seconds")
        else:
            failed.append(f"batch {batch}: {found.error}")
    if not speeds:
        return PeerResult(None, None, "; ".join(failed), failed=tuple(failed))
    return PeerResult(None, max(speeds, key=lambda each: speeds[each]), None, failed=tuple(failed))


def _peer_result(best: PeerResult, asked: Job | None, runs: list[Finished]) -> PeerResult:
    errors = [run.error for run in runs if run.error]
    if asked is None or not runs:
        return best
    if errors:
        return replace(best, error=f"batch {best.batch}: {errors[0]}")
    each = tuple(run.of("num_tokens") / run.of("seconds") for run in runs)
    return replace(best, tok_s=median(each), tok_s_each=each, num_requests=asked.num_requests)


def _ours(job: Job, runs: list[Finished], limits: list[Limits]) -> Ours:
    work = job.workload.work(job.items(), Flops.of(shape_of(job.shape)))
    for run in runs:
        _check(run, work)
    seconds = [float(run.of("seconds")) for run in runs]
    passes = [_passes(run, work) for run in runs]
    limits = [raised(limit, each, taken) for limit, each, taken in zip(limits, passes, seconds, strict=True)]
    bounds = [bound_of(each, limit) for each, limit in zip(passes, limits, strict=True)]
    speeds = tuple(work.num_out / taken for taken in seconds)
    peaks = [limit.alone[COMPUTE] for limit in limits]
    return Ours(
        tok_s=median(speeds),
        peak_bytes=int(median(run.of("peak_bytes") for run in runs)),
        bound_fraction=median(bound.seconds / taken for bound, taken in zip(bounds, seconds, strict=True)),
        peak_fraction=median(work.flops / (taken * peak) for taken, peak in zip(seconds, peaks, strict=True)),
        bound_by=bounds[-1].lane,
        tok_s_each=speeds,
        budget_bytes=sum(runs[-1].of("plan")["budgets"][tier] for tier in ("device", "host")),
        num_passes=len(runs[-1].of("passes")),
    )


def _passes(run: Finished, work: Work) -> list[PassWork]:
    return [
        PassWork(each["lane_bytes"], work.pass_flops(each["prefill_tokens"], each["decode_tokens"]), each["unpacked"])
        for each in run.of("passes")
    ]


def _check(run: Finished, work: Work) -> None:
    """That the passes computed exactly what the bound is made of."""
    passes = run.of("passes")
    tokens = sum(each["prefill_tokens"] + each["decode_tokens"] for each in passes)
    expected = work.prefill_tokens + work.decode_tokens
    if run.of("num_tokens") != work.num_out or tokens != expected:
        raise JobFailed(
            f"ours gave {run.of('num_tokens')} tokens of {work.num_out} and computed {tokens} of {expected}: "
            "the run is not what was asked for"
        )


def _disagreements(runner: Runner, job: Job, small: Checkpoint, peers: tuple[str, ...]) -> tuple[str, ...]:
    """Greedy tokens in float32 on a small shape, prompts of several lengths in one batch: where a peer's differ."""
    if not peers:
        return ()
    tiny = Workload(task="generate", prompt=Range(3, 60), out=Range(8, 24), vocabulary=shape_of("tiny").vocab_size)
    ours = replace(
        job, shape="tiny", dtype="float32", folder=str(small.folder), model_dir=str(small.model_dir), workload=tiny,
        num_requests=6, batch=6, keep_tokens=True, device_memory=None, micro_batch=None, micro_batches=None,
    )  # fmt: skip
    ours = replace(ours, plain_dir=None, kv_format=None, disk_rate=None)
    expected = runner.run(ours, "comparing greedy tokens in float32 on a small shape: ours").of("tokens")
    wrong = []
    for peer in (each for each in peers if each != PLAIN):
        found = runner.run(replace(ours, role=peer), f"comparing greedy tokens: {peer}")
        if found.error:
            wrong.append(f"{peer}: {found.error}")
        elif found.of("tokens") != expected:
            wrong.append(f"{peer}: other tokens than ours")
    return tuple(wrong)
