"""The engine on a GPU, against transformers on the same GPU. Skipped, and said so, where there is none."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import OPTForCausalLM

from engine import Engine, Generate, Generation, PlanOptions, Request, SamplingParams, Score, Scoring
from engine.devices.cuda import CudaDevice
from engine.loading import load_engine
from engine.memory.lane import LaneName, Reached
from engine.tiers import TierName
from engine.tokenizer import Tokenizer
from engine.units import MIB
from engine.weights.importers.huggingface import import_checkpoint
from tests.engine.checkpoints import Checkpoint, make_checkpoint
from tests.engine.placements import BESIDE_A_DEVICE, PLACEMENTS, options_of, scattered

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device here: run tests/gpu on a GPU machine"
)

BUDGETS = {"device_memory": 512 * MIB, "host_memory": 256 * MIB, "disk_space": 256 * MIB}
LENGTHS = (1, 9, 40, 130, 250)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    folder = tmp_path_factory.mktemp(request.param)
    made = make_checkpoint(folder / "hf", dtype=getattr(torch, request.param), num_hidden_layers=10, hidden_size=256,
                           word_embed_proj_dim=256, ffn_dim=512)  # fmt: skip
    import_checkpoint(folder / "hf", folder / "model")
    with exact_products():
        yield Checkpoint(folder / "model", made.model.to("cuda"))


@contextmanager
def exact_products() -> Iterator[None]:
    """The oracle's float32 must be float32."""
    was = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(was)


def texts() -> list[str]:
    return [
        "".join(chr(ord("a") + (index + i * i) % 26) for i in range(length)) for index, length in enumerate(LENGTHS)
    ]


def requests() -> list[Request]:
    greedy = SamplingParams(max_new_tokens=12, ignore_eos=True)
    drawn = SamplingParams(max_new_tokens=12, temperature=0.8, top_k=50, top_p=0.9, seed=3, ignore_eos=True)
    made = [Request(("greedy", i), Generate(text, greedy)) for i, text in enumerate(texts())]
    made += [Request(("drawn", i), Generate(text, drawn, sample_index=i)) for i, text in enumerate(texts())]
    return made + [Request(("score", i), Score(text, " and so on")) for i, text in enumerate(texts())]


def options(name: str, disk_dir: Path) -> PlanOptions:
    return options_of(name, device="cuda:0", **BUDGETS, **scattered(disk_dir))


def results(engine: Engine) -> dict[object, object]:
    found: dict[object, object] = {}
    for output in engine.run(requests()):
        assert isinstance(output.result, Generation | Scoring)
        found[output.key] = output.result.token_ids if isinstance(output.result, Generation) else output.result.logprob
    return found


@torch.no_grad()
def oracle_logprobs(model: OPTForCausalLM, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of each next token, float32 on the host."""
    return model(torch.tensor([ids], device="cuda")).logits[0].float().log_softmax(-1).cpu()


@pytest.mark.parametrize("name", [*PLACEMENTS, *BESIDE_A_DEVICE])
def test_every_placement_says_what_transformers_says(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Each greedy token is the likeliest, within rounding; scores are alike."""
    tokenizer = Tokenizer.load(checkpoint.folder / "tokenizer.json", 2)
    exact = checkpoint.model.dtype == torch.float32
    with load_engine(checkpoint.folder, options(name, tmp_path)) as engine:
        found = results(engine)
        engine.check_integrity()
        for tier in engine.tiers.values():
            assert tier.peak <= tier.budget
        # Spill files aside, resident weights are never read again.
        second = [report.stats.weight_bytes for report in engine.passes(iter(requests()))]
        assert (sum(second) == 0) == ({**PLACEMENTS, **BESIDE_A_DEVICE}[name]["weights"] == "100/0/0")
        assert results(engine) == found or not exact
    for index, text in enumerate(texts()):
        prompt = tokenizer.encode(text)
        generated = found["greedy", index]
        assert isinstance(generated, tuple)
        logprobs = oracle_logprobs(checkpoint.model, prompt + list(generated))[len(prompt) - 1 : -1]
        regret = logprobs.max(-1).values - logprobs[torch.arange(len(generated)), torch.tensor(generated)]
        assert float(regret.max()) <= (1e-4 if exact else 0.15)
        context, continuation = tokenizer.encode_pair(text, " and so on")
        scored = oracle_logprobs(checkpoint.model, context + continuation)[len(context) - 1 : -1]
        total = float(scored[torch.arange(len(continuation)), torch.tensor(continuation)].sum())
        assert found["score", index] == pytest.approx(total, abs=1e-3 if exact else 0.3)


@pytest.mark.parametrize("name", [name for name in (*PLACEMENTS, *BESIDE_A_DEVICE) if name != "all-device"])
def test_placements_agree_in_float32(name: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf", num_hidden_layers=10)
    import_checkpoint(tmp_path / "hf", tmp_path / "model")
    found = []
    for placement in ("all-device", name):
        with load_engine(tmp_path / "model", options(placement, tmp_path)) as engine:
            found.append(results(engine))
    for key, value in found[0].items():
        assert found[1][key] == (pytest.approx(value, abs=1e-3) if isinstance(value, float) else value)


def test_closing_gives_the_memory_back(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "model")
    load_engine(tmp_path / "model", options("all-host", tmp_path)).close()
    before = torch.cuda.memory_reserved()
    with load_engine(tmp_path / "model", options("all-device", tmp_path)) as engine:
        results(engine)
        assert torch.cuda.memory_allocated() <= engine.plan.budgets[TierName.DEVICE]
    assert torch.cuda.memory_reserved() <= before


def test_copies_keep_to_their_events() -> None:
    """A copy in waits for the compute it was told of, compute for the copy, and the host for the copy out."""
    device = CudaDevice(0)
    size = 64 * MIB
    source, back = device.allocate_host(size), device.allocate_host(size)
    assert source.is_pinned()
    memory, seen = device.allocate(size), device.allocate(size)
    with device.computing():
        for value in range(1, 6):
            source.fill_(value)
            copied = device.copy(LaneName.HOST_TO_DEVICE, [(memory, source)], device.compute_mark())
            device.compute_after(copied)
            seen.copy_(memory)
            device.copy(LaneName.DEVICE_TO_HOST, [(back, seen)], device.compute_mark()).wait()
            assert int(back.min()) == int(back.max()) == value
            span = copied.span()
            assert span is not None
            assert span[0] < span[1]
        assert device.download(seen[:1]).item() == 5
    device.close()


def test_weights_are_staged_while_compute_goes_on() -> None:
    """A copy that comes after nothing is over before the compute issued ahead of it."""
    device = CudaDevice(0)
    source, memory = device.allocate_host(MIB), device.allocate(MIB)
    with device.computing():
        x = torch.randn(8192, 8192, device=device.torch_device)
        for _ in range(20):
            x = x @ x
        busy = device.compute_mark()
        copied = device.copy(LaneName.HOST_TO_DEVICE, [(memory, source)], Reached())
        copied.wait()
        assert busy.span() is None
        busy.wait()
    device.close()
