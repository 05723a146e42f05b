"""What a person asks of placement (``PlanOptions``) and what the engine holds to (``Plan``).

Frozen values; no torch.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from engine.attention.sizes import kv_bytes_per_token
from engine.dtypes import DType
from engine.formats.sizes import TENSOR_FORMATS, Plain, TensorFormat
from engine.kvcache.cache import Layout, SequenceRoom, unit_tokens
from engine.shape import ModelShape
from engine.tiers import Shares, TierName

AUTO = "auto"
"""Whichever is predicted to be faster."""
HOST_ATTENTION = (AUTO, "on", "off")
KV_CHOICES = (*TENSOR_FORMATS, AUTO)
SCHEDULES = ("mixed", "block")
"""Every pass with decode and prefill tokens both; or FlexGen's two phases, a block of sequences after the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What a person fixed by hand; whatever is ``None`` is chosen by the engine."""

    device: str | None = None
    """``cpu``, ``cuda:0`` or ``simulated``."""
    dtype: DType | None = None
    """Compute and KV cache; ``None``: as the weights are stored."""
    device_memory: int | None = None
    """Bytes of the device tier, workspace included."""
    host_memory: int | None = None
    disk_space: int | None = None
    """Bytes of spill files."""
    disk_dir: Path | None = None
    weights: Shares | None = None
    kv: Shares | None = None
    activations: str | None = None
    """Where hidden states wait between layers: ``device``, ``host`` or ``disk``."""
    micro_batch: int | None = None
    """Tokens computed together."""
    micro_batches: int | None = None
    """Micro-batches a pass, at most."""
    prefill_chunk: int | None = None
    """Prompt tokens of one sequence a pass, at most; ``None``: whatever fits."""
    extent_tokens: int | None = None
    """Tokens of one piece of KV cache, at most."""
    group_tokens: int | None = None
    """Tokens of KV cache that pass through a buffer at once; ``None``: by the device's budget, or two extents."""
    schedule: str | None = None
    """``mixed`` (the default) or ``block``."""
    host_attention: str | None = None
    """``on``, ``off``, or ``auto``: whichever is predicted to be faster."""
    kv_format: str | None = None
    """How keys and values are stored: ``plain`` (the default), ``int4``, or ``auto``: as is predicted to be faster."""
    stay_packed: bool | None = None
    """Whether layers on the device lie there as they are stored, to be unpacked in each pass; ``None``: only where not
    all of them fit otherwise."""

    def __post_init__(self) -> None:
        if self.dtype is not None:
            if self.dtype not in tuple(DType):
                raise ValueError(f"dtype must be one of {', '.join(DType)}, not {self.dtype!r}")
            object.__setattr__(self, "dtype", DType(self.dtype))
        if self.activations is not None and self.activations not in tuple(TierName):
            raise ValueError(f"activations must be device, host or disk, not {self.activations!r}")
        if self.schedule is not None and self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be {' or '.join(SCHEDULES)}, not {self.schedule!r}")
        if self.host_attention is not None and self.host_attention not in HOST_ATTENTION:
            raise ValueError(f"host_attention must be {', '.join(HOST_ATTENTION)}, not {self.host_attention!r}")
        if self.kv_format is not None and self.kv_format not in KV_CHOICES:
            raise ValueError(f"kv_format must be {', '.join(KV_CHOICES)}, not {self.kv_format!r}")
        for name in ("micro_batch", "micro_batches", "prefill_chunk", "extent_tokens", "group_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        for name in ("device_memory", "host_memory", "disk_space"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must not be negative, not {value}")

    @property
    def may_round(self) -> bool:
        """Whether keys and values may be stored in fewer bits than they are computed with; answers differ then."""
        return self.kv_format not in (None, Plain.name)


@dataclass(frozen=True, slots=True)
class Flag:
    """How an option is given on a command line, by the name that ``flag_name`` makes of the field's."""

    kind: Literal["device", "choice", "size", "folder", "shares", "count"]
    """What the text after it is read as; ``size`` is in bytes."""
    help: str
    choices: tuple[str, ...] = ()
    """Every value there is, for the kind ``choice``."""
    by_hand: bool = False
    """It fixes what the planner otherwise chooses; the others say where, and with how much memory, it may choose."""


FLAGS = {
    "device": Flag("device", "cpu, or a GPU: cuda:0. Default: the first GPU, else cpu."),
    "dtype": Flag("choice", "Number type of compute and KV cache. Default: as the weights are stored.", tuple(DType)),
    "device_memory": Flag("size", "Budget in device (GPU) memory, for example 4GiB."),
    "host_memory": Flag("size", "Budget in host (CPU) memory."),
    "disk_space": Flag("size", "Budget for spill files on disk."),
    "disk_dir": Flag("folder", "Where spill files go. Default: spill/ in OVERNIGHT_HOME."),
    "weights": Flag("shares", "Percent of the weights on each tier: 20/80/0.", by_hand=True),
    "kv": Flag("shares", "Percent of the KV cache on each tier: 0/100/0.", by_hand=True),
    "activations": Flag("choice", "Tier where hidden states wait between layers.", tuple(TierName), by_hand=True),
    "micro_batch": Flag("count", "Tokens that the device computes together.", by_hand=True),
    "micro_batches": Flag("count", "Micro-batches of a pass, at most.", by_hand=True),
    "schedule": Flag(
        "choice",
        "mixed: new sequences join the running ones in every pass; block: one block of sequences runs to its end "
        "before the next begins. Default: mixed.",
        SCHEDULES,
        by_hand=True,
    ),
    "kv_format": Flag(
        "choice",
        "int4: the KV cache takes less than a third of the memory, and answers change a little; auto: where that is "
        "predicted to be faster. Default: plain.",
        KV_CHOICES,
    ),
    "host_attention": Flag(
        "choice",
        "Beside a GPU, attend on the CPU for tokens whose KV cache is in host memory. Default: auto, what is faster.",
        HOST_ATTENTION,
        by_hand=True,
    ),
}
"""Those fields of ``PlanOptions`` that have a flag, in the order in which ``--help`` shows them."""


