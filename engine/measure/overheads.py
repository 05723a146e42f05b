"""What passes, layers and sequences cost however little is computed: whole engines with models of almost nothing.

A decode pass of B sequences through L layers takes ``pass + B × sequence + L × (layer + B × segment)``; two numbers of
sequences and two depths tell the four.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from tokenizers import Tokenizer, models

from engine.dtypes import DType
from engine.loading import load_engine
from engine.measure.effort import Effort
from engine.memory.device import Device
from engine.memory.tensors import torch_dtype
from engine.model.registry import family_for, reference_config
from engine.planner.plan import PlanOptions
from engine.request import Generate, Request, SamplingParams
from engine.tiers import Shares
from engine.units import MIB
from engine.weights.layout import UnitLayout
from engine.weights.manifest import MANIFEST_NAME, TOKENIZER_NAME, Manifest, UnitEntry

_HIDDEN, _VOCABULARY, _PROMPT = 64, 64, 8
MEMORY = 32 * MIB
"""Bytes of device and host that these engines may take."""
_RUNS = 4
_FEW, _MANY = 1, 32
"""Sequences that decode side by side."""


@dataclass(frozen=True, slots=True)
class Overheads:
    """Seconds that passes take whatever they compute."""

    of_pass: float
    of_sequence: float
    """For each sequence, in each pass."""
    of_layer: float
    of_segment: float
    """For each segment, in each layer."""

    @classmethod
    def of(cls, pass_s: Mapping[tuple[int, int], float]) -> "Overheads":
        """Solved from passes through two depths with ``_FEW`` and ``_MANY`` sequences: seconds by (layers, sequences).

        Disturbed measurements may contradict each other: what is left of a difference is then nothing, not less.
        """
        shallow, deep = sorted({layers for layers, _ in pass_s})
        layers, sequences = deep - shallow, _MANY - _FEW
        few = (pass_s[deep, _FEW] - pass_s[shallow, _FEW]) / layers
        many = (pass_s[deep, _MANY] - pass_s[shallow, _MANY]) / layers
        segment = max(0.0, (many - few) / sequences)
        layer = max(0.0, few - _FEW * segment)
        ends = {number: pass_s[shallow, number] - shallow * (layer + number * segment) for number in (_FEW, _MANY)}
        sequence = max(0.0, (ends[_MANY] - ends[_FEW]) / sequences)
        return cls(max(0.0, ends[_FEW] - _FEW * sequence), sequence, layer, segment)


def overheads(device: Device, dtype: DType, folder: Path, effort: Effort) -> Overheads:
    """The overheads of this engine on this machine; ``folder`` receives two models of a few kilobytes.

    Raises:
        EngineError, OSError: the engine cannot be run, or nothing can be written.
    """
    found: dict[tuple[int, int], float] = {}
    for depth in effort.small_layers:
        model_dir = _small_model(folder / f"small-{depth}", depth, dtype)
        for number in (_FEW, _MANY):
            found[depth, number] = _pass_seconds(device, model_dir, number, effort)
    return Overheads.of(found)


def _pass_seconds(device: Device, model_dir: Path, number: int, effort: Effort) -> float:
    """Seconds of a decode pass of ``number`` sequences, from one report to the next: one of the shortest of many.

    Small differences of these are wanted, and disturbances only ever make a pass longer: hence not the median.
    """
    options = PlanOptions(
        device=device.name, device_memory=MEMORY, host_memory=MEMORY, disk_space=0, weights=Shares(100, 0, 0),
        kv=Shares(100, 0, 0), micro_batch=_MANY * _PROMPT,
    )  # fmt: skip
    found: list[float] = []
    with load_engine(model_dir, options) as engine:
        for again in range(_RUNS):
            before = perf_counter()
            for report in engine.passes(_requests(number, effort.small_steps)):
                effort.pause()
                now = perf_counter()
                if again and report.stats.decode_tokens == number and not report.stats.prefill_tokens:
                    found.append(now - before)  # the first time compiles
                before = now
    return sorted(found)[len(found) // 4]


def _requests(number: int, steps: int) -> Iterator[Request]:
    sampling = SamplingParams(max_new_tokens=steps + 2, ignore_eos=True)
    for index in range(number):
        yield Request(index, Generate("x" * (_PROMPT - 1), sampling))


def _small_model(path: Path, depth: int, dtype: DType) -> Path:
    """A model directory of random weights."""
    config = reference_config(_HIDDEN, head_size=_HIDDEN, num_layers=depth, vocab_size=_VOCABULARY, max_positions=128)
    path.mkdir()
    units = []
    for unit in family_for(config).units():
        layout = UnitLayout.plain(unit, dtype)
        values = torch.randn(layout.num_bytes // torch_dtype(dtype).itemsize).mul_(0.02).to(torch_dtype(dtype))
        data = values.view(torch.uint8).numpy().tobytes()
        (path / unit.name).write_bytes(data)
        checksum = f"sha256:{hashlib.sha256(data).hexdigest()}"
        units.append(UnitEntry(unit.name, unit.name, layout.num_bytes, checksum, layout.tensors))
    names = {name: index for index, name in enumerate(("<s>", "<pad>", "</s>", "<unk>", "x"))}
    Tokenizer(models.BPE(names, [])).save(str(path / TOKENIZER_NAME))
    manifest = Manifest(
        model_type=config["model_type"], config=config, dtype=dtype, units=tuple(units),
        num_bytes=sum(unit.num_bytes for unit in units), source="", created_by="",
    )  # fmt: skip
    (path / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return path
