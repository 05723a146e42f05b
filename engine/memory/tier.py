"""A tier: a byte budget that allocation enforces. Everything that lives longer than one operation comes from one."""

from collections.abc import Callable

from torch import OutOfMemoryError, Tensor, inference_mode

from engine.errors import EngineError, TierFull
from engine.tiers import TierName
from engine.units import format_bytes


class Tier:
    """Counts the bytes held in one kind of memory and refuses to exceed the budget.

    ``check_integrity`` names both sides of the sum; ``peak`` is the most ever held.
    """

    def __init__(self, name: TierName, budget: int) -> None:
        self.name = name
        self.budget = budget
        self.used = 0
        self.peak = 0
        self._held: dict[str, int] = {}

    def take(self, num_bytes: int, what: str) -> None:
        """Count ``num_bytes`` as held.

        Raises:
            TierFull: the budget would be exceeded; nothing is counted then.
        """
        if self.used + num_bytes > self.budget:
            raise TierFull(
                f"{self.name} memory is full: {what} needs {format_bytes(num_bytes)}, "
                f"{format_bytes(self.budget - self.used)} of {format_bytes(self.budget)} are left"
            )
        self.used += num_bytes
        self.peak = max(self.peak, self.used)
        self._held[what] = self._held.get(what, 0) + num_bytes

    def give(self, num_bytes: int, what: str) -> None:
        """Count ``num_bytes`` as free again."""
        held = self._held.get(what, 0)
        if num_bytes > held:
            raise EngineError(f"{self.name}: {what} gives back {num_bytes} bytes and holds {held}")
        self._held[what] = held - num_bytes
        self.used -= num_bytes

    def check_integrity(self) -> None:
        """Raise ``EngineError`` unless the bytes in use are the sum of what is held."""
        held = sum(self._held.values())
        if held != self.used or not 0 <= self.used <= self.peak <= self.budget:
            raise EngineError(
                f"{self.name}: used {self.used}, held {held} ({self._held}), peak {self.peak}, budget {self.budget}"
            )


class MemoryTier(Tier):
    """A tier whose blocks are byte tensors."""

    def __init__(self, name: TierName, budget: int, allocator: Callable[[int], Tensor]) -> None:
        super().__init__(name, budget)
        self._allocator = allocator

    def allocate(self, num_bytes: int, what: str) -> "Block":
        """A block of ``num_bytes``, uninitialised.

        Raises:
            TierFull: the budget would be exceeded, or the machine has less than the budget promises.
        """
        self.take(num_bytes, what)
        try:
            # Lanes write into it in threads of their own, in whatever mode they are, so it must be a plain tensor.
            with inference_mode(False):
                return Block(self, self._allocator(num_bytes), what)
        except BaseException as error:
            self.give(num_bytes, what)
            if isinstance(error, MemoryError | OSError | OutOfMemoryError | TierFull):
                raise TierFull(
                    f"{self.name} memory: the machine has no {format_bytes(num_bytes)} left for {what}, although "
                    f"{format_bytes(self.used)} of a budget of {format_bytes(self.budget)} are used; "
                    f"lower --{self.name}-memory"
                ) from error
            raise


class Block:
    """Bytes of one tier, owned by whoever asked; ``release`` once."""

    def __init__(self, tier: MemoryTier, data: Tensor, what: str) -> None:
        self._tier = tier
        self._data: Tensor | None = data
        self._what = what

    @property
    def data(self) -> Tensor:
        """The bytes, ``uint8 [num_bytes]``."""
        if self._data is None:
            raise EngineError(f"{self._tier.name}: {self._what} was released")
        return self._data

    def release(self) -> None:
        """Give the bytes back; a second call does nothing."""
        if self._data is not None:
            self._tier.give(self._data.numel(), self._what)
            self._data = None
