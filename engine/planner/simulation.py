"""The passes of a workload, as the scheduler fills them, in counts alone. No torch.

``schedule.packing`` takes sequences one by one; here those of one length that are at the same token are one number,
so that a thousand passes take a moment. For requests of one length both fill the same passes with the same tokens, as
long as no gap of the KV cache is too short for an extent.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from engine.planner.load import PassLoad, request_load
from engine.planner.plan import Plan
from engine.planner.workload import Lengths, Workload
from engine.schedule.policy import most_prompt_tokens, sustaining_prompt_tokens
from engine.units import align_up, div_ceil

RUNS = 64
"""The requests of each length are divided into this many runs of neighbours, at most, which are then mixed evenly."""


@dataclass(slots=True)
class _Group:
    """Sequences of one length in one tier that are at the same token of their prompts."""

    lengths: Lengths
    tier: int
    number: int
    remaining: int
    """Prompt tokens that each of them has still to compute."""


class Simulation:
    """A workload on its way through a plan: ``next_pass`` until ``is_done``."""

    def __init__(self, workload: Workload, plan: Plan, token_bytes: int) -> None:
        """Nothing is computed yet.

        Args:
            workload: requests that each find room in some tier.
            plan: what the passes are made under.
            token_bytes: bytes of one token's keys and values over all layers.
        """
        self._plan = plan
        self._units = [plan.kv_unit(tier) for tier in plan.kv_bytes]
        self._free = [
            num_bytes // token_bytes // unit * unit
            for num_bytes, unit in zip(plan.kv_bytes.values(), self._units, strict=True)
        ]
        """KV tokens of each tier."""
        self._waiting = _mixed(workload)
        self._waiting_tokens = sum(self._room_of(each) * number for each, number in self._waiting)
        self._prefilling: deque[_Group] = deque()
        self._decoding = 0
        self._attended = 0
        """KV tokens that the sequences which decode will attend to in the next pass."""
        self._ends: dict[int, list[_Group]] = {}
        """Groups by the pass that computes their last token."""
        self._passes = 0
        self._prompts = {each: request_load(each, plan).prompts for each in workload.lengths}
        self._sustaining = sustaining_prompt_tokens(
            min(sum(self._free) / workload.mean(self._room_of), plan.tokens_per_pass),
            workload.mean(lambda each: each.prompt),
            workload.mean(lambda each: each.decode_steps),
        )

    @property
    def is_done(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self._waiting and not self._prefilling and not self._decoding

    @property
    def num_waiting(self) -> int:
        """Requests that were not admitted yet."""
        return sum(number for _, number in self._waiting)

    def drop_waiting(self) -> None:
        """Let those that run be the last."""
        self._waiting.clear()
        self._waiting_tokens = 0

    def next_pass(self, balanced: float | None = None) -> PassLoad:
        """What the next pass carries; it counts as computed.

        ``balanced``: prompt tokens with which compute takes as long as the links; see ``schedule.policy``.
        """
        left = self._plan.tokens_per_pass - self._decoding
        most = most_prompt_tokens(
            balanced,
            self._sustaining,
            self._waiting[0][0].prompt if self._waiting else 0,
            more_wait=self._waiting_tokens > sum(self._free),
            nobody_runs=not self._decoding and not self._prefilling,
        )
        if most is not None:
            left = min(left, int(most))
        begun, self._prefilling = self._prefilling, deque()
        finished: list[_Group] = []
        prompts: dict[Lengths, int] = {}
        while left > 0 and (group := begun.popleft() if begun else self._admit(left)) is not None:
            tokens = self._compute(group, left, finished)
            prompts[group.lengths] = prompts.get(group.lengths, 0) + tokens
            left -= tokens
        self._prefilling.extend(begun)
        load = self._load(prompts, sum(group.number for group in finished))
        self._end_pass(finished)
        return load

    def _load(self, prompts: Mapping[Lengths, int], ended: int) -> PassLoad:
        """What a pass carries: these prompt tokens, the last of ``ended`` prompts, and a token of each that decodes."""
        loads = [(tokens / each.prompt, self._prompts[each]) for each, tokens in prompts.items()]
        return PassLoad(
            prompt_tokens=sum(prompts.values()),
            decode_tokens=self._decoding,
            prompt_segments=sum(share * load.prompt_segments for share, load in loads),
            prompt_pairs=sum(share * load.prompt_pairs for share, load in loads),
            attended=self._attended,
            reattended=sum(share * load.reattended for share, load in loads),
            logits_rows=self._decoding + ended,
        )

    def _admit(self, left: int) -> _Group | None:
        """As many of the first that wait as one tier has room for, and as can begin; ``None``: none of them, now."""
        if not self._waiting:
            return None
        lengths, waiting = self._waiting[0]
        # Everybody who runs has a token in this pass, so there are never more of them than it has tokens.
        number = min(waiting, div_ceil(left, min(lengths.prompt, self._plan.prefill_chunk)))
        for tier, free in enumerate(self._free):
            room = align_up(self._room_of(lengths), self._units[tier])
            fitting = min(number, free // room)
            if fitting > 0:
                self._leave_queue(fitting)
                self._free[tier] -= fitting * room
                return _Group(lengths, tier, fitting, lengths.prompt)
        return None

    def _leave_queue(self, number: int) -> None:
        lengths, waiting = self._waiting.popleft()
        if waiting > number:
            self._waiting.appendleft((lengths, waiting - number))
        self._waiting_tokens -= number * self._room_of(lengths)

    def _compute(self, group: _Group, room: int, finished: list[_Group]) -> int:
        """How many tokens of a group's prompts find room, one sequence after another."""
        each = min(group.remaining, self._plan.prefill_chunk)
        whole = min(group.number, room // each)
        part = room - whole * each if whole < group.number else 0
        untouched = group.number - whole - (part > 0)
        if whole:
            self._put(group, whole, group.remaining - each, finished)
        if part:
            self._put(group, 1, group.remaining - part, finished)
        if untouched:
            self._put(group, untouched, group.remaining, finished)
        return whole * each + part

    def _put(self, group: _Group, number: int, remaining: int, finished: list[_Group]) -> None:
        """Some of a group, from the next pass on."""
        some = _Group(group.lengths, group.tier, number, remaining)
        (self._prefilling if remaining else finished).append(some)

    def _end_pass(self, finished: list[_Group]) -> None:
        """Who decoded is a token further; who ended frees its room; whose prompt has ended decodes from now on."""
        self._attended += self._decoding
        for group in self._ends.pop(self._passes, []):
            self._decoding -= group.number
            self._attended -= group.number * (group.lengths.reserved + 1)
            self._free_room(group)
        for group in finished:
            if not group.lengths.decode_steps:
                self._free_room(group)
                continue
            self._decoding += group.number
            self._attended += group.number * (group.lengths.prompt + 1)
            self._ends.setdefault(self._passes + group.lengths.decode_steps, []).append(group)
        self._passes += 1

    def _free_room(self, group: _Group) -> None:
        self._free[group.tier] += group.number * align_up(self._room_of(group.lengths), self._units[group.tier])

    def _room_of(self, lengths: Lengths) -> int:
        return self._plan.kv_room.of(lengths.reserved)


def _mixed(workload: Workload) -> deque[tuple[Lengths, int]]:
    """The requests as they wait: runs of one length, those of each length spread evenly over the whole."""
    runs: list[tuple[float, Lengths, int]] = []
    for each in workload.lengths:
        size = div_ceil(each.requests, RUNS)
        number = div_ceil(each.requests, size)
        runs += [((index + 0.5) / number, each, min(size, each.requests - index * size)) for index in range(number)]
    runs.sort(key=lambda run: run[0])
    return deque((lengths, number) for _, lengths, number in runs)
