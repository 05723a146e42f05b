"""The definition of attention, in float32: the oracle of every kernel."""

import torch
from torch import Tensor


def attend_plainly(q_NtH: Tensor, k_NsH: Tensor, v_NsH: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Shapes as in ``engine.attention.kernels``; as many heads of keys as of queries."""
    scores_Nts = (q_NtH.float() @ k_NsH.float().transpose(1, 2)) * q_NtH.shape[-1] ** -0.5
    if causal:
        past = k_NsH.shape[1] - q_NtH.shape[1]
        hidden = torch.ones(scores_Nts.shape[1:], dtype=torch.bool, device=scores_Nts.device).triu(past + 1)
        scores_Nts = scores_Nts.masked_fill(hidden, float("-inf"))
    lse_Nt = scores_Nts.logsumexp(-1)
    out_NtH = (scores_Nts - lse_Nt[..., None]).exp() @ v_NsH.float()
    return out_NtH.to(q_NtH.dtype), lse_Nt
