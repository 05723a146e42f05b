"""From logits to tokens: greedy, temperature, top-k, top-p; and log-probabilities of given tokens.

Randomness is counter-based (Philox, Salmon et al. 2011): the number that draws a token is a function of the job's seed,
the request's index and the token's place alone, so a text depends neither on its neighbours nor on a restart.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.request import SamplingParams

_MASK = (1 << 64) - 1


def uniform(seed: int, sample_index: int, step: int) -> float:
    """The number in [0, 1) that draws token ``step`` of a request."""
    # As uint64 from the start: numpy would make floats of a list with numbers beyond int64, and round them together.
    key = np.array([seed & _MASK, sample_index & _MASK], dtype=np.uint64)
    bits = np.random.Philox(key=key, counter=[step, 0, 0, 0]).random_raw()
    return float(int(bits) >> 11) * 2.0**-53


def next_tokens(logits_RV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """The next token of each row, ``int64 [R]``; rows with temperature 0 take the likeliest (the first, if tied)."""
    tokens_R = logits_RV.argmax(-1)
    for row, (sampling, number) in enumerate(zip(params, uniforms, strict=True)):
        if sampling.temperature > 0:
            tokens_R[row] = _draw(logits_RV[row], sampling, number)
    return tokens_R


def _draw(logits_V: Tensor, sampling: SamplingParams, number: float) -> Tensor:
    """Inverse-transform sampling over the tokens that temperature, then top-k, then top-p leave (in that order)."""
    # Less their maximum first: a temperature near 0 would make the largest infinite, and their softmax no number.
    scaled_V = (logits_V.double() - logits_V.max()) / sampling.temperature
    sorted_V, order_V = scaled_V.sort(descending=True, stable=True)
    if sampling.top_k:
        sorted_V = sorted_V[: sampling.top_k]
    probabilities = sorted_V.softmax(-1)
    cumulative = probabilities.cumsum(-1)
    # A token stays when those before it do not yet reach top_p; the first always does.
    kept = cumulative - probabilities < sampling.top_p
    kept[0] = True  # also where logits that overflowed float16 left no numbers to compare
    cumulative = cumulative[kept]
    place = torch.searchsorted(cumulative, cumulative[-1:] * number, right=True)
    return order_V[place.clamp(max=cumulative.numel() - 1)][0]


def score_tokens(logits_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """Natural-log probability of each target, ``float32 [R]``, and whether it is the likeliest token, ``bool [R]``."""
    chosen_R = logits_RV.gather(1, targets_R[:, None])[:, 0]
    return chosen_R - logits_RV.logsumexp(-1), logits_RV.argmax(-1) == targets_R
