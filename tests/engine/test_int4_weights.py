"""A model whose layers are stored in four bits: what transformers gives of the unpacked weights, wherever they lie."""

from dataclasses import replace
from itertools import product
from math import ceil
from pathlib import Path

import pytest
import torch
from _pytest.mark import ParameterSet
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine import PlanOptions
from engine.attention.sizes import kv_bytes_per_token
from engine.devices.host import HostDevice
from engine.devices.simulated import SimulatedDevice
from engine.dtypes import DType
from engine.formats.int4_sizes import Int4
from engine.loading import load_engine, plan_input
from engine.memory.traffic import Span
from engine.model.registry import sizes_for
from engine.planner.placing import WHOLE_KV_SHARE
from engine.planner.plan import Plan
from engine.planner.resolve import resolve_plan
from engine.schedule.passes import PassStats
from engine.tiers import Shares, TierName
from engine.tokenizer import Tokenizer
from engine.weights.importing import import_checkpoint
from engine.weights.manifest import Manifest, read_manifest
from tests.engine import llama_checkpoints
from tests.engine.checkpoints import make_checkpoint
from tests.engine.int4_reference import unpacked
from tests.engine.placements import BESIDE_A_DEVICE, PLACEMENTS, options_of, scattered
from tests.engine.test_import_int4 import raw_tensors
from tests.engine.test_llama import Imported, check
from tests.engine.test_placement import about, make_device, results

CASES: dict[str, tuple[str, int]] = {
    "opt": ("", 64),
    "opt, padded rows": ("odd", 64),
    "llama": ("llama, biases", 32),
}
"""Variant and group."""


def every_case() -> list[ParameterSet]:
    """Each model under each placement on each device, with layers that stay packed and others.

    A seventh of it; the rest is for ``make soak``.
    """
    placed = [
        *product(PLACEMENTS, ["cpu", "simulated", "like-cuda"]), *product(BESIDE_A_DEVICE, ["simulated", "like-cuda"]),
    ]  # fmt: skip
    every = enumerate(product(CASES, placed, [False, True]))
    return [
        pytest.param(case, name, kind, packed, marks=[pytest.mark.soak] if index % 7 else [])
        for index, (case, (name, kind), packed) in every
    ]


def round_model(manifest: Manifest, model_dir: Path, model: PreTrainedModel, dtype: DType = DType.FLOAT32) -> None:
    """Puts what the packed tensors stand for into the model that they were made of."""
    state = {name.removeprefix("model."): value for name, value in model.state_dict().items()}
    specs = {unit.name: unit for unit in sizes_for(manifest.config).units()}
    for unit in manifest.units:
        raw = raw_tensors(model_dir, unit.name)
        for spec in specs[unit.name].tensors:
            stored = unit.tensors[spec.name].format
            if not isinstance(stored, Int4):
                continue
            rows, width = spec.shape
            values = torch.from_numpy(unpacked(raw[spec.name], (rows, width), stored.group, dtype)[:, :width].copy())
            parts = torch.split(values, [shape[0] for shape in spec.source_shapes()])
            for source, part in zip(spec.sources, parts, strict=True):
                state[source].copy_(part)


