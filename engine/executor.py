"""Runs one pass over the layers: the one loop. Weights are streamed once, whatever the pass carries."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.formats.linear import padded_rows
from engine.kvcache.segments import MicroBatch, Segment
from engine.memory.tensors import torch_dtype
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
    """Behind the head: in the order of the pass's segments, of those with rows that were wanted."""
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
        self._attention.begin(batches)
        self._activations.begin([self._num_rows(batch) for batch in batches], len(stage.layers), wanted)
        positions = [self._positions(batch) for batch in batches]
        for index, batch in enumerate(batches):
            with self._activations.enter(index) as hidden_TD:
                if stage.has_embedding:
                    hidden_TD.copy_(self._embed(batch, positions[index]))
                else:
                    hidden_TD[: batch.num_tokens].copy_(arriving[index])
                    hidden_TD[batch.num_tokens :] = 0
        for layer, number in enumerate(stage.layers):
            with self._weights.layer(number) as weights:
                for index in range(len(batches)):
                    attend = partial(self._attention.attend, layer, index)
                    with self._activations.enter(index) as hidden_TD:
                        after_TD = self._family.layer(weights, hidden_TD, positions[index], attend)
                        if after_TD.data_ptr() != hidden_TD.data_ptr():
                            hidden_TD.copy_(after_TD)
        output = StageOutput([], [])
        for index, batch in enumerate(batches):
            if wanted[index]:
                with self._activations.enter(index) as hidden_TD:
                    if stage.has_head:
                        output.results.extend(self._finish(batch, hidden_TD))
                    else:
                        output.hidden.append(hidden_TD[: batch.num_tokens].clone())
        return output

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

    def _finish(self, batch: MicroBatch, hidden_TD: Tensor) -> list[SegmentResult]:
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
        tokens: dict[Segment, int] = {}
        scores: dict[Segment, list[tuple[float, bool]]] = {}
        for first in range(0, len(wanted), most):
            chunk = wanted[first : first + most]
            rows = chunk + [0] * (self._padded(len(chunk), most) - len(chunk))
            rows_RD = hidden_TD[self._device.upload(torch.tensor(rows, dtype=torch.int64))]
            logits_RV = self._family.head(self._weights.head(), embedding, rows_RD)[: len(chunk)]
            self._select(logits_RV, owners[first : first + most], tokens, scores)
        return [
            SegmentResult(segment, tokens.get(segment), tuple(scores.get(segment, ())))
            for segment in batch.segments
            if segment in tokens or segment in scores
        ]

    def _select(
        self,
        logits_RV: Tensor,
        owners: list[tuple[Segment, int]],
        tokens: dict[Segment, int],
        scores: dict[Segment, list[tuple[float, bool]]],
    ) -> None:
        """Sample the rows of generations, score those of given tokens."""
        scored = [row for row, (segment, _) in enumerate(owners) if segment.sequence.is_scored]
        sampled = [row for row, (segment, _) in enumerate(owners) if not segment.sequence.is_scored]
        if scored:
            targets = torch.tensor([owners[row][0].sequence.tokens[owners[row][1] + 1] for row in scored])
            logprobs, greedy = score_tokens(self._rows(logits_RV, scored), self._device.upload(targets))
            found = zip(self._device.download(logprobs).tolist(), self._device.download(greedy).tolist(), strict=True)
            for row, score in zip(scored, found, strict=True):
                scores.setdefault(owners[row][0], []).append(score)
        if sampled:
            params, numbers = [], []
            for row in sampled:
                sequence = owners[row][0].sequence
                assert sequence.sampling is not None
                step = len(sequence.tokens) - sequence.num_prompt_tokens
                greedy_row = sequence.sampling.temperature == 0
                numbers.append(0.0 if greedy_row else uniform(sequence.sampling.seed, sequence.sample_index, step))
                params.append(sequence.sampling)
            chosen = self._device.download(
                next_tokens(self._rows(logits_RV, sampled), params, numbers, self._device.upload)
            ).tolist()
            for row, token in zip(sampled, chosen, strict=True):
                tokens[owners[row][0]] = token

    def _rows(self, logits_RV: Tensor, rows: list[int]) -> Tensor:
        if len(rows) == logits_RV.shape[0]:
            return logits_RV
        return logits_RV[self._device.upload(torch.tensor(rows, dtype=torch.int64))]
