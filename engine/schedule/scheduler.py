"""Decides the next pass from counts alone: decode tokens of running sequences first, then prefill chunks of new ones.

A sequence is admitted only when its KV cache is certain to fit until its end, so nothing is ever preempted. Scored
sequences that fit into one micro-batch need no KV cache at all, and pass by those that wait for it.

The other schedule, by block, is FlexGen's two phases, there to compare with: admit a block, compute all of its prompts,
then decode it until its last sequence has ended, and only then admit the next.
"""

from collections import deque
from collections.abc import Callable

from engine.kvcache.cache import KVCache, Move
from engine.kvcache.segments import arrange
from engine.schedule.packing import Packer, dealt
from engine.schedule.passes import Pass
from engine.schedule.policy import most_prompt_tokens, sustaining_prompt_tokens
from engine.sequence import Sequence

LOOK_AHEAD = 64
"""Sequences that may wait for room while others, which need none, are looked for behind them: they are in memory, and
no other worker can take them."""


class Scheduler:
    """Holds the waiting and the running: ``next_pass`` decides, ``completed`` moves on, ``retire`` forgets.

    A sequence is in one pass at a time; another pass may be asked for before one is completed, and has others.
    """

    def __init__(
        self,
        kv: KVCache,
        *,
        micro_batch: int,
        micro_batches: int,
        prefill_chunk: int,
        by_block: bool = False,
        host_attends: bool = False,
    ) -> None:
        self._kv = kv
        self._host_attends = host_attends
        self._by_block = by_block
        self._micro_batch = micro_batch
        self._micro_batches = micro_batches
        self._prefill_chunk = prefill_chunk
        self._waiting: deque[Sequence] = deque()
        self._running: dict[Sequence, None] = {}
        self._in_flight: set[Sequence] = set()
        self._moves: tuple[Move, ...] = ()
        """For the next pass that computes anything."""

    @property
    def num_waiting(self) -> int:
        """Sequences not yet admitted."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self._waiting and not self._running and not self._in_flight

    def next_pass(self, pull: Callable[[], list[Sequence] | None], prompt_tokens: int | None = None) -> Pass:
        """The next pass; ``pull`` yields the sequences of one more request, or ``None`` when there is none now.

        ``prompt_tokens``, if given, is how many tokens of prompts that need a KV cache should be in it. This holds only
        as long as more sequences wait than find room: the last ones start as soon as they can, since nothing comes
        after them that could be computed beside their decoding. A schedule by block has no use for it.

        An empty pass means that nothing can be computed: either nothing is there, or the first waiting sequence does
        not fit although nothing runs (``stuck`` returns it).
        """
        first = self._waiting[0] if self._waiting else None
        if first is not None and self.needs_kv(first):
            self._moves += self._kv.make_gap(first)  # before anybody's place is written into the pass
        packer = Packer(self._micro_batch, self._micro_batches)
        if self._by_block:
            self._fill_by_block(packer, pull)
        else:
            self._fill_mixed(packer, pull, prompt_tokens)
        batches = packer.finish()
        if self._host_attends and self._micro_batches > 1:
            batches = dealt(batches, self._micro_batch)
        this_pass = Pass(tuple(arrange(batch) for batch in batches), self._moves)
        if this_pass.micro_batches:
            self._moves = ()
        self._in_flight.update(segment.sequence for segment in this_pass.segments)
        return this_pass

    def completed(self, this_pass: Pass) -> None:
        """Its tokens count as computed. What was retired meanwhile gives its room back."""
        for segment in this_pass.segments:
            segment.sequence.num_computed += segment.length
            self._in_flight.discard(segment.sequence)
            if segment.sequence not in self._running:  # retired meanwhile
                self._kv.release(segment.sequence)

    def needs_kv(self, sequence: Sequence) -> bool:
        """Whether a later pass will attend to its keys and values."""
        return not sequence.is_scored or sequence.num_to_compute > min(self._micro_batch, self._prefill_chunk)

    def stuck(self) -> Sequence | None:
        """The sequence that will never fit, asked after an empty pass; ``None``: there is none."""
        return self._waiting[0] if self._waiting and not self._running and not self._in_flight else None

    def retire(self, sequence: Sequence) -> None:
        """Forget a sequence that ended or was dropped, and free its KV cache."""
        if sequence in self._running:
            del self._running[sequence]
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        if sequence not in self._in_flight:  # else the pass that is under way still writes there
            self._kv.release(sequence)

    def _fill_mixed(self, packer: Packer, pull: Callable[[], list[Sequence] | None], prompt_tokens: int | None) -> None:
        """Whoever decodes, then whoever is at its prompt, then whoever is admitted into the tokens that are left."""
        at_hand = [running for running in self._running if running not in self._in_flight]
        for running in at_hand:
            if running.is_decoding and packer.left:
                self._add_chunk(packer, running)
        most = None
        if prompt_tokens is not None and self._more_wait_than_fit(pull):
            most = most_prompt_tokens(
                prompt_tokens,
                self._sustaining_prompt_tokens(),
                self._waiting[0].num_to_compute,
                more_wait=True,
                nobody_runs=not self._running,
            )
        least = 0 if most is None else packer.left - int(most)
        for running in at_hand:
            if not running.is_decoding and packer.left > least:
                self._add_chunk(packer, running, packer.left - least)
        while packer.left and self._has_slot and (sequence := self._waiting_at(0, pull)) is not None:
            if self.needs_kv(sequence):
                if packer.left <= least or not self._kv.admit(sequence):
                    self._let_pass(packer, pull)
                    return
                self._add_chunk(packer, sequence, packer.left - least)
            elif not packer.add_whole(sequence, sequence.num_to_compute):
                return
            self._start(sequence)

    def _let_pass(self, packer: Packer, pull: Callable[[], list[Sequence] | None]) -> None:
        """While the first waiting sequence waits for room, those that need none overtake it, into tokens left over.

        They cost it nothing: they hold no room, end with this pass, and before the next pass's tokens are offered to
        them, the first waiting sequence is asked again. Where nothing runs, no room will come, and they wait, too, so
        that it is found to be stuck.
        """
        index = 0
        while self._running and packer.left and self._has_slot and index < LOOK_AHEAD:
            sequence = self._waiting_at(index, pull)
            if sequence is None:
                return
            if self.needs_kv(sequence):
                index += 1
            elif packer.add_whole(sequence, sequence.num_to_compute):
                self._running[sequence] = None
                del self._waiting[index]
            else:
                return

    def _fill_by_block(self, packer: Packer, pull: Callable[[], list[Sequence] | None]) -> None:
        """Prompts alone while any is unfinished, decode tokens alone after that; a new block when nobody runs."""
        if not self._running:
            while self._has_slot and (sequence := self._waiting_at(0, pull)) is not None:
                if self.needs_kv(sequence) and not self._kv.admit(sequence):
                    break
                self._start(sequence)
        prompts = [running for running in self._running if not running.is_decoding]
        for running in prompts or self._running:
            if running in self._in_flight:
                continue
            if not packer.left:
                return
            if self.needs_kv(running):
                self._add_chunk(packer, running)
            elif not packer.add_whole(running, running.num_to_compute):
                return

    def _sustaining_prompt_tokens(self) -> float:
        """See ``policy``; by the sequences that are known: those that run or wait, and need a KV cache."""
        known = [each for each in (*self._running, *self._waiting) if self.needs_kv(each)]
        if not known:
            return 0.0
        room = self._kv.num_tokens * len(known) / max(1, sum(self._kv.room.of(each.num_kv_tokens) for each in known))
        prompts = sum(each.num_to_compute if each.is_scored else each.num_prompt_tokens for each in known)
        steps = sum(each.max_tokens - 1 - each.num_prompt_tokens for each in known if not each.is_scored)
        running = min(room, self._micro_batch * self._micro_batches)
        return sustaining_prompt_tokens(running, prompts / len(known), steps / len(known))

    def _more_wait_than_fit(self, pull: Callable[[], list[Sequence] | None]) -> bool:
        """Pulls requests until they would fill the KV cache, or until one comes that needs none."""
        free, index = self._kv.free_tokens, 0
        while (sequence := self._waiting_at(index, pull)) is not None:
            free, index = free - self._kv.room.of(sequence.num_kv_tokens), index + 1
            if free < 0 or not self.needs_kv(sequence):
                return True
        return False

    @property
    def _has_slot(self) -> bool:
        # Each running sequence wants a token a pass: no more of them than a pass has tokens.
        return len(self._running) < self._micro_batch * self._micro_batches

    def _waiting_at(self, index: int, pull: Callable[[], list[Sequence] | None]) -> Sequence | None:
        """The sequence at a place of the queue, pulling requests until there is one; ``None``: none comes now."""
        while index >= len(self._waiting):
            pulled = pull()
            if pulled is None:
                return None
            self._waiting.extend(pulled)
        return self._waiting[index]

    def _start(self, sequence: Sequence) -> None:
        """The first waiting sequence was admitted."""
        self._waiting.popleft()
        self._running[sequence] = None

    def _add_chunk(self, packer: Packer, sequence: Sequence, most: int | None = None) -> None:
        start = sequence.num_computed
        most = packer.left if most is None else min(most, packer.left)
        length = min(sequence.num_to_compute - start, self._prefill_chunk, most)
        packer.add(sequence, start, length, self._kv.held[sequence])
