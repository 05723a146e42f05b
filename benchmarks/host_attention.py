"""What attention on the host is worth, where keys and values lie there and the link is three times slower than compute.

``python -m benchmarks.host_attention [--json]``. A device that is slow on purpose (``benchmarks.slow_gpu``) decodes
with all keys and values in host memory, once fetching them and once having them attended to where they are. Exits with
1 unless the second is 1.6 times as fast (FlexGen's paper has 1.8), all greedy tokens are the same in float32, and no
log-probability differs by more than 1e-5. It also tells how fast the host attends in float16, and what share that is of
the speed at which it reads its memory: presets take no more for granted.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.checkpoints import default_cache, make_checkpoint
from benchmarks.slow_gpu import SlowGpu
from engine import Generate, PassStats, PlanOptions, Request, SamplingParams, Shares
from engine.attention.pages import attend_pages, page_table
from engine.attention.sizes import BLOCK_BYTES
from engine.attention.stored import PlainRows, StoredRows
from engine.executor import Executor
from engine.kvcache.segments import Segment
from engine.loading import load_engine
from engine.memory.aligned import aligned_empty
from engine.memory.lane import LaneName
from engine.units import GIB

LINE, DIFFERENCE_LINE = 1.6, 1e-5
TIMES = 3.0
"""How much longer the link takes over keys and values than the device over a pass."""
REQUESTS, WORDS, STEPS, WARM = 48, 250, 10, 2
FLOPS, MEMORY_SPEED = 60e9, 60e9
_FAST = 1e12
_REPEATS = 6

Chosen = dict[tuple[int, ...], float]
"""The log-probability of the likeliest token, by the tokens before it."""


def decode(model_dir: Path, link_speed: float, *, on_host: bool) -> list[PassStats]:
    """Decode passes of a small job, the first ones left out."""
    options = PlanOptions(
        device_memory=2 * GIB, host_memory=4 * GIB, weights=Shares(100, 0, 0), kv=Shares(0, 100, 0), micro_batches=2,
        micro_batch=2048, host_attention="on" if on_host else "off",
    )  # fmt: skip
    sampling = SamplingParams(max_new_tokens=STEPS, ignore_eos=True)
    requests = [Request(index, Generate(f"w{index} " * WORDS, sampling)) for index in range(REQUESTS)]
    device = SlowGpu(flops=FLOPS, memory_speed=MEMORY_SPEED, link_speed=link_speed)
    with load_engine(model_dir, options, device=device) as engine:
        stats = [report.stats for report in engine.passes(iter(requests))]
    return [each for each in stats if each.decode_tokens == REQUESTS and not each.prefill_tokens][WARM:]


def host_share(stored: StoredRows | None = None) -> tuple[float, float]:
    """Bytes/s of attention on the host in float16, with OPT-30B's heads; and its share of bytes/s of plain reads.

    ``stored``: how keys and values lie; plain unless it is given. Bytes are always those of plain ones.
    """
    tokens, rows, heads, size, page_tokens = 544, 48, 56, 128, 64
    in_row = tokens // page_tokens + 1
    plain = aligned_empty(2 * rows * in_row * page_tokens * 2 * heads * size).view(torch.float16)
    plain.normal_()
    reads_s = _shortest(plain.view(torch.float32).sum)
    stored = stored or PlainRows(heads, size, torch.float16)
    pool = stored.rounded(plain.view(-1, 2, heads, size))
    pages = [list(range(row * in_row, (row + 1) * in_row)) for row in range(rows)]
    most = BLOCK_BYTES // (4 * heads * size * page_tokens)
    table = page_table(pages, [tokens] * rows, page_tokens, most)
    queries = torch.randn(rows, heads, size).half()
    staged = torch.empty(most * page_tokens * pool[0].nbytes, dtype=torch.uint8)
    values = len(table.pages) * heads * (size + 2) + rows * heads * size + most * page_tokens * heads * size
    work, results = torch.empty(values), torch.empty_like(queries)
    attends_s = _shortest(lambda: attend_pages(queries, pool, stored, table, staged, work, results))
    rate = 2 * rows * tokens * 2 * heads * size / attends_s
    return rate, rate * reads_s / plain.nbytes


def _shortest(work: Callable[[], object]) -> float:
    found = []
    for _ in range(_REPEATS):
        start = perf_counter()
        work()
        found.append(perf_counter() - start)
    return min(found[1:])


@contextmanager
def noted(chosen: Chosen) -> Iterator[None]:
    """Note the log-probability of each token that greedy decoding chooses."""
    select = Executor._select

    def noting(self: Executor, logits_RV: Tensor, owners: list[tuple[Segment, int]], found: object) -> None:
        best = logits_RV.double().log_softmax(-1).max(-1).values.tolist()
        for (segment, row), logprob in zip(owners, best, strict=True):
            chosen[tuple(segment.sequence.tokens[: row + 1])] = logprob
        select(self, logits_RV, owners, found)  # type: ignore[arg-type]

    with patch.object(Executor, "_select", noting):
        yield


def main(arguments: list[str] | None = None) -> int:
    """0 if all lines hold."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_attention", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one document on standard output")
    asked = parser.parse_args(arguments)
    half, exact = (
        make_checkpoint("opt-125m", dtype, default_cache(), _say).model_dir for dtype in ("bfloat16", "float32")
    )
    free = decode(half, _FAST, on_host=False)
    compute_s = median(each.lane_seconds[LaneName.DEVICE_COMPUTE] for each in free)
    moved = median(each.lane_bytes[LaneName.HOST_TO_DEVICE] for each in free)
    speed = moved / (TIMES * compute_s)
    _say(f"compute {1000 * compute_s:.0f} ms a pass; link {speed / 1e6:.0f} MB/s for {moved / 1e6:.0f} MB")
    seconds = {}
    for on_host in (False, True):
        passes = decode(half, speed, on_host=on_host)
        seconds[on_host] = median(each.seconds for each in passes)
        lanes = {lane: median(each.lane_seconds.get(lane, 0.0) for each in passes) for lane in LaneName}
        busy = ", ".join(f"{lane} {1000 * each:.0f}" for lane, each in lanes.items() if each)
        _say(f"{'attended to' if on_host else 'fetched'}: {1000 * seconds[on_host]:.0f} ms a pass; busy ms: {busy}")
    chosen: dict[bool, Chosen] = {False: {}, True: {}}
    for on_host, noting in chosen.items():
        with noted(noting):
            decode(exact, _FAST, on_host=on_host)
    same = chosen[False].keys() == chosen[True].keys()
    worst = max(abs(value - chosen[True].get(key, float("inf"))) for key, value in chosen[False].items())
    times = seconds[False] / seconds[True]
    rate, share = host_share()
    _say(f"the host attends to {rate / 1e9:.1f} GB/s in float16, {share:.0%} of what it reads")
    if asked.json:
        found = {"times": times, "tokens_equal": same, "difference": worst, "logprobs": len(chosen[True])}
        print(json.dumps({**found, "host_per_s": rate, "host_share": share}))
    else:
        print(f"{times:.2f} times as fast (line {LINE}); tokens {'equal' if same else 'DIFFER'}; {worst:.1e} apart")
    return 0 if times >= LINE and same and worst <= DIFFERENCE_LINE else 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
