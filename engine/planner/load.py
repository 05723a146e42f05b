"""What passes compute, in counts: tokens, segments, pairs of query and key; and the room that requests take. Pure; no
torch."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from engine.kvcache.segments import Segment
from engine.planner.plan import Plan
from engine.planner.workload import Lengths, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class PassLoad:
    """What a pass computes, in counts; not whole numbers where it is a mean over passes."""

    prompt_tokens: float = 0.0
    decode_tokens: float = 0.0
    """Sequences that add one token."""
    prompt_segments: float = 0.0
    prompt_pairs: float = 0.0
    """Pairs of a query and a key that prompt attention multiplies."""
    attended: float = 0.0
    """KV tokens that decode attention reads."""
    reattended: float = 0.0
    """KV tokens of their own prompts that prompt chunks after the first attend to."""
    logits_rows: float = 0.0

    @property
    def tokens(self) -> float:
        """Tokens that go through the layers."""
        return self.prompt_tokens + self.decode_tokens

    def scaled(self, factor: float) -> "PassLoad":
        """So many times as much of everything."""
        return PassLoad(
            prompt_tokens=factor * self.prompt_tokens,
            decode_tokens=factor * self.decode_tokens,
            prompt_segments=factor * self.prompt_segments,
            prompt_pairs=factor * self.prompt_pairs,
            attended=factor * self.attended,
            reattended=factor * self.reattended,
            logits_rows=factor * self.logits_rows,
        )

    def __add__(self, other: "PassLoad") -> "PassLoad":
        return PassLoad(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            decode_tokens=self.decode_tokens + other.decode_tokens,
            prompt_segments=self.prompt_segments + other.prompt_segments,
            prompt_pairs=self.prompt_pairs + other.prompt_pairs,
            attended=self.attended + other.attended,
            reattended=self.reattended + other.reattended,
            logits_rows=self.logits_rows + other.logits_rows,
        )

    @property
    def prompts(self) -> "PassLoad":
        """Without the decoding, if it is one request's: the pass that ends a prompt yields the first token."""
        return replace(self, decode_tokens=0.0, attended=0.0, logits_rows=min(1.0, self.logits_rows))

    @property
    def decodes(self) -> "PassLoad":
        """The decoding alone."""
        return PassLoad(decode_tokens=self.decode_tokens, attended=self.attended, logits_rows=self.decode_tokens)


def load_of(segments: Iterable[Segment]) -> PassLoad:
    """What a pass carries, counted."""
    load = PassLoad()
    for segment in segments:
        end = segment.start + segment.length
        if segment.is_decode:
            load += PassLoad(decode_tokens=1, attended=end, logits_rows=1)
            continue
        load += PassLoad(
            prompt_tokens=segment.length,
            prompt_segments=1,
            prompt_pairs=segment.length * end,
            reattended=segment.start,
            logits_rows=len(segment.rows),
        )
    return load


def request_load(lengths: Lengths, plan: Plan) -> PassLoad:
    """What one request costs over all its passes. A pass of ``r`` new requests costs ``r`` times that, once steady."""
    prompt = lengths.prompt
    # A prompt is cut at the borders of micro-batches; what is cut off attends to half of it, in the mean.
    cuts = prompt / plan.micro_batch
    chunk = min(prompt, plan.micro_batch, plan.prefill_chunk)
    return PassLoad(
        prompt_tokens=prompt,
        decode_tokens=lengths.decode_steps,
        prompt_segments=1 + cuts,
        prompt_pairs=prompt * (prompt + chunk) / 2,
        attended=lengths.attended,
        reattended=cuts * prompt / 2,
        logits_rows=lengths.generated,
    )


def mean_request_load(workload: Workload, plan: Plan) -> PassLoad:
    """The mean over a workload's requests."""
    total = PassLoad()
    for each in workload.lengths:
        total += request_load(each, plan).scaled(each.requests / workload.requests)
    return total


def residency_passes(lengths: Lengths, plan: Plan) -> float:
    """Passes from admission to the end."""
    return lengths.decode_steps + max(1.0, lengths.prompt / plan.tokens_per_pass)


def mean_room(workload: Workload, plan: Plan) -> float:
    """Tokens of KV cache that are reserved for a request."""
    return workload.mean(lambda each: plan.kv_room.of(each.reserved))


def mean_occupied(workload: Workload, plan: Plan) -> float:
    """The same, times the passes for which they are."""
    return workload.mean(lambda each: plan.kv_room.of(each.reserved) * residency_passes(each, plan))
