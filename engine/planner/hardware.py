"""What a machine can do: capacities, throughputs and bandwidths. Units: bytes, seconds, FLOP (a multiplication and an
addition are two), tokens. Frozen values; no torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.dtypes import DType
from engine.errors import HardwareError
from engine.memory.lane import LaneName
from engine.planner.rates import Figure, Rate, between
from engine.tiers import TierName

LINKS = (LaneName.DISK_READ, LaneName.DISK_WRITE, LaneName.HOST_TO_DEVICE, LaneName.DEVICE_TO_HOST)
"""The lanes that move bytes; the other two compute."""
UNPACKED_BYTES = 7
"""Bytes that unpacking a value from four bits moves in a device's memory, at most: each step reads and writes all."""
PACKED_BYTES = 26
"""The same of packing one."""
CONTAINED = Figure(0, "contained in the other figures")
"""Stands for a cost that nobody measured by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """What products reach in a model of one hidden size: narrow layers, which stay in caches and in which more of the
    time goes to everything but products, differ from wide ones."""

    hidden_size: int
    matmul: Mapping[DType, Rate]
    """By dtype: FLOP/s of a layer's products, norms and residuals included, over the tokens of a micro-batch."""
    head: Mapping[DType, Rate]
    """By dtype: FLOP/s of logits, the choice of a token included, over the rows computed together."""
    prompt_attention: Rate
    decode_attention: Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One machine."""

    name: str
    description: str
    device: str
    """``cpu`` or ``cuda``."""
    shares_host_memory: bool
    """Device and host are one memory: nothing is copied between them, and host attention is the device's own."""
    capacity: Mapping[TierName, Figure]
    """Bytes of each tier that a process could take if the machine were its own."""
    matmul: Mapping[DType, Rate]
    """By dtype: FLOP/s of products with a layer's weights, over the tokens of a micro-batch."""
    prompt_attention: Rate
    """FLOP/s of attention over prompts on the device, over the tokens of a prompt."""
    decode_attention: Rate
    """Bytes of keys and values that decode attention reads on the device per second, over the bytes of one sequence."""
    host_attention: Rate | None
    """The same on the host, over keys and values that lie there; ``None``: the host does not attend."""
    lanes: Mapping[LaneName, Rate]
    """Bytes/s of each lane that moves bytes, over the bytes of a transfer."""
    layer_overhead: Figure
    """Seconds that a micro-batch costs in each layer however few tokens it has."""
    segment_overhead: Figure
    """Seconds that a sequence costs in each layer, whatever its length."""
    pass_overhead: Figure
    """Seconds before and after the layers of a pass, beside which nothing else is done."""
    sequence_overhead: Figure = CONTAINED
    """Seconds that a sequence costs in each pass, beside its layers."""
    host_overhead: Figure = CONTAINED
    """Seconds that a micro-batch's attention on the host takes in a layer whatever it attends to: the queries' way
    down, the results' way up, and what passes from thread to thread."""
    widths: tuple[Width, ...] = ()
    """By hidden size, ascending; empty: ``matmul`` holds for all, and for logits, too."""
    scratch_attention: Rate | None = None
    """As ``decode_attention``, over keys and values that pass through a scratch buffer, without the time of the lanes
    that fetch them, but with ``segment_overhead``; ``None``: nobody measured it, and it is taken to be the same."""
    kv_lanes: Mapping[LaneName, Rate] = field(default_factory=dict)
    """Lanes on which keys and values move at another rate than weights do: through a spill file and the page cache,
    over the bytes that one sequence moves in one layer."""
    unpacking: Figure | None = None
    """Values that are unpacked from four bits in a second; ``None``: nobody measured it, see ``unpack_rate``."""
    packing: Figure | None = None
    """Values that are packed in a second; ``None``: nobody measured it, see ``pack_rate``."""
    packed_decode: Rate | None = None
    """As ``decode_attention``, over a cache in four bits on the CPU, in bytes of what it stands for; ``None``: nobody
    measured it, and it is taken to be the same."""
    packed_host_attention: Rate | None = None
    """As ``host_attention``, likewise."""
    identity: Mapping[str, str] = field(default_factory=dict)
    """What tells this machine from others: processor, device, driver, when and with which version it was measured."""

    def __post_init__(self) -> None:
        missing = [str(tier) for tier in TierName if tier not in self.capacity]
        missing += [lane for lane in LINKS if lane not in self.lanes]
        if missing or not self.matmul:
            raise ValueError(f"no figure for {', '.join(missing) or 'matmul'}")
        sizes = [width.hidden_size for width in self.widths]
        if sizes != sorted(set(sizes)) or any(size < 1 for size in sizes):
            raise ValueError(f"widths must be of ascending hidden sizes, not {sizes}")

    def matmul_rate(self, dtype: DType, hidden_size: int | None = None) -> Rate:
        """Products in one dtype with the layers of a model of that hidden size; ``None``: of a wide one.

        Raises:
            HardwareError: nobody measured them.
        """
        curves = {width.hidden_size: width.matmul[dtype] for width in self.widths if dtype in width.matmul}
        if hidden_size is not None and curves:
            return between(curves, hidden_size)
        if dtype not in self.matmul:
            raise HardwareError(
                f"hardware profile {self.name!r} has no figure for products in {dtype}, only in "
                f"{', '.join(sorted(self.matmul))}: choose one of these with --dtype, or measure with "
                "overnight doctor --measure"
            )
        return self.matmul[dtype]

    def head_rate(self, dtype: DType, hidden_size: int) -> Rate:
        """Logits in one dtype; as the layers' products where nobody measured them.

        Raises:
            HardwareError: nobody measured those, either.
        """
        curves = {width.hidden_size: width.head[dtype] for width in self.widths if dtype in width.head}
        return between(curves, hidden_size) if curves else self.matmul_rate(dtype, hidden_size)

    def prompt_rate(self, hidden_size: int) -> Rate:
        """Attention over prompts on the device."""
        curves = {width.hidden_size: width.prompt_attention for width in self.widths}
        return between(curves, hidden_size) if curves else self.prompt_attention

    def decode_rate(self, hidden_size: int) -> Rate:
        """Decode attention on the device."""
        curves = {width.hidden_size: width.decode_attention for width in self.widths}
        return between(curves, hidden_size) if curves else self.decode_attention

    def unpack_rate(self, dtype: DType) -> float:
        """Values/s that are unpacked from four bits to ``dtype``.

        Where nobody measured it, by the bytes that its steps move, and the memory's speed.

        Raises:
            HardwareError: nobody measured that, either.
        """
        return self._memory_rate(dtype) / UNPACKED_BYTES if self.unpacking is None else self.unpacking.value

    def pack_rate(self, dtype: DType) -> float:
        """Values/s of ``dtype`` that are packed; where nobody measured it, likewise.

        Raises:
            HardwareError: nobody measured the memory's speed, either.
        """
        return self._memory_rate(dtype) / PACKED_BYTES if self.packing is None else self.packing.value

    def host_pack_rate(self, dtype: DType) -> float:
        """The same on the host, for what a device sends it: by how fast attention there reads its memory.

        Infinite where nobody measured that, since then nothing is known of the host.

        Raises:
            HardwareError: on a CPU, whose packing was not measured, nor its memory's speed.
        """
        if self.shares_host_memory:
            return self.pack_rate(dtype)
        return math.inf if self.host_attention is None else self.host_attention.fastest / PACKED_BYTES

    def _memory_rate(self, dtype: DType) -> float:
        """Bytes/s: products for one token do nothing but read weights."""
        return self.matmul_rate(dtype).at(1) / 2 * dtype.num_bytes

    def kv_rate(self, lane: LaneName) -> Rate:
        """A lane for keys and values."""
        return self.kv_lanes.get(lane, self.lanes[lane])

    def figures(self) -> dict[str, Figure | Rate]:
        """Every figure by its place in the JSON form."""
        found: dict[str, Figure | Rate] = {f"capacity.{tier}": figure for tier, figure in self.capacity.items()}
        found |= {f"matmul.{dtype}": rate for dtype, rate in self.matmul.items()}
        found |= {f"lanes.{lane}": rate for lane, rate in self.lanes.items()}
        for name in ("prompt_attention", "decode_attention", "host_attention", "scratch_attention"):
            rate = getattr(self, name)
            if rate is not None:
                found[name] = rate
        for name in ("layer_overhead", "segment_overhead", "pass_overhead", "sequence_overhead", "host_overhead"):
            found[name] = getattr(self, name)
        for name in ("unpacking", "packing", "packed_decode", "packed_host_attention"):
            figure = getattr(self, name)
            if figure is not None:
                found[name] = figure
        for width in self.widths:
            found |= {f"widths.{width.hidden_size}.matmul.{dtype}": rate for dtype, rate in width.matmul.items()}
            found |= {f"widths.{width.hidden_size}.head.{dtype}": rate for dtype, rate in width.head.items()}
            found[f"widths.{width.hidden_size}.prompt_attention"] = width.prompt_attention
            found[f"widths.{width.hidden_size}.decode_attention"] = width.decode_attention
        return found | {f"kv_lanes.{lane}": rate for lane, rate in self.kv_lanes.items()}
