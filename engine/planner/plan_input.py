"""Everything that a plan is made from, in one value. No torch."""

from dataclasses import dataclass, replace
from pathlib import Path

from engine.attention.int4_sizes import can_pack, kv_format, kv_room
from engine.attention.sizes import kv_bytes_per_token
from engine.attention.table import kernel_for
from engine.devices.facts import MachineFacts, free_disk_space
from engine.dtypes import DType
from engine.errors import PlanDoesNotFit
from engine.formats.sizes import Plain, TensorFormat
from engine.kvcache.cache import SequenceRoom
from engine.planner.plan import PlanOptions
from engine.planner.workload import Workload
from engine.shape import ModelShape
from engine.tiers import TierName
from engine.units import GIB, format_bytes
from engine.weights.stored import StoredWeights

DEVICE_SHARE, HOST_SHARE = 0.8, 0.7
"""The share of free memory that a plan takes unasked: the rest is for the page cache and for other people."""
GPU_SHARE, GPU_REST = 0.95, GIB
"""A plan takes this share of a GPU's own memory, or all but these bytes if that is less: nobody else needs it."""
DISK_SHARE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanInput:
    """A model, a machine, what a person fixed, and what is to be computed."""

    shape: ModelShape
    stored: StoredWeights
    device: str
    """The full name: ``cpu``, ``cuda:0``."""
    facts: MachineFacts
    """What the machine has free."""
    options: PlanOptions
    """What a person fixed."""
    disk_dir: Path
    """Where spill files go, unless ``options`` says."""
    workload: Workload | None = None
    """What will be computed; ``None``: nobody knows."""

    @property
    def dtype(self) -> DType:
        """As asked, else as the weights are stored; float16 where the device cannot compute as they are stored."""
        if self.options.dtype is not None:
            return self.options.dtype
        has_kernel = kernel_for(self.stored.dtype, self.facts.capability) is not None
        return self.stored.dtype if has_kernel else DType.FLOAT16

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values, over all layers."""
        return kv_bytes_per_token(self.shape, self.kv_format)

    @property
    def kv_format(self) -> TensorFormat:
        """How one head's keys or values of a token are stored: plain unless four bits are asked for."""
        return kv_format(self.options.kv_format or Plain.name, self.dtype, self.shape)

    @property
    def kv_room(self) -> SequenceRoom:
        """What a sequence takes of the KV cache."""
        return kv_room(self.shape, self.kv_format, self.dtype)

    @property
    def why_not_int4(self) -> str | None:
        """Why the KV cache cannot be stored in four bits; ``None``: it can."""
        if not can_pack(self.shape.head_size, turned=self.shape.turns_keys):
            return f"heads of {self.shape.head_size} values cannot be stored in four bits"
        return None

    @property
    def budgets(self) -> dict[TierName, int]:
        """Bytes that each tier may hold: as asked, else a share of what is free."""
        return budgets_of(self.options, self.facts, self.options.disk_dir or self.disk_dir)

    @property
    def longest(self) -> int:
        """KV tokens of the longest sequence: in the workload, or, where nobody knows it, that the model can take."""
        return self.shape.max_positions if self.workload is None else self.workload.longest

    def asking(self, options: PlanOptions) -> "PlanInput":
        """The same, but for what is fixed."""
        return replace(self, options=options)

    def within(self, budgets: dict[TierName, int]) -> "PlanInput":
        """The same within these budgets, in bytes."""
        return self.asking(
            replace(
                self.options,
                device_memory=budgets[TierName.DEVICE],
                host_memory=budgets[TierName.HOST],
                disk_space=budgets[TierName.DISK],
            )
        )


def budgets_of(options: PlanOptions, facts: MachineFacts, disk_dir: Path) -> dict[TierName, int]:
    """Bytes that each tier may hold: as asked, else a share of what is free."""
    device = options.device_memory if options.device_memory is not None else _unasked_device(facts)
    # Where device and host are one memory, a host tier would only be a second name for the same bytes.
    unasked_host = 0 if facts.shares_host_memory else int(facts.host_free * HOST_SHARE) // facts.gpus
    wants_host = options.activations == "host" or any(s is not None and s.host for s in (options.weights, options.kv))
    if facts.shares_host_memory and wants_host:
        unasked_host = device
    host = options.host_memory if options.host_memory is not None else unasked_host
    wants_disk = bool(options.kv and options.kv.disk) or options.activations == "disk"
    unasked_disk = int(free_disk_space(disk_dir) * DISK_SHARE) if wants_disk else 0
    disk = options.disk_space if options.disk_space is not None else unasked_disk
    return {TierName.DEVICE: device, TierName.HOST: host, TierName.DISK: disk}


def _unasked_device(facts: MachineFacts) -> int:
    least = int(facts.device_free * DEVICE_SHARE)
    if facts.shares_host_memory:
        return least
    return max(least, min(int(facts.device_free * GPU_SHARE), facts.device_free - GPU_REST))


def check_asked(options: PlanOptions, facts: MachineFacts, disk_dir: Path) -> None:
    """Raise ``PlanDoesNotFit`` where more is asked for than is free; ``disk_dir`` as in ``PlanInput``."""
    asked = {"device": (options.device_memory, facts.device_free), "host": (options.host_memory, facts.host_free)}
    for tier, (wanted, free) in asked.items():
        if wanted is not None and wanted > free:
            raise PlanDoesNotFit(
                f"--{tier}-memory asks for {format_bytes(wanted)}, and {format_bytes(free)} of {tier} memory are free "
                "here; ask for less, or end what holds the rest"
            )
    both = (options.device_memory or 0) + (options.host_memory or 0)
    if facts.shares_host_memory and both > facts.host_free:
        raise PlanDoesNotFit(
            f"--device-memory and --host-memory together ask for {format_bytes(both)} of one memory, and "
            f"{format_bytes(facts.host_free)} of it are free here; ask for less, or end what holds the rest"
        )
    folder = options.disk_dir or disk_dir
    if options.disk_space is not None and options.disk_space > (free := free_disk_space(folder)):
        raise PlanDoesNotFit(
            f"--disk-space asks for {format_bytes(options.disk_space)}, and {format_bytes(free)} are free for {folder};"
            " ask for less, or name another folder with --disk-dir"
        )
