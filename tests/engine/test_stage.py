"""Stages: a model cut in two gives what it gives in one piece, each part with a memory of its own."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from engine.devices.host import HostDevice
from engine.devices.open import facts_of
from engine.devices.simulated import SimulatedDevice
from engine.executor import Executor, SegmentResult
from engine.kvcache.cache import KVCache
from engine.memory.device import Device
from engine.memory.memory import Memory
from engine.model.family import Family
from engine.model.registry import family_for
from engine.planner.plan import Plan
from engine.planner.plan_input import PlanInput
from engine.planner.resolve import resolve_plan
from engine.request import SamplingParams
from engine.schedule.passes import Pass
from engine.schedule.scheduler import Scheduler
from engine.sequence import Sequence
from engine.stage import Stage
from engine.tiers import TierName
from engine.weights.files import WeightFiles
from engine.weights.importing import import_checkpoint
from engine.weights.layout import stored_in
from engine.weights.manifest import read_manifest
from tests.engine.checkpoints import make_checkpoint
from tests.engine.placements import options_of, scattered

NUM_LAYERS = 5
Found = dict[str, tuple[list[int], list[float]]]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    make_checkpoint(folder / "hf", num_hidden_layers=NUM_LAYERS, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64)
    import_checkpoint(folder / "hf", folder / "model")
    return folder / "model"


class Pipeline:
    """Stages one behind the other, and one scheduler for all of them."""

    def __init__(self, model_dir: Path, placement: str, cuts: list[int], make: Callable[[], Device]) -> None:
        manifest = read_manifest(model_dir)
        self._family: Family = family_for(manifest.config)
        device = make()
        plan = resolve_plan(
            PlanInput(
                options=options_of(placement, **scattered(model_dir)),
                shape=self._family.shape,
                stored=stored_in(manifest),
                device=device.name,
                facts=facts_of(device),
                disk_dir=model_dir,
            )
        )
        device.close()
        self._stack = ExitStack()
        self.stages: list[Stage] = []
        borders = [0, *cuts, NUM_LAYERS]
        for first, end in pairwise(borders):
            own: Plan = replace(plan, layers=plan.layers[first:end])
            memory = self._stack.enter_context(closing(Memory(make(), plan.budgets, model_dir)))
            stage = Stage(WeightFiles(model_dir, manifest), self._family, own, memory, range(first, end))
            self.stages.append(self._stack.enter_context(closing(stage)))
        # The same ranges of tokens in each: as many as the stage with the most layers has room for.
        tokens = {tier: min(stage.attention.tokens[tier] for stage in self.stages) for tier in TierName}
        self.kv = KVCache(
            tokens,
            extent_tokens=plan.extent_tokens,
            layouts=plan.kv_layouts,
            fills_together=True,
            claim=self._claim,
        )
        self.scheduler = Scheduler(
            self.kv,
            micro_batch=plan.micro_batch,
            micro_batches=plan.micro_batches,
            prefill_chunk=plan.prefill_chunk,
        )

    def _claim(self, tier: TierName, end: int) -> None:
        for stage in self.stages:
            stage.attention.claim(tier, end)

    def run(self, this_pass: Pass) -> list[SegmentResult]:
        arriving: list[torch.Tensor] = []
        for stage in self.stages:
            output = Executor(stage).run(this_pass, arriving)
            assert bool(output.hidden) == (not stage.has_head)
            arriving = [hidden.cpu() for hidden in output.hidden]
        return output.results

    def close(self) -> None:
        tiers = [tier for stage in self.stages for tier in stage.memory.tiers.values()]
        self._stack.close()
        assert all(tier.used == 0 for tier in tiers)


def sequences() -> dict[str, Sequence]:
    drawn = SamplingParams(temperature=0.8, seed=3)
    return {
        "long": Sequence(list(range(4, 104)), 100, 112, SamplingParams()),
        "short": Sequence([9, 8, 7], 3, 20, drawn),
        "scored": Sequence(list(range(20, 60)), 10, 40, score_from=10),
        "scored whole": Sequence(list(range(60, 80)), 10, 20, score_from=10),
        "late": Sequence(list(range(30, 90)), 60, 75, drawn),
    }


def outputs(pipeline: Pipeline, depth: int) -> Found:
    """What comes of all sequences, with up to ``depth`` passes begun before the first of them is completed."""
    running = sequences()
    waiting: Iterator[Sequence] = iter(running.values())
    scheduler = pipeline.scheduler
    begun: list[Pass] = []
    while True:
        this_pass = scheduler.next_pass(lambda: [one] if (one := next(waiting, None)) is not None else None)
        if this_pass.micro_batches:
            begun.append(this_pass)
        if not begun:
            break
        if len(begun) < depth and this_pass.micro_batches:
            continue
        done = begun.pop(0)
        results = pipeline.run(done)
        scheduler.completed(done)
        for result in results:
            sequence = result.segment.sequence
            sequence.scores += result.scores
            if result.next_token is not None:
                sequence.tokens.append(result.next_token)
            ended = len(sequence.tokens) == sequence.max_tokens
            if ended and (not sequence.is_scored or sequence.num_computed == sequence.num_to_compute):
                scheduler.retire(sequence)
    assert pipeline.kv.held_tokens == 0
    return {name: (one.tokens, [score for score, _ in one.scores]) for name, one in running.items()}


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> Found:
    with closing(Pipeline(model_dir, "all-device", [], HostDevice)) as whole:
        return outputs(whole, 1)


@pytest.mark.parametrize("placement", ["all-device", "all-host", "all-disk", "split"])
@pytest.mark.parametrize(("cuts", "depth"), [([], 2), ([2], 1), ([2], 2), ([1, 3], 3), ([1, 2, 3, 4], 1)])
@pytest.mark.parametrize("make", [HostDevice, SimulatedDevice])
def test_stages_give_what_the_whole_gives(
    model_dir: Path, expected: Found, placement: str, cuts: list[int], depth: int, make: type
) -> None:
    with closing(Pipeline(model_dir, placement, cuts, cast("Callable[[], Device]", make))) as pipeline:
        found = outputs(pipeline, depth)
    for name, (tokens, scores) in expected.items():
        assert found[name][0] == tokens
        assert found[name][1] == pytest.approx(scores, abs=1e-4)


def test_a_stage_holds_what_is_its_own(model_dir: Path) -> None:
    with closing(Pipeline(model_dir, "all-device", [2], HostDevice)) as pipeline:
        first, last = pipeline.stages
        assert (first.has_embedding, first.has_head) == (True, False)
        assert (last.has_embedding, last.has_head) == (False, True)
        # Tied: the last multiplies by the token table, which the first embeds with.
        assert set(first.weights._resident) == {"embed", "layer.0", "layer.1"}
        assert set(last.weights._resident) == {"embed", "layer.2", "layer.3", "layer.4", "head"}
        pools = {stage: cast("Any", stage.attention._runner)._pools for stage in pipeline.stages}
        per_layer = {stage: pools[stage]._token_bytes / len(stage.layers) for stage in pipeline.stages}
        assert len(set(per_layer.values())) == 1, "keys and values of its own layers alone"
