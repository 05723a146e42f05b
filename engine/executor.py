"""Runs one pass over the layers: the one loop. Weights are streamed once, whatever the pass carries."""

from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.formats.linear import padded_rows
from engine.kvcache.segments import MicroBatch, Segment
from engine.memory.device import Device
from engine.memory.tensors import torch_dtype
from engine.model.family import Layer, resume_layer
from engine.model.sampling import next_tokens, score_tokens, uniform
from engine.schedule.passes import Pass
from engine.stage import Stage


@dataclass(frozen=True, slots=True)
class SegmentResult:
    """What a pass found out about one sequence."""

    segment: Segment
    next_token: int | None
    """The token that follows a generation's last one."""
    scores: tuple[tuple[float, bool], ...]
    """(log-probability, whether greedy) of the targets that this segment's rows predict."""


@dataclass(frozen=True, slots=True)
class StageOutput:
    """What a stage found out, or hands on."""

    results: list[SegmentResult]
    """Behind the head: of the segments with rows that were wanted."""
    hidden: list[Tensor]
    """Without it: each micro-batch's hidden states on the device, ``[tokens, D]``, for the next stage."""


class Executor:
    """Carries out passes on a stage; owns nothing but the order of things."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._family = stage.family
        self._device = stage.memory.device
        self._weights = stage.weights
        self._attention = stage.attention
        self._activations = stage.activations
        self._dtype = torch_dtype(stage.plan.dtype)

    @torch.inference_mode()
    def run(self, this_pass: Pass, arriving: Sequence[Tensor] = ()) -> StageOutput:
        """Compute a pass.

        Args:
            this_pass: what is computed.
            arriving: the hidden states of each micro-batch, from the stage before; none where this one embeds.

        Raises:
            EngineError: a tier, a lane or the device failed.
        """
        with self._device.computing():
            return self._run(this_pass, arriving)

    def _run(self, this_pass: Pass, arriving: Sequence[Tensor]) -> StageOutput:
        stage, batches = self._stage, this_pass.micro_batches
        wanted = [not stage.has_head or any(segment.rows for segment in batch.segments) for batch in batches]
        self._attention.begin(batches, this_pass.moves)
        self._activations.begin([self._num_rows(batch) for batch in batches], len(stage.layers), wanted)
        positions = [self._positions(batch) for batch in batches]
        for index, batch in enumerate(batches):
            with self._activations.enter(index) as hidden_TD:
                if stage.has_embedding:
                    hidden_TD.copy_(self._embed(batch, positions[index]))
                else:
                    hidden_TD[: batch.num_tokens].copy_(arriving[index])
                    hidden_TD[batch.num_tokens :] = 0
        prepared = [self._family.prepare(positions_T, self._dtype) for positions_T in positions]
        self._run_layers(prepared)
        found, hidden = _Found(), list[Tensor]()
        for index, batch in enumerate(batches):
            if wanted[index]:
                with self._activations.enter(index) as hidden_TD:
                    if stage.has_head:
                        self._finish(batch, hidden_TD, found)
                    else:
                        hidden.append(hidden_TD[: batch.num_tokens].clone())
        return StageOutput(found.results(self._device) if found.owners else [], hidden)

    def _run_layers(self, prepared: Sequence[Tensor]) -> None:
        """Layer after layer, each micro-batch in turn. Where attention asks for it, the next one is started before one
        is finished, across the border of a layer, too: it has something to compute beside the host's part.
        """
        ahead = self._attention.ahead if len(prepared) > 1 else 0
        paused: deque[_Paused] = deque()
        try:
            for layer, number in enumerate(self._stage.layers):
                if not self._weights.opens_two:
                    self._finish_layers(paused, 0)
                opened = ExitStack()
                weights = opened.enter_context(self._weights.layer(number))
                for index, each in enumerate(prepared):
                    entered = ExitStack()
                    hidden_TD = entered.enter_context(self._activations.enter(index))
                    at_work = self._family.layer(weights, hidden_TD, each)
                    self._attention.start(layer, index, next(at_work))
                    if index == len(prepared) - 1:
                        entered.push(opened)  # its layer is over with it
                    paused.append(_Paused(at_work, hidden_TD, entered))
                    self._finish_layers(paused, ahead)
            self._finish_layers(paused, 0)
        finally:
            for one in paused:
                one.at_work.close()

    def _finish_layers(self, paused: "deque[_Paused]", most: int) -> None:
        """Finish those that were started first, until no more than ``most`` are left."""
        while len(paused) > most:
            one = paused.popleft()
            after_TD = resume_layer(one.at_work, [self._attention.finish()])
            if after_TD.data_ptr() != one.hidden_TD.data_ptr():
                one.hidden_TD.copy_(after_TD)
            one.entered.close()

    def _embed(self, batch: MicroBatch, positions_T: Tensor) -> Tensor:
        token_ids: list[int] = []
        for segment in batch.segments:
            token_ids += segment.sequence.tokens[segment.start : segment.start + segment.length]
        return self._family.embed(self._weights.embedding(), self._row_numbers(batch, token_ids), positions_T)

    def _positions(self, batch: MicroBatch) -> Tensor:
        positions: list[int] = []
        for segment in batch.segments:
            positions += range(segment.start, segment.start + segment.length)
        return self._row_numbers(batch, positions)

    def _row_numbers(self, batch: MicroBatch, numbers: list[int]) -> Tensor:
        """One number a row, on the device: int64; 0 in rows of padding."""
        padding = [0] * (self._num_rows(batch) - len(numbers))
        return self._device.upload(torch.tensor(numbers + padding, dtype=torch.int64))

    def _num_rows(self, batch: MicroBatch) -> int:
        """Rows of a micro-batch's hidden states: its tokens, and rows after them that nobody looks at."""
        return self._padded(batch.num_tokens, self._stage.plan.micro_batch)

    def _padded(self, num_rows: int, most: int) -> int:
        return min(padded_rows(num_rows, self._dtype, self._device.torch_device), most)

    def _finish(self, batch: MicroBatch, hidden_TD: Tensor, found: "_Found") -> None:
        """Head and selection, in chunks of rows so that logits stay within the workspace."""
        wanted: list[int] = []
        owners: list[tuple[Segment, int]] = []
        begin = 0
        for segment in batch.segments:
            for row in segment.rows:
                wanted.append(begin + row)
                owners.append((segment, segment.start + row))
            begin += segment.length
        most = self._stage.plan.logits_rows
        embedding = self._weights.embedding() if self._family.head_needs_embedding() else None
        for first in range(0, len(wanted), most):
            chunk = wanted[first : first + most]
            rows = chunk + [0] * (self._padded(len(chunk), most) - len(chunk))
            rows_RD = hidden_TD[self._device.upload(torch.tensor(rows, dtype=torch.int64))]
            logits_RV = self._family.head(self._weights.head(), embedding, rows_RD)[: len(chunk)]
            self._select(logits_RV, owners[first : first + most], found)

    def _select(self, logits_RV: Tensor, owners: list[tuple[Segment, int]], found: "_Found") -> None:
        """Sample the rows of generations, score those of given tokens."""
        scored = [row for row, (segment, _) in enumerate(owners) if segment.sequence.is_scored]
        sampled = [row for row, (segment, _) in enumerate(owners) if not segment.sequence.is_scored]
        if scored:
            targets = torch.tensor([owners[row][0].sequence.tokens[owners[row][1] + 1] for row in scored])
            logprobs, greedy = score_tokens(self._rows(logits_RV, scored), self._device.upload(targets))
            found.add([owners[row][0] for row in scored], logprobs, greedy)
        if sampled:
            params, numbers = [], []
            for row in sampled:
                sequence = owners[row][0].sequence
                assert sequence.sampling is not None
                step = len(sequence.tokens) - sequence.num_prompt_tokens
                greedy_row = sequence.sampling.temperature == 0
                numbers.append(0.0 if greedy_row else uniform(sequence.sampling.seed, sequence.sample_index, step))
                params.append(sequence.sampling)
            tokens = next_tokens(self._rows(logits_RV, sampled), params, numbers, self._device.upload)
            found.add([owners[row][0] for row in sampled], tokens)

    def _rows(self, logits_RV: Tensor, rows: list[int]) -> Tensor:
        if len(rows) == logits_RV.shape[0]:
            return logits_RV
        return logits_RV[self._device.upload(torch.tensor(rows, dtype=torch.int64))]


