"""How many prompt tokens a pass carries: the rules that the scheduler follows and the planner predicts by."""


def sustaining_prompt_tokens(running: float, prompt: float, steps: float) -> float:
    """How many prompt tokens a pass must carry so that as many prompts end as sequences do, the KV cache being full.

    With fewer, room stands empty, and each pass does less while it costs as much. By Little's law, R sequences with
    prompts of P tokens and D decode steps stay for D + P / n passes each, and R = n / P * (D + P / n).

    Args:
        running: sequences that are in passes together, at most (R).
        prompt: tokens of a prompt, in the mean (P).
        steps: decode steps of a sequence, in the mean (D).
    """
    return (running - 1) * prompt / max(1.0, steps)


def most_prompt_tokens(
    balanced: float | None, sustaining: float, first: float, *, more_wait: bool, nobody_runs: bool
) -> float | None:
    """Tokens of prompts that need a KV cache in a pass, at most; ``None``: as many as there are.

    Args:
        balanced: with this number, compute takes as long as the links; ``None``: nothing is streamed, or nothing known.
        sustaining: see ``sustaining_prompt_tokens``.
        first: tokens of the prompt that would begin.
        more_wait: whether more sequences wait than find room. The last ones start as soon as they can, since nothing
            comes after them that could be computed beside their decoding.
        nobody_runs: then nobody is kept waiting by a whole prompt, and the first token comes with the first pass.
    """
    if balanced is None or not more_wait:
        return None
    return max(balanced, sustaining, first if nobody_runs else 0.0)
