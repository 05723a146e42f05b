"""The engine's public face: load a model once, run requests through it, close it."""

import math
from collections.abc import Callable, Container, Generator, Hashable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Self

from engine.attention.self_test import check_attention
from engine.devices.open import open_device
from engine.dtypes import DType
from engine.errors import EngineError
from engine.executor import Executor
from engine.memory.closing import run_all
from engine.memory.device import Device
from engine.memory.memory import Memory
from engine.memory.tier import Tier
from engine.memory.traffic import Span
from engine.model.family import EMBED
from engine.model.registry import family_for
from engine.model.sampling import NOT_FINITE
from engine.planner.cost import PassModel
from engine.planner.load import load_of
from engine.planner.plan import Plan
from engine.request import Output, Request
from engine.schedule.balance import Balance
from engine.schedule.passes import Pass, PassReport, PassStats
from engine.schedule.scheduler import Scheduler
from engine.sequence import Sequence
from engine.stage import Stage
from engine.tasks import InProgress, begin, rejected
from engine.tiers import TierName
from engine.tokenizer import Tokenizer
from engine.trace import Recorder
from engine.units import format_bytes
from engine.weights.checks import check_dtype, check_tokens, check_units
from engine.weights.files import WeightFiles
from engine.weights.manifest import TOKENIZER_NAME, read_manifest

REJECTIONS_A_PASS = 256
_WITH_MORE_RANGE = {
    DType.FLOAT16: "give the worker --dtype bfloat16 or float32, or import the model anew if they are not in float32, "
    "either",
    DType.BFLOAT16: "give the worker --dtype float32, or import the model anew if they are not in that, either",
    DType.FLOAT32: "its weights are at fault: import the model anew, from a checkpoint that is sound",
}
"""What to do about logits that are not finite, by the number type they are not finite in."""


