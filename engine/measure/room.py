"""How much memory and disk measuring takes, and how much of it is done within given budgets."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.attention.int4_sizes import head_group, packing_bytes
from engine.attention.sizes import decode_workspace_bytes
from engine.devices.facts import MachineFacts, free_disk_space
from engine.dtypes import DType
from engine.errors import Unmeasurable
from engine.formats.int4_sizes import Int4
from engine.formats.sizes import TENSOR_FORMATS, Plain
from engine.measure.attention import cache_plan, cached_shape, measured_caches, qkv_tokens
from engine.measure.disk import copied_at_once
from engine.measure.effort import Effort
from engine.measure.overheads import MEMORY
from engine.measure.products import family_of
from engine.measure.streaming import MIN_STREAMED
from engine.measure.unpacking import unpacking_bytes
from engine.measure.widths import FEW_LAYERS
from engine.model.family import EMBED, HEAD, layer_name
from engine.planner.placing import BOUNCED_SLOTS, STAGING_SLOTS
from engine.planner.plan import PlanOptions
from engine.planner.plan_input import budgets_of
from engine.tiers import TierName
from engine.units import MIB, format_bytes
from engine.weights.layout import UnitLayout

_SMALL_THINGS = 16 * MIB
"""Bytes: pieces of files while they are written, rows of tokens, and the like."""


def measuring_budgets(options: PlanOptions, facts: MachineFacts, folder: Path) -> dict[TierName, int]:
    """Bytes of each tier that measuring may hold: what a plan may, and of a disk of which nothing was said, all."""
    budgets = budgets_of(options, facts, folder)
    if options.disk_space is None:
        budgets[TierName.DISK] = free_disk_space(folder)
    return budgets


def within(
    effort: Effort, budgets: Mapping[TierName, int], dtypes: Sequence[DType], facts: MachineFacts, device: str
) -> Effort:
    """The most effort that the budgets have room for.

    Raises:
        Unmeasurable: not even the least; the sentence says which tier is too small.
    """
    while True:
        needed = bytes_needed(effort, dtypes, facts, device)
        short = [tier for tier in TierName if needed[tier] > budgets[tier]]
        if not short:
            return effort
        smaller = effort.smaller()
        if smaller == effort:
            raise Unmeasurable(
                f"measuring this machine needs {format_bytes(needed[short[0]])} of {short[0]}, and the budget is "
                f"{format_bytes(budgets[short[0]])}"
            )
        effort = smaller


def bytes_needed(effort: Effort, dtypes: Sequence[DType], facts: MachineFacts, device: str) -> dict[TierName, int]:
    """Bytes of each tier that ``measure`` holds at its peak, temporaries of the operations included."""
    device_bytes, host_bytes = [2 * effort.small_transfer, MEMORY], [2 * effort.small_transfer, MEMORY]
    disk_bytes = [effort.streamed_bytes, max(effort.copies)]
    for hidden_size, number in effort.widths:
        of_width = _Width(hidden_size, number, effort, dtypes, facts, device)
        device_bytes += of_width.device_bytes()
        host_bytes += of_width.host_bytes()
        disk_bytes += of_width.disk_bytes()
    device_bytes.append(unpacking_bytes(effort.widths[-1][0], dtypes[0]))
    copied = max(size * copied_at_once(size) for size in effort.copies)
    device_bytes.append(2 * copied if facts.shares_host_memory else copied)
    host_bytes.append(copied)
    return {
        TierName.DEVICE: max(device_bytes) + _SMALL_THINGS,
        # One memory: everything was counted there.
        TierName.HOST: 0 if facts.shares_host_memory else max(host_bytes) + _SMALL_THINGS,
        TierName.DISK: max(disk_bytes) + _SMALL_THINGS,
    }


class _Width:
    """What ``width_of`` holds, step by step; the steps follow one another."""

    def __init__(
        self, hidden_size: int, number: int, effort: Effort, dtypes: Sequence[DType], facts: MachineFacts, device: str
    ) -> None:
        best = dtypes[0]
        self._shape = shape = cached_shape(hidden_size, effort)
        self._effort = effort
        self._threads = facts.attention_threads
        self._plans = {
            (tier, name): cache_plan(tier, name, device, best, shape, facts, effort)
            for tier, name in measured_caches(facts)
        }
        self._family = family_of(hidden_size, effort)
        self._dtypes = dtypes
        self._number = number
        self._layer = self._unit(layer_name(0), best)
        self._qkv = 3 * qkv_tokens(effort) * hidden_size * best.num_bytes
        self._shares = facts.shares_host_memory
        self._streamed = max(MIN_STREAMED * self._layer, effort.streamed_bytes)

    def device_bytes(self) -> list[int]:
        """What each step takes, workspace included."""
        slots = STAGING_SLOTS if self._shares else BOUNCED_SLOTS
        layers = {(TierName.DEVICE, Plain.name): self._number + slots}
        layers |= {(TierName.HOST, name): FEW_LAYERS for name in TENSOR_FORMATS}
        found = [
            plan.used_bytes[TierName.DEVICE]
            - plan.workspace_bytes
            + self._qkv
            + self._work(self._dtypes[0])
            + packing_bytes(self._shape, plan.kv_format, plan.dtype, plan.micro_batch, on_cpu=self._shares)
            + layers.get(cache, 0) * self._layer
            for cache, plan in self._plans.items()
        ]
        rows = max(self._effort.rows)
        for dtype in self._dtypes:
            found.append(FEW_LAYERS * self._unit(layer_name(0), dtype) + self._work(dtype))
            # Logits as computed, as float32, and what the choice of a token takes.
            logits = rows * self._shape.vocab_size * (dtype.num_bytes + 8)
            found.append(self._unit(EMBED, dtype) + self._unit(HEAD, dtype) + logits)
        return found

    def host_bytes(self) -> list[int]:
        """What each step takes where the device has memory of its own."""
        streams = self._shape.hidden_size <= self._effort.most_streamed_width
        caches = [plan.used_bytes[TierName.HOST] for plan in self._plans.values()]
        return [BOUNCED_SLOTS * self._layer if streams else 0, *caches]

    def disk_bytes(self) -> list[int]:
        """What each step takes: files of layers, or a spill file."""
        streams = self._shape.hidden_size <= self._effort.most_streamed_width
        return [self._streamed if streams else 0, self._plans[TierName.DISK, Plain.name].used_bytes[TierName.DISK]]

    def _work(self, dtype: DType) -> int:
        """What a layer and its attention take while they are computed."""
        tokens = max(*self._effort.tokens, *self._effort.lengths)
        values = tokens * (self._shape.workspace_values + self._shape.hidden_size)
        longest = max(self._effort.lengths)
        packed = Int4(head_group(self._shape.head_size))  # which takes a little more
        keys = decode_workspace_bytes(self._shape, packed, longest, self._threads, self._threads * longest)
        return values * dtype.num_bytes + keys

    def _unit(self, name: str, dtype: DType) -> int:
        unit = next(unit for unit in self._family.units() if unit.name == name)
        return UnitLayout.plain(unit, dtype).num_bytes
