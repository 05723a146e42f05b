"""What can go wrong in the engine.

EngineError
├── PlanDoesNotFit      the plan needs more than a tier's budget; says what to change
├── TierFull            an allocation would exceed a tier's budget
├── DiskFull            the file system of a tier or model directory has no room left
├── CheckpointError     a model directory or checkpoint that is absent, half-written, damaged or unknown
├── DeviceUnavailable   the asked-for device is not there
├── DeviceFailed        the device is lost or in an unknown state: the process must end
├── Interrupted         what was under way was told to stop; nothing is wrong
├── HardwareError       a hardware profile that is damaged, of another version, or lacks a figure
│   ├── HardwareAbsent  no profile and no preset of that name
│   └── Unmeasurable    the budgets leave too little to measure the machine with
└── LaneFailed          a copy or read failed; its cause is chained

The texts are for people: what is wrong, where, and what to do.
"""


class EngineError(Exception):
    """Any failure of the engine that is not the fault of one request."""


class PlanDoesNotFit(EngineError):
    """The plan needs more than a tier's budget; raised before anything starts."""


class TierFull(EngineError):
    """An allocation would exceed a tier's budget."""


class DiskFull(EngineError):
    """The file system has no room left for a spill file or a model directory."""


class CheckpointError(EngineError):
    """A checkpoint or model directory that is absent, half-written, damaged or of an unknown kind."""


class DeviceUnavailable(EngineError):
    """The device asked for does not exist on this machine."""


class HardwareError(EngineError):
    """A hardware profile that is damaged, of another version, or that lacks a figure; says which."""


class HardwareAbsent(HardwareError):
    """There is neither a profile nor a preset of that name."""


class Unmeasurable(HardwareError):
    """The budgets leave too little to measure the machine with."""


class DeviceFailed(EngineError):
    """The device is lost, or in a state that nobody knows. Whatever else this process asks of it will fail, too: it
    must end, and what it was at is for another one."""


class Interrupted(EngineError):
    """What was under way was told to stop and did; nobody's work is at fault."""


class LaneFailed(EngineError):
    """A copy, read or write failed on its lane; the cause is chained."""
