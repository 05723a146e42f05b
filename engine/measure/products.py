"""Products with weights: whole layers without their attention, and logits with the choice of a token.

Norms and residuals are in proportion to tokens, as products are, so their time is counted as the products'.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from engine.dtypes import DType
from engine.formats.linear import padded_rows
from engine.measure.effort import Effort, Points
from engine.measure.timing import Timed, curve, in_turns, one_turn
from engine.memory.device import Device
from engine.memory.tensors import torch_dtype
from engine.model.family import EMBED, HEAD, Attend, Family, NamedWeights, layer_name, run_layer
from engine.model.registry import family_for, reference_config
from engine.model.sampling import next_tokens
from engine.request import SamplingParams
from engine.weights.layout import flops_of

_LEAST_SHARE = 0.1
"""Share of the measured time that is left at least once overheads, measured by themselves, are taken off."""


def family_of(hidden_size: int, effort: Effort) -> Family:
    """A plain model of two layers."""
    config = reference_config(hidden_size, head_size=effort.head_size, num_layers=2, vocab_size=effort.vocabulary)
    return family_for(config)


def unit_weights(family: Family, unit_name: str, device: Device, dtype: DType) -> NamedWeights:
    """Random weights of one unit, in device memory."""
    unit = next(unit for unit in family.units() if unit.name == unit_name)
    kind = torch_dtype(dtype)
    return {
        tensor.name: torch.empty(tensor.shape, dtype=kind, device=device.torch_device).normal_(std=0.02)
        for tensor in unit.tensors
    }


class Layers:
    """Layers with weights of their own, computed one after the other, so that weights come from where a model's do."""

    def __init__(self, device: Device, hidden_size: int, number: int, dtype: DType, effort: Effort) -> None:
        self.device = device
        self.dtype = dtype
        self._effort = effort
        self.family = family_of(hidden_size, effort)
        name = layer_name(0)
        first = unit_weights(self.family, name, device, dtype)
        others = [{key: tensor.clone() for key, tensor in first.items()} for _ in range(number - 1)]
        self._weights: Iterator[NamedWeights] = cycle([first, *others])
        self.token_flops = flops_of(self.family)[name]

    def work(self, tokens: int, attend: Attend | None = None) -> Callable[[NamedWeights], object]:
        """What computes one layer for that many tokens, with attention if there is any."""
        kind = torch_dtype(self.dtype)
        rows = padded_rows(tokens, kind, self.device.torch_device)
        hidden_TD = torch.randn(rows, self.family.shape.hidden_size, dtype=kind, device=self.device.torch_device)
        prepared = self.family.prepare(torch.arange(rows, device=self.device.torch_device), kind)
        num_heads = self.family.shape.num_heads

        def queries(qkv: Tensor) -> Tensor:
            """Instead of attention, which is measured by itself."""
            return qkv[:, :num_heads].contiguous()

        return lambda weights: run_layer(self.family.layer(weights, hidden_TD, prepared), attend or queries)

    def step(self, tokens: int, attend: Attend | None = None) -> Callable[[], object]:
        """What computes the next layer in turn, each time that it is called."""
        work = self.work(tokens, attend)
        return lambda: work(next(self._weights))

    def seconds(self, tokens: int, attend: Attend | None = None) -> float:
        """Seconds of one layer, measured over all layers, one after the other: one turn."""
        return one_turn(self.device, self.step(tokens, attend), self._effort)


def layer_points(layers: Layers, tokens: Sequence[int], effort: Effort) -> Points:
    """``(tokens, FLOP/s)`` of layers without attention."""
    (seconds,) = in_turns(effort, [partial(layers.seconds, count) for count in tokens])
    return curve(tokens, [layers.token_flops * count for count in tokens], seconds)


def without(seconds: float, counted_s: float) -> float:
    """What is left of a measured time when that is taken off which other figures count; never nothing."""
    return max(seconds - counted_s, _LEAST_SHARE * seconds)


def head_points(device: Device, hidden_size: int, dtype: DType, rows: Sequence[int], effort: Effort) -> Points:
    """``(rows, FLOP/s)`` of logits, greedy choice included."""
    family = family_of(hidden_size, effort)
    embedding, head = (unit_weights(family, name, device, dtype) for name in (EMBED, HEAD))
    kind = torch_dtype(dtype)
    row_flops = flops_of(family)[HEAD]

    def row_choice(count: int) -> Timed:
        padded = padded_rows(count, kind, device.torch_device)
        hidden_RD = torch.randn(padded, hidden_size, dtype=kind, device=device.torch_device)
        params, numbers = [SamplingParams()] * count, [0.0] * count

        def choose() -> None:
            logits_RV = family.head(head, embedding, hidden_RD)[:count]
            device.download(next_tokens(logits_RV, params, numbers, device.upload))

        return partial(one_turn, device, choose, effort)

    (seconds,) = in_turns(effort, [row_choice(count) for count in rows])
    return curve(rows, [row_flops * count for count in rows], seconds)