class Engine:
    """One model over the tiers of one machine. Not thread-safe: one thread runs it."""

    def __init__(
        self, tokenizer: Tokenizer, stage: Stage, recorder: Recorder | None, expects: PassModel | None
    ) -> None:
        """Use ``Engine.load``. The stage and its memory are the engine's to close from now on."""
        self.plan: Plan = stage.plan
        self._tokenizer, self._stage, self._recorder, self._expects = tokenizer, stage, recorder, expects
        self._memory = stage.memory
        self._closers: list[Callable[[], None]] = [self._memory.close, stage.close]
        self._executor = Executor(stage)
        self._kv = stage.attention.cache(fills_together=self.plan.kv_fills_together)
        self._scheduler = Scheduler(
            self._kv,
            micro_batch=self.plan.micro_batch,
            micro_batches=self.plan.micro_batches,
            prefill_chunk=self.plan.prefill_chunk,
            by_block=self.plan.schedule == "block",
            host_attends=self.plan.host_attention,
        )
        self._balance = Balance()
        self._running: dict[Sequence, InProgress] = {}
        self._in_use = False
        self._broken = False
        self._loaded_bytes = self._memory.traffic.take().weight_bytes

    @classmethod
    def load(
        cls,
        model_dir: Path,
        plan: Plan,
        *,
        device: Device | None = None,
        recorder: Recorder | None = None,
        expects: PassModel | None = None,
    ) -> "Engine":
        """Place a model directory's weights over the tiers, and keep them until ``close``.

        Args:
            model_dir: made by ``overnight import``.
            plan: what goes where; see ``engine.loading`` for how one is made.
            device: an open device to use (and close) instead of the one that the plan names.
            recorder: is told what the lanes and passes do; stays the caller's to close.
            expects: predicts each pass, for its report.

        Raises:
            CheckpointError: the model directory is absent, half-written or damaged.
            DeviceUnavailable: there is no such device, or its attention is wrong.
            TierFull: the machine has less than the plan's budgets promise.
        """
        start = perf_counter()
        device = device or open_device(plan.device)
        closers = [device.close]
        try:
            manifest = read_manifest(model_dir)
            check_units(manifest, model_dir)
            check_dtype(manifest, plan.dtype, model_dir)
            family = family_for(manifest.config)
            tokenizer = Tokenizer.of_model(model_dir / TOKENIZER_NAME, family.shape)
            check_tokens(tokenizer, family.shape, model_dir)
            check_attention(device, plan.dtype, family.shape)
            device.limit_memory(plan.budgets[TierName.DEVICE])
            memory = Memory(device, plan.budgets, plan.disk_dir, recorder)
            closers = [memory.close]
            stage = Stage(WeightFiles(model_dir, manifest), family, plan, memory)
            closers.append(stage.close)
            engine = cls(tokenizer, stage, recorder, expects)
        except BaseException:
            with suppress(Exception):  # what went wrong first is what matters
                run_all([device.synchronize, *reversed(closers)])
            raise
        if recorder is not None:
            recorder.loaded((start, perf_counter()))
        return engine

    @property
    def tiers(self) -> dict[TierName, Tier]:
        """What is held of each budget, and was at most."""
        return self._memory.tiers

    def run(self, requests: Iterable[Request]) -> Iterator[Output]:
        """Outputs as sequences finish, in any order; requests are pulled as room appears.

        Raises:
            EngineError: a tier, a lane or the device failed; the engine must be closed.
        """
        for report in self.passes(iter(requests)):
            yield from report.outputs

    def passes(self, requests: Iterator[Request | None]) -> Generator[PassReport, None, None]:
        """``run``, one report a pass, so that the caller is asked after every pass.

        ``requests`` may yield ``None`` for "nothing at the moment": it is asked again after the next pass, and the run
        ends when it does so while nothing is running. Closing this generator drops whatever is unfinished.

        Raises:
            EngineError: a tier, a lane or the device failed; the engine must be closed.
        """
        if self._in_use or self._broken:
            raise EngineError("the engine is already running, closed, or a run has failed: close it and load it again")
        self._in_use = True
        scheduler = self._scheduler
        rejections: list[Output] = []

        def pull() -> list[Sequence] | None:
            # Rejected requests take no room: without a limit, one pass would pull as many as there are.
            request = next(requests, None) if len(rejections) < REJECTIONS_A_PASS else None
            if request is None:
                return None
            started = begin(request, self._tokenizer, self._stage.family.shape)
            if isinstance(started, Output):
                rejections.append(started)
                return []
            largest = max(started.sequences, key=lambda sequence: sequence.num_kv_tokens)
            if scheduler.needs_kv(largest) and largest.num_kv_tokens > self._kv.largest_sequence:
                rejections.append(self._no_room(request, largest))
                return []
            self._running.update((sequence, started) for sequence in started.sequences)
            return list(started.sequences)

        try:
            while True:
                start = perf_counter()
                this_pass = scheduler.next_pass(pull, self._balance.prompt_tokens)
                if not this_pass.micro_batches and (stuck := scheduler.stuck()) is not None:
                    rejections.append(self._reject_stuck(stuck))
                elif not this_pass.micro_batches and not rejections:
                    return
                outputs = self._compute(this_pass) if this_pass.micro_batches else []
                outputs += rejections
                rejections.clear()
                if scheduler.is_idle:
                    self._stage.settle()
                stats = self._stats(this_pass, (start, perf_counter()))
                if this_pass.micro_batches:
                    self._balance.learn(stats)
                yield PassReport(tuple(outputs), stats)
        finally:
            for sequence in list(self._running):
                self._retire(sequence)
            self._in_use = False

    def drop(self, keys: Container[Hashable]) -> int:
        """Between passes: forget the requests with these keys; how many there were."""
        dropped = [progress for progress in set(self._running.values()) if progress.request.key in keys]
        for progress in dropped:
            self._retire_all(progress)
        return len(dropped)

    def close(self) -> None:
        """Free every byte and end the lanes. A second call does nothing.

        Raises:
            EngineError: the device or a lane failed meanwhile; everything was closed all the same.
        """
        self._broken = True
        closers, self._closers = self._closers, []
        if closers:
            # No memory is freed while a copy under way may still use it.
            run_all([self._memory.device.synchronize, *reversed(closers)])

    def check_integrity(self) -> None:
        """Raise ``EngineError`` if a tier's books do not add up."""
        self._memory.check_integrity()
        self._kv.check_integrity()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _compute(self, this_pass: Pass) -> list[Output]:
        self._broken = True  # unless the pass comes to its end
        self._memory.traffic.computes(EMBED)
        found = self._executor.run(this_pass)
        self._memory.traffic.computes(None)
        self._broken = False
        self._scheduler.completed(this_pass)
        outputs = []
        for result in found.results:
            sequence = result.segment.sequence
            progress = self._running.get(sequence)
            if progress is None:  # dropped while it was computed
                continue
            if result.next_token == NOT_FINITE or not all(math.isfinite(logprob) for logprob, _ in result.scores):
                self._retire_all(progress)
                outputs.append(self._not_finite(progress.request))
                continue
            progress.advance(sequence, result.next_token, result.scores)
            if sequence.finished:
                self._scheduler.retire(sequence)
                if all(each.finished for each in progress.sequences):
                    self._retire_all(progress)
                    outputs.append(progress.output())
        return outputs

    def _reject_stuck(self, sequence: Sequence) -> Output:
        progress = self._running[sequence]
        self._retire_all(progress)
        return self._no_room(progress.request, sequence)

    def _no_room(self, request: Request, sequence: Sequence) -> Output:
        return rejected(
            request,
            "no_room",
            f"a sequence of up to {sequence.max_tokens} tokens does not fit into the KV cache, which holds "
            f"{self._kv.largest_sequence} ({format_bytes(sum(self.plan.kv_bytes.values()))}); "
            "give the worker more memory (--device-memory, --host-memory) or ask for fewer new tokens",
        )

    def _not_finite(self, request: Request) -> Output:
        return rejected(
            request,
            "not_finite",
            f"the model's logits are not finite numbers in {self.plan.dtype}; {_WITH_MORE_RANGE[self.plan.dtype]}",
        )

    def _retire_all(self, progress: InProgress) -> None:
        for sequence in progress.sequences:
            self._retire(sequence)

    def _retire(self, sequence: Sequence) -> None:
        self._scheduler.retire(sequence)
        self._running.pop(sequence, None)

    def _stats(self, this_pass: Pass, span: Span) -> PassStats:
        segments = this_pass.segments
        decode = sum(segment.is_decode for segment in segments)
        moved = self._memory.traffic.take()
        loaded, self._loaded_bytes = self._loaded_bytes, 0
        stats = PassStats(
            seconds=span[1] - span[0],
            prefill_tokens=sum(segment.length for segment in segments) - decode,
            decode_tokens=decode,
            num_sequences=len({segment.sequence for segment in segments}),
            num_waiting=self._scheduler.num_waiting,
            lane_bytes=moved.num_bytes,
            lane_seconds=moved.seconds,
            weight_bytes=moved.weight_bytes + loaded,
            bound_by=moved.busiest,
            expected=self._expects.cost(load_of(segments)) if self._expects and segments else None,
        )
        if self._recorder is not None:
            self._recorder.passed(span, stats)
        return stats