@dataclass(frozen=True, slots=True)
class _Paused:
    """A micro-batch that waits in a layer for its attention."""

    at_work: Layer
    hidden_TD: Tensor
    entered: ExitStack
    """To be left when the layer is over for it."""


class _Found:
    """What a pass finds out, gathered on the device: the host waits for it once, when all is issued."""

    def __init__(self) -> None:
        self.owners: list[Segment] = []
        """Whose each number is, in the order of the numbers."""
        self._values: list[Tensor] = []

    def add(self, owners: list[Segment], *columns: Tensor) -> None:
        """A value of each column for each of these: a token, or a log-probability and whether it is the highest."""
        self.owners += owners
        # Tokens and float32 alike are exact in float64, so that one copy brings all.
        self._values.append(torch.stack([column.double() for column in columns], 1).flatten())

    def results(self, device: Device) -> list[SegmentResult]:
        """In the order in which segments were first added."""
        numbers = iter(device.download(torch.cat(self._values)).tolist())
        tokens: dict[Segment, int] = {}
        scores: dict[Segment, list[tuple[float, bool]]] = {}
        for segment in self.owners:
            if segment.sequence.is_scored:
                scores.setdefault(segment, []).append((next(numbers), bool(next(numbers))))
            else:
                tokens[segment] = int(next(numbers))
        return [
            SegmentResult(segment, tokens.get(segment), tuple(scores.get(segment, ())))
            for segment in dict.fromkeys(self.owners)
        ]
