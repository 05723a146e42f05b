"""From logits to tokens: greedy, temperature, top-k, top-p; and log-probabilities of given tokens.

Randomness is counter-based (Philox, Salmon et al. 2011): the number that draws a token is a function of the job's seed,
the request's index and the token's place alone, so a text depends neither on its neighbours nor on a restart.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.request import SamplingParams
from engine.units import div_ceil

NOT_FINITE = -1
"""Instead of a token: the number type was too small for the model."""
_MASK = (1 << 64) - 1
DRAWN_IN = 16
"""Rows are drawn in this many parts, since a row being drawn takes 16 times the memory that the plan's workspace has
for a row of logits."""


def uniform(seed: int, sample_index: int, step: int) -> float:
    """The number in [0, 1) that draws token ``step`` of a request."""
    # As uint64 from the start: numpy would make floats of a list with numbers beyond int64, and round them together.
    key = np.array([seed & _MASK, sample_index & _MASK], dtype=np.uint64)
    bits = np.random.Philox(key=key, counter=[step, 0, 0, 0]).random_raw()
    return float(int(bits) >> 11) * 2.0**-53


def next_tokens(
    logits_RV: Tensor,
    params: Sequence[SamplingParams],
    uniforms: Sequence[float],
    upload: Callable[[Tensor], Tensor] = lambda values: values,
) -> Tensor:
    """The next token of each row, ``int64 [R]``; rows with temperature 0 take the likeliest (the first, if tied).

    ``NOT_FINITE`` where the largest logit is no finite number.

    Args:
        logits_RV: on any device; nothing here waits for it.
        params: how each row is sampled.
        uniforms: the number in [0, 1) that draws each row's token; ignored where it is not drawn.
        upload: brings a small host tensor to the logits' device.
    """
    tokens_R = logits_RV.argmax(-1)  # no number, if there is any
    is_finite_R = logits_RV.gather(1, tokens_R[:, None])[:, 0].isfinite()
    pairs = enumerate(zip(params, uniforms, strict=True))
    drawn = {row: (sampling, number) for row, (sampling, number) in pairs if sampling.temperature > 0}
    if not drawn:
        return tokens_R.where(is_finite_R, NOT_FINITE)
    rules = [(one.temperature, one.top_k or math.inf, one.top_p, number) for one, number in drawn.values()]
    rules_D4 = upload(torch.tensor(rules, dtype=torch.float64))
    rows_D = upload(torch.tensor(list(drawn), dtype=torch.int64))
    step = div_ceil(len(drawn), DRAWN_IN)
    for first in range(0, len(drawn), step):
        rows_d = rows_D[first : first + step]
        tokens_R.index_copy_(0, rows_d, _draw(logits_RV.index_select(0, rows_d), rules_D4[first : first + step]))
    return tokens_R.where(is_finite_R, NOT_FINITE)


def _draw(logits_RV: Tensor, rules_R4: Tensor) -> Tensor:
    """Inverse-transform sampling over the tokens that temperature, then top-k, then top-p leave (in that order)."""
    temperature_R1, top_k_R1, top_p_R1, number_R1 = (rules_R4[:, i : i + 1] for i in range(4))
    sorted_RV, order_RV = logits_RV.sort(dim=-1, descending=True, stable=True)
    # Less their maximum first: a temperature near 0 would make the largest infinite, and their softmax no number.
    scaled_RV = (sorted_RV.double() - sorted_RV.narrow(1, 0, 1)).div_(temperature_R1)
    place_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    probabilities_RV = scaled_RV.masked_fill_(place_V >= top_k_R1, -math.inf).softmax(-1)
    cumulative_RV = probabilities_RV.cumsum(-1)
    # A token stays when those before it do not yet reach top_p; the first always does, also where logits that
    # overflowed float16 left no numbers to compare.
    last_R1 = (cumulative_RV - probabilities_RV < top_p_R1).sum(-1, keepdim=True).sub_(1).clamp_(min=0)
    wanted_R1 = cumulative_RV.gather(1, last_R1) * number_R1
    place_R1 = torch.searchsorted(cumulative_RV, wanted_R1, right=True)
    return order_RV.gather(1, torch.minimum(place_R1, last_R1)).squeeze(1)


def score_tokens(logits_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """Natural-log probability of each target, ``float32 [R]``, and whether it is the likeliest token, ``bool [R]``."""
    chosen_R = logits_RV.gather(1, targets_R[:, None])[:, 0]
    return chosen_R - logits_RV.logsumexp(-1), logits_RV.argmax(-1) == targets_R
