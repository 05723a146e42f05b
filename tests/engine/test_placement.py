"""The same outputs wherever weights, KV cache and activations live; budgets are never exceeded."""

from collections.abc import Sequence as Several
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import OPTForCausalLM

from engine import Choose, Engine, Generate, Generation, PlanDoesNotFit, PlanOptions, Request, SamplingParams, Score
from engine.attention.pools import KVPools
from engine.attention.sizes import kv_bytes_per_token
from engine.devices.host import HostDevice
from engine.devices.simulated import SimulatedDevice
from engine.dtypes import DType
from engine.kvcache.cache import Move
from engine.loading import load_engine, plan_input
from engine.memory.device import Device
from engine.model.registry import sizes_for
from engine.planner.resolve import resolve_plan
from engine.tiers import Shares, TierName
from engine.tokenizer import Tokenizer
from engine.units import MIB
from engine.weights.importing import import_checkpoint
from engine.weights.manifest import read_manifest
from tests.engine.checkpoints import make_checkpoint
from tests.engine.like_cuda import CARDS, ROUNDING, Card, LikeCuda
from tests.engine.placements import BESIDE_A_DEVICE, BUDGETS, PLACEMENTS, options_of, scattered, spills

CLEAR = 0.1
"""By how much the likeliest token's logit must lead, for half precision to choose it whatever the order of its sums."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("placement")
    make_checkpoint(folder / "hf", num_hidden_layers=10)
    import_checkpoint(folder / "hf", folder / "model")
    return folder / "model"


def requests() -> list[Request]:
    greedy = SamplingParams(max_new_tokens=12, ignore_eos=True)
    drawn = SamplingParams(max_new_tokens=12, temperature=0.8, top_k=50, top_p=0.9, seed=3)
    made: list[Request] = []
    for index, length in enumerate((1, 9, 40, 70, 150, 33)):
        text = "".join(chr(ord("a") + (index + i * i) % 26) for i in range(length))
        made.append(Request(("greedy", index), Generate(text, greedy)))
        made.append(Request(("drawn", index), Generate(text, drawn, sample_index=index)))
        made.append(Request(("score", index), Score(text, " and so on")))
        made.append(Request(("choose", index), Choose(text, ("left", "right"))))
    return made


def results(engine: Engine, asked: Several[Request] | None = None) -> dict[object, object]:
    """Texts and tokens, or log-probabilities, by key: of all requests, or those that are asked."""
    found: dict[object, object] = {}
    for output in engine.run(asked or requests()):
        result = output.result
        if isinstance(result, Generation):
            found[output.key] = (result.text, result.finish_reason, result.token_ids)
        else:
            sums = result.logprobs if hasattr(result, "logprobs") else {"": result.logprob}
            found[output.key] = sums
    return found


def about(found: dict[object, object], dtype: DType = DType.FLOAT32) -> dict[object, object]:
    """Texts exactly, log-probabilities nearly, since the merge of pieces rounds otherwise."""
    near = ROUNDING[dtype]
    return {key: pytest.approx(value, abs=near) if isinstance(value, dict) else value for key, value in found.items()}


def make_device(kind: str) -> Device:
    kinds = {"cpu": HostDevice, "simulated": lambda: SimulatedDevice(delay_s=0.0002), "like-cuda": LikeCuda}
    return kinds[kind]()


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> dict[object, object]:
    with load_engine(model_dir, options_of("all-device"), device=HostDevice()) as engine:
        return about(results(engine))


@pytest.mark.parametrize(
    ("name", "kind"),
    [*product(PLACEMENTS, ["cpu", "simulated", "like-cuda"]), *product(BESIDE_A_DEVICE, ["simulated", "like-cuda"])],
)
def test_outputs_do_not_depend_on_placement(
    name: str, kind: str, model_dir: Path, tmp_path: Path, expected: dict[object, object]
) -> None:
    plan_options = options_of(name, **scattered(tmp_path))
    with load_engine(model_dir, plan_options, device=make_device(kind)) as engine:
        assert results(engine) == expected
        engine.check_integrity()
        for tier in engine.tiers.values():
            assert tier.peak <= tier.budget
        if "split" in name:
            assert all(engine.plan.kv_bytes[tier] for tier in TierName)
        assert (engine.tiers[TierName.DISK].peak > 0) == spills(name)
    assert list(tmp_path.iterdir()) == []


class OnCard(NamedTuple):
    """A model in a card's number type, and what comes of it if all lies on the device."""

    card: Card
    model_dir: Path
    asked: list[Request]
    expected: dict[object, object]


