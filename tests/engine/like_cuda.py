"""The simulated device, with copies as CUDA issues them: by the calling thread, in whatever mode that thread is."""

import torch
from torch import Tensor

from engine.devices.simulated import SimulatedDevice, poison
from engine.memory.lane import Event, LaneName, Reached


class LikeCuda(SimulatedDevice):
    """What CUDA would refuse for the mode of a thread, it refuses."""

    def copy(self, lane: LaneName, destination: Tensor, source: Tensor, after: Event) -> Event:
        after.wait()
        with torch.inference_mode(destination.is_inference()):  # poisoning is no part of what CUDA does
            poison(destination)
        destination.copy_(source, non_blocking=True)
        return Reached()
