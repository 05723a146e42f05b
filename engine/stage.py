"""A stage: some consecutive layers of a model on one device, with the embedding before and the head behind if its own.

One stage with all layers is the ordinary case; several, each with a memory of its own, are a pipeline.
"""

from collections.abc import Callable
from dataclasses import replace

from engine.activations import Activations
from engine.attention.attention import Attention
from engine.memory.closing import run_all
from engine.memory.memory import Memory
from engine.model.family import EMBED, HEAD, Family, layer_name
from engine.planner.plan import Plan
from engine.shape import ModelShape
from engine.tiers import TierName
from engine.weights.files import WeightFiles
from engine.weights.stream import WeightStream


def attention_of(shape: ModelShape, plan: Plan, memory: Memory) -> Attention:
    """Attention, with its keys and values, for layers of this shape, as the plan says.

    Raises:
        TierFull: a budget would be exceeded.
        DeviceUnavailable: the device has no kernel for the plan's number type.
    """
    return Attention(
        shape,
        plan.kv_format,
        plan.dtype,
        memory,
        tokens=plan.kv_tokens(shape),
        layouts=plan.kv_layouts,
        room=plan.kv_room,
        extent_tokens=plan.extent_tokens,
        num_slots=plan.kv_slots,
        group_tokens=plan.group_tokens,
        unpacked_tokens=plan.unpacked_tokens,
        kept_rows=plan.micro_batch,
        host_attends=plan.host_attention,
    )


class Stage:
    """Owns the weights, the keys and values and the activations of its layers."""

    def __init__(
        self, files: WeightFiles, family: Family, plan: Plan, memory: Memory, layers: range | None = None
    ) -> None:
        """Place everything as the plan says.

        Args:
            files: the model's; closed with the stage.
            family: the model's.
            plan: of this stage.
            memory: of this stage; stays the caller's to close.
            layers: consecutive ones; ``None``: all.

        Raises:
            TierFull: a budget would be exceeded, or the machine has less than the budget promises.
            CheckpointError: a file is damaged.
        """
        shape = family.shape
        self.family = family
        self.plan = plan
        self.memory = memory
        self.layers = range(shape.num_layers) if layers is None else layers
        self.has_embedding = self.layers.start == 0
        self.has_head = self.layers.stop == shape.num_layers
        shape = replace(shape, num_layers=len(self.layers))
        self._closers: list[Callable[[], None]] = [files.close]
        try:
            units = {layer_name(index): tier for index, tier in zip(self.layers, plan.layers, strict=True)}
            # Embedding and head stay on the device: a buffer to stream them through would be as large as they are.
            if self.has_embedding or (self.has_head and family.head_needs_embedding()):
                units = {EMBED: TierName.DEVICE, **units}
            if self.has_head:
                units[HEAD] = TierName.DEVICE
            # What lives no longer than one operation is not allocated here, and must find room all the same.
            on_device = memory.tiers[TierName.DEVICE]
            on_device.take(plan.workspace_bytes, "workspace")
            self._closers.append(lambda: on_device.give(plan.workspace_bytes, "workspace"))
            self.weights = WeightStream(
                files,
                memory,
                units=units,
                dtype=plan.dtype,
                num_slots=plan.staging_slots,
                num_unpacked=plan.unpack_slots,
                stay_packed=plan.stay_packed,
            )
            self._closers.append(self.weights.close)
            self.activations = Activations(memory, plan, shape.hidden_size)
            self._closers.append(self.activations.close)
            self.attention = attention_of(shape, plan, memory)
            self._closers.append(self.attention.close)
        except BaseException:
            self.close()
            raise

    def settle(self) -> None:
        """Wait for what the last pass left under way: a run may end here, and its figures must not miss any of it.

        Not for weights that are read ahead: they belong to whoever runs next.
        """
        with self.memory.device.computing():
            self.memory.device.compute_mark().wait()
            self.attention.settle()
            self.activations.settle()

    def close(self) -> None:
        """Free every byte. A second call does nothing.

        Raises:
            EngineError: the device or a lane failed meanwhile; everything was closed all the same.
        """
        closers, self._closers = self._closers, []
        run_all(reversed(closers))