@pytest.fixture(scope="module", params=CASES)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model in four bits, the checkpoint of what it stands for, and that as a plain model."""
    folder = tmp_path_factory.mktemp("int4")
    variant, group = CASES[request.param]
    if request.param.startswith("opt"):
        odd = {"hidden_size": 72, "word_embed_proj_dim": 72, "num_attention_heads": 3} if variant else {}
        make_checkpoint(folder / "hf", num_hidden_layers=10, **odd)
    else:
        llama_checkpoints.make_checkpoint(folder / "hf", variant, num_hidden_layers=10, initializer_range=0.15)
    manifest = import_checkpoint(folder / "hf", folder / "int4", matrices=Int4(group))
    model = AutoModelForCausalLM.from_pretrained(folder / "hf")
    round_model(manifest, folder / "int4", model)
    model.save_pretrained(folder / "hf-rounded")
    for name in ("tokenizer.json",):
        (folder / "hf-rounded" / name).write_bytes((folder / "hf" / name).read_bytes())
    import_checkpoint(folder / "hf-rounded", folder / "plain")
    return folder / "int4", folder / "hf-rounded", folder / "plain"


@pytest.fixture(scope="module")
def expected(folders: tuple[Path, Path, Path]) -> dict[object, object]:
    with load_engine(folders[2], options_of("all-device"), device=HostDevice()) as engine:
        return about(results(engine))


@pytest.mark.parametrize(("folders", "name", "kind", "stay_packed"), every_case(), indirect=["folders"])
def test_outputs_are_those_of_the_unpacked_weights(
    folders: tuple[Path, Path, Path],
    name: str,
    kind: str,
    stay_packed: bool,
    tmp_path: Path,
    expected: dict[object, object],
) -> None:
    options = options_of(name, stay_packed=stay_packed, **scattered(tmp_path))
    with load_engine(folders[0], options, device=make_device(kind)) as engine:
        assert engine.plan.stay_packed == stay_packed
        assert results(engine) == expected
        engine.check_integrity()
        for tier in engine.tiers.values():
            assert tier.peak <= tier.budget


@pytest.mark.parametrize("folders", ["llama"], indirect=True)
@pytest.mark.parametrize("placement", ["all-device", "all-disk"])
def test_tokens_and_scores_are_transformers(folders: tuple[Path, Path, Path], placement: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders[1]).eval()
    tokenizer = Tokenizer.load(folders[0] / "tokenizer.json", None)
    imported = Imported(llama_checkpoints.Oracle(model), folders[0], tokenizer)
    with load_engine(folders[0], options_of(placement, **scattered(tmp_path)), device=HostDevice()) as engine:
        check(engine, imported)


@pytest.mark.parametrize("folders", ["opt"], indirect=True)
@pytest.mark.parametrize("dtype", [DType.BFLOAT16, DType.FLOAT16])
@pytest.mark.parametrize("kind", ["cpu", "simulated"])
def test_in_half_precision_unpacked_weights_are_rounded_as_described(
    dtype: DType, kind: str, folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """The very same outputs as of a plain model with those weights."""
    model = AutoModelForCausalLM.from_pretrained(folders[1])
    round_model(read_manifest(folders[0]), folders[0], model, dtype)
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_bytes((folders[1] / "tokenizer.json").read_bytes())
    import_checkpoint(tmp_path / "hf", tmp_path / "plain", dtype)
    found = []
    for model_dir in (folders[0], tmp_path / "plain"):
        options = options_of("weights-on-disk", dtype=dtype, **scattered(tmp_path / "spill"))
        with load_engine(model_dir, options, device=make_device(kind)) as engine:
            found.append(results(engine))
    assert found[0] == found[1]


class Recorded:
    """What lanes did. Implements ``engine.trace.Recorder``."""

    def __init__(self) -> None:
        self.spans: dict[str, list[tuple[str, Span]]] = {}
        self.stats: list[PassStats] = []

    def moved(self, lane: str, what: str, span: Span, num_bytes: int) -> None:
        del num_bytes
        self.spans.setdefault(lane, []).append((what, span))

    def loaded(self, span: Span) -> None:
        self.spans.clear()

    def passed(self, span: Span, stats: PassStats) -> None:
        self.stats.append(stats)


@pytest.mark.parametrize("folders", ["opt"], indirect=True)
def test_a_layer_is_unpacked_once_a_pass_and_shown_so(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    recorder = Recorded()
    options = options_of("split", stay_packed=True, **scattered(tmp_path))
    with load_engine(folders[0], options, device=SimulatedDevice(), recorder=recorder) as engine:
        results(engine)
        layers = len(engine.plan.layers)
    unpacked_layers = [what for what, _ in recorder.spans["device_compute"] if what.startswith("unpack ")]
    passes = sum(stats.prefill_tokens + stats.decode_tokens > 0 for stats in recorder.stats)
    assert passes > 5
    assert unpacked_layers == [f"unpack layer.{index}" for index in range(layers)] * passes


@pytest.mark.parametrize("folders", ["opt"], indirect=True)
def test_a_pass_reads_the_packed_bytes_alone(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """A layer's bytes as they are stored, and nothing else, once a pass."""
    read = {}
    for model_dir in (folders[0], folders[2]):
        recorder = Recorded()
        options = options_of("weights-on-disk", **scattered(tmp_path))
        with load_engine(model_dir, options, device=HostDevice(), recorder=recorder) as engine:
            results(engine)
        units = [unit for unit in read_manifest(model_dir).units if unit.name.startswith("layer.")]
        late = [stats.lane_bytes["disk_read"] for stats in recorder.stats[2:-1]]
        read[model_dir.name] = sum(late) / len(late)
        assert read[model_dir.name] == pytest.approx(sum(unit.num_bytes for unit in units), rel=0.05)
    assert read["int4"] < 0.5 * read["plain"]