def is_greedy(request: Request) -> bool:
    return isinstance(request.work, Generate) and request.work.sampling.temperature == 0


@torch.no_grad()
def is_clear(model: OPTForCausalLM, prompt: list[int], tokens: tuple[int, ...]) -> bool:
    """Whether float32 chooses these tokens, too, and none of them just so: a near tie is anybody's."""
    logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    best, second = logits.topk(2).values.unbind(-1)
    return tuple(logits.argmax(-1).tolist()) == tokens and float((best - second).min()) > CLEAR


@pytest.fixture(scope="module", params=CARDS.values(), ids=list(CARDS))
def on_card(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OnCard:
    card: Card = request.param
    folder = tmp_path_factory.mktemp("card")
    model = make_checkpoint(folder / "hf", num_hidden_layers=10).model
    import_checkpoint(folder / "hf", folder / "model", dtype=card.dtype)
    tokenizer = Tokenizer.load(folder / "model" / "tokenizer.json", 2)
    asked = [each for each in requests() if isinstance(each.work, Score) or is_greedy(each)]
    with load_engine(folder / "model", options_of("all-device"), device=LikeCuda(card.capability)) as engine:
        found = results(engine, asked)
    for each in asked:
        result = found[each.key]
        is_text = isinstance(each.work, Generate) and isinstance(result, tuple)
        if is_text and not is_clear(model, tokenizer.encode(each.work.prompt), result[-1]):
            del found[each.key]
    assert sum(isinstance(result, tuple) for result in found.values()) >= 3
    return OnCard(card, folder / "model", asked, about(found, card.dtype))


@pytest.mark.parametrize("name", [*PLACEMENTS, *BESIDE_A_DEVICE])
def test_nor_do_they_in_half_precision_with_the_kernels_of_a_card(name: str, on_card: OnCard, tmp_path: Path) -> None:
    """But for near ties, and for drawn tokens, which half precision does not promise."""
    plan_options = options_of(name, **scattered(tmp_path))
    with load_engine(on_card.model_dir, plan_options, device=LikeCuda(on_card.card.capability)) as engine:
        assert engine.plan.dtype == on_card.card.dtype
        found = results(engine, on_card.asked)
        engine.check_integrity()
    assert {key: found[key] for key in on_card.expected} == on_card.expected


@pytest.mark.parametrize("kind", ["cpu", "simulated"])
@pytest.mark.parametrize("name", ["all-device", "all-host", "all-disk", "split"])
def test_weights_are_cast_as_they_are_staged(name: str, kind: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf", num_hidden_layers=5)
    import_checkpoint(tmp_path / "hf", tmp_path / "narrow", dtype=DType.BFLOAT16)
    make_checkpoint(tmp_path / "hf-bf16", dtype=torch.bfloat16, num_hidden_layers=5)
    import_checkpoint(tmp_path / "hf-bf16", tmp_path / "wide", dtype=DType.FLOAT32)
    found = []
    for folder in ("narrow", "wide"):
        chosen = options_of(name, dtype="float32", disk_dir=tmp_path / "spill")
        with load_engine(tmp_path / folder, chosen, device=make_device(kind)) as engine:
            found.append(results(engine))
            engine.check_integrity()
    assert found[0] == about(found[1])


def test_every_kv_tier_is_used_in_its_share(model_dir: Path, tmp_path: Path) -> None:
    """A budget so small that one tier alone could not hold what runs."""
    chosen = options_of(
        "split", weights=Shares(0, 0, 100),
        disk_dir=tmp_path, disk_space=1 * MIB, micro_batch=64, micro_batches=2, extent_tokens=32,
    )  # fmt: skip
    with load_engine(model_dir, chosen, device=SimulatedDevice()) as engine:
        lanes: dict[str, int] = {}
        for report in engine.passes(iter(requests())):
            for lane, num_bytes in report.stats.lane_bytes.items():
                lanes[lane] = lanes.get(lane, 0) + num_bytes
        assert lanes["disk_write"] > 0
        assert lanes["device_to_host"] > lanes["disk_write"]


@pytest.mark.parametrize("kind", ["simulated", "like-cuda"])
def test_sequences_that_are_moved_go_on(
    kind: str, model_dir: Path, expected: dict[object, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache for a few of them at once: who ends leaves a gap that is too short for the next."""
    moves: list[Move] = []
    move = KVPools.move
    monkeypatch.setattr(KVPools, "move", lambda self, one: moves.append(one) or move(self, one))
    device = make_device(kind)
    plan = resolve_plan(plan_input(model_dir, options_of("all-device", micro_batch=48, micro_batches=4), device))
    kv_bytes = {
        **plan.kv_bytes,
        TierName.DEVICE: 700 * kv_bytes_per_token(sizes_for(read_manifest(model_dir).config).shape, plan.kv_format),
    }
    with Engine.load(model_dir, replace(plan, kv_bytes=kv_bytes), device=device) as engine:
        assert results(engine) == expected
    assert len(moves) >= 3
    assert any(move.source - move.destination < move.num_tokens for move in moves), "none overlapped itself"


def test_resident_weights_are_read_once(model_dir: Path) -> None:
    with load_engine(model_dir, options_of("all-device")) as engine:
        first = [report.stats.weight_bytes for report in engine.passes(iter(requests()))]
        second = [report.stats.weight_bytes for report in engine.passes(iter(requests()))]
    assert first[0] > 0
    assert sum(first[1:]) + sum(second) == 0


def test_streamed_weights_are_read_every_pass(model_dir: Path) -> None:
    units = {unit.name: unit.num_bytes for unit in read_manifest(model_dir).units}
    layers = [num_bytes for name, num_bytes in units.items() if name.startswith("layer")]
    with load_engine(model_dir, options_of("weights-on-disk")) as engine:
        reports = list(engine.passes(iter(requests())))
        ring_bytes = engine.plan.staging_slots * max(layers)
    assert len(reports) > 2
    loaded = sum(units.values()) - sum(layers)
    streamed = sum(report.stats.weight_bytes for report in reports) - loaded
    # Once a pass; and perhaps already what the next pass would begin with.
    assert len(reports) * sum(layers) <= streamed <= len(reports) * sum(layers) + ring_bytes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device_memory": 100_000}, "--device-memory"),
        ({"weights": Shares(0, 100, 0), "host_memory": 1000}, "--host-memory"),
        ({"activations": "disk", "disk_space": 10}, "--disk-space"),
        ({"kv": Shares(50, 0, 50), "disk_space": 10}, "--kv"),
    ],
)
def test_a_plan_that_does_not_fit_says_what_to_change(
    changes: dict[str, object], words: str, model_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(PlanDoesNotFit, match=words):
        load_engine(model_dir, PlanOptions(**{**BUDGETS, "device": "cpu", "disk_dir": tmp_path, **changes}))  # type: ignore[arg-type]


def test_texts_do_not_depend_on_the_batch(model_dir: Path) -> None:
    """Float32, drawn: alone, together, and in another order."""
    with load_engine(model_dir, options_of("all-device")) as engine:
        together = {o.key: o.result.text for o in engine.run(requests()) if isinstance(o.result, Generation)}
        again = {o.key: o.result.text for o in engine.run(requests()[::-1]) if isinstance(o.result, Generation)}
        alone = {}
        for request in requests():
            if isinstance(request.work, Generate):
                (output,) = engine.run([request])
                alone[output.key] = output.result.text
    assert together == again == alone