def flag_name(field_name: str) -> str:
    """``disk_dir`` → ``--disk-dir``."""
    return f"--{field_name.replace('_', '-')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Placement, batch shape and byte budgets, resolved and checked: it fits, or it was never made."""

    device: str
    dtype: DType
    budgets: Mapping[TierName, int]
    """Bytes each tier may hold."""
    disk_dir: Path
    layers: tuple[TierName, ...]
    """The tier of each layer's weights. Embedding and head stay on the device: every pass needs them, and a
    buffer to stream them through would be as large as they are."""
    kv_bytes: Mapping[TierName, int]
    """Bytes of KV cache each tier may hold; a sequence lives in one tier."""
    kv_fills_together: bool
    """Shares of the cache were asked for, so the tiers fill in proportion; else the device is filled first."""
    activations: TierName
    micro_batch: int
    micro_batches: int
    prefill_chunk: int
    extent_tokens: int
    kv_format: TensorFormat
    """How one head's keys or values of a token are stored."""
    kv_room: SequenceRoom
    """What a sequence takes of it, in tokens."""
    unpacked_tokens: int
    """Tokens whose keys and values are unpacked at a time; 0: they are never packed, or never unpacked."""
    kv_layouts: Mapping[TierName, Layout]
    """How a sequence lies in each tier."""
    group_tokens: int
    """Tokens of keys and values that pass through a buffer at once, from where compute cannot address them."""
    logits_rows: int
    """Rows of logits computed together, at most."""
    staging_slots: int
    """Device buffers that streamed layers pass through; 0 where every layer is resident."""
    kv_slots: int
    """Device buffers for a layer of ``group_tokens``, through which KV cache from elsewhere passes; 0 where there is
    none."""
    activation_slots: int
    """Device buffers for a micro-batch's hidden states, through which they pass where they live elsewhere, else 0."""
    workspace_bytes: int
    """Device bytes reserved for what lives no longer than one operation."""
    other_bytes: Mapping[TierName, int]
    """Bytes of each tier that everything but the KV cache takes."""
    schedule: str = SCHEDULES[0]
    """``mixed`` or ``block``."""
    host_attention: bool = False
    """Decode tokens whose keys lie in host memory are attended to there, beside the device."""
    weight_format: str = Plain.name
    """How the layers' matrices are stored."""
    stay_packed: bool = False
    """Layers on the device lie there as they are stored, and are unpacked in each pass."""
    unpack_slots: int = 0
    """Device buffers that layers are unpacked into, pass after pass; 0 where none is."""

    @property
    def used_bytes(self) -> dict[TierName, int]:
        """Bytes of each tier that are held once the KV cache is full; on disk, where it grows, at most."""
        return {tier: self.other_bytes[tier] + self.kv_bytes[tier] for tier in TierName}

    def kv_tokens(self, shape: ModelShape) -> dict[TierName, int]:
        """Tokens of KV cache each tier has room for."""
        token_bytes = kv_bytes_per_token(shape, self.kv_format)
        found = {}
        for tier, num_bytes in self.kv_bytes.items():
            tokens = num_bytes // token_bytes
            found[tier] = tokens - tokens % self.kv_unit(tier)
        return found

    def kv_unit(self, tier: TierName) -> int:
        """Tokens of which a sequence's room in a tier is a multiple."""
        return unit_tokens(self.kv_layouts[tier], self.extent_tokens)

    def largest_sequence(self, shape: ModelShape) -> int:
        """KV tokens of the longest sequence that finds room: it lives in one tier."""
        return self.kv_room.longest_in(max(self.kv_tokens(shape).values()))

    @property
    def tokens_per_pass(self) -> int:
        """Tokens one pass carries, at most."""
        return self.micro_batch * self.micro_batches

    def num_layers_in(self, tier: TierName) -> int:
        """How many layers live in a tier."""
        return self.layers.count(tier)

    def to_json(self) -> dict[str, object]:
        """Plain JSON values."""
        plan = asdict(self)
        plan["budgets"] = {str(tier): num_bytes for tier, num_bytes in self.budgets.items()}
        plan["other_bytes"] = {str(tier): num_bytes for tier, num_bytes in self.other_bytes.items()}
        plan["kv_bytes"] = {str(tier): num_bytes for tier, num_bytes in self.kv_bytes.items()}
        plan["kv_format"] = self.kv_format.name
        plan["layers"] = {str(tier): self.num_layers_in(tier) for tier in TierName}
        plan["disk_dir"] = str(self.disk_dir)
        return plan