def plan_of(model_dir: Path, options: PlanOptions) -> Plan:
    device = SimulatedDevice()
    try:
        return resolve_plan(plan_input(model_dir, options, device))
    finally:
        device.close()


@pytest.mark.parametrize("folders", ["opt"], indirect=True)
def test_layers_stay_packed_only_where_not_all_fit_otherwise(folders: tuple[Path, Path, Path]) -> None:
    small = PlanOptions(micro_batch=16, micro_batches=1)
    everything = plan_of(folders[0], replace(small, weights=Shares(100, 0, 0), stay_packed=False))
    # Some of the device is kept for keys and values.
    enough = ceil(everything.other_bytes[TierName.DEVICE] / (1 - WHOLE_KV_SHARE))
    # A byte or two beside what is enough, since shares of bytes are rounded; and too little even for packed layers.
    for memory, stay_packed, on_device in ((enough + 1, False, 10), (enough - 2, True, 10), (enough * 2 // 5, True, 0)):
        plan = plan_of(folders[0], replace(small, device_memory=memory))
        assert plan.stay_packed == stay_packed
        assert plan.unpack_slots == int(stay_packed)
        assert plan.num_layers_in(TierName.DEVICE) == on_device


def test_a_plain_model_is_never_packed(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    options = options_of("weights-on-disk", stay_packed=True, **scattered(tmp_path))
    with load_engine(folders[2], options, device=HostDevice()) as engine:
        assert not engine.plan.stay_packed
        assert engine.plan.unpack_slots == 0


@pytest.mark.parametrize("folders", ["opt"], indirect=True)
def test_what_is_held_is_what_the_plan_says(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """To the byte."""
    shape = sizes_for(read_manifest(folders[0]).config).shape
    for name, attends in (("split", "off"), ("split-and-attended-on-host", "on")):
        options = options_of(name, stay_packed=True, **scattered(tmp_path))
        device = SimulatedDevice()
        plan = resolve_plan(plan_input(folders[0], replace(options, host_attention=attends), device))
        with load_engine(folders[0], replace(options, host_attention=attends), device=device) as engine:
            assert engine.plan == plan
            for tier, held in engine.tiers.items():
                if tier is not TierName.DISK:
                    kv_bytes = plan.kv_tokens(shape)[tier] * kv_bytes_per_token(shape, plan.kv_format)
                    planned = plan.other_bytes[tier] + kv_bytes
                    # Attention on the host is planned for a pool that fills the host.
                    assert held.used == planned or (attends == "on" and tier is TierName.HOST and held.used < planned)
            assert plan.unpack_slots == (2 if attends == "on" else 1)
