"""What the tests on a GPU share: when they are skipped, what they compute in, what they ask, and what is right.

What is right, transformers' class says in float32 on the CPU: it takes nothing of the card, and hardly rounds.
"""

import gc
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from engine import Engine, Generate, Generation, Output, PlanOptions, Request, SamplingParams, Score, Scoring
from engine.attention.table import Kernel, kernel_for
from engine.devices.cuda import CudaDevice
from engine.dtypes import DType
from engine.memory.tensors import torch_dtype
from engine.model.registry import sizes_for
from engine.tokenizer import Tokenizer
from engine.units import MIB
from engine.weights.importing import import_checkpoint
from engine.weights.manifest import TOKENIZER_NAME, read_manifest
from tests.engine.placements import options_of

if TYPE_CHECKING:  # transformers takes seconds, and a process of its own does without
    from tests.engine.llama_checkpoints import Oracle

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 1800
"""For one test: those of other processes that use the card come first."""
GPU = torch.device("cuda", 0)
AMPERE, TURING = (8, 0), (7, 5)
"""Compute capabilities: of the first cards with bfloat16 and flash attention, and of those before."""
BUDGETS = {"device_memory": 512 * MIB, "host_memory": 256 * MIB, "disk_space": 256 * MIB}
LENGTHS = (1, 9, 40, 130, 250)
EDGES = (1, 255, 256, 257, 1023, 1024, 1025)
"""Tokens of prompts on both sides of the sizes that kernels, extents and blocks have."""
MOST_POSITIONS = 1152
CONTINUATION = " and so on"
NEW_TOKENS = 12


def gpu_is_usable() -> bool:
    """Whether PyTorch can compute on a GPU here. A driver that is too old is a warning, which is an error in tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


ON_A_GPU = [
    pytest.mark.skipif(not gpu_is_usable(), reason="no CUDA device here: run tests/gpu on a GPU machine"),
    pytest.mark.timeout(TIMEOUT_S),
]
"""The marks of every module of these tests."""


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """A number type, and the card whose kernels compute in it."""

    dtype: DType
    capability: tuple[int, int] | None = None
    """The compute capability that the engine is told of; ``None``: the card's own."""

    def __str__(self) -> str:
        return str(self.dtype) if self.capability is None else f"{self.dtype}-as-before-ampere"

    @property
    def why_not(self) -> str | None:
        """Why this card has nothing to say of it; ``None``: it has."""
        own = torch.cuda.get_device_capability(GPU)
        if self.capability is None and self.kernel is None:
            return f"a card of compute capability {own[0]}.{own[1]} has no kernels for {self.dtype}"
        if self.capability is not None and own < AMPERE:
            return "this card is one from before Ampere, and is tested as such by the others"
        return None

    @property
    def kernel(self) -> Kernel | None:
        """What attends; ``None``: nothing does."""
        return kernel_for(self.dtype, self.capability or torch.cuda.get_device_capability(GPU))

    @property
    def torch_dtype(self) -> torch.dtype:
        """PyTorch's type of the same name."""
        return torch_dtype(self.dtype)

    def device(self) -> CudaDevice:
        """The card, opened: whoever loads an engine on it gives it away."""
        device = CudaDevice(0)
        if self.capability is not None:
            device.capability = self.capability
        return device


KINDS = (
    Arithmetic(DType.FLOAT16),  # the type of every OPT checkpoint
    Arithmetic(DType.FLOAT32),
    Arithmetic(DType.BFLOAT16),
    Arithmetic(DType.FLOAT16, TURING),
    Arithmetic(DType.FLOAT32, TURING),
)
REGRET = {DType.FLOAT32: 1e-4, DType.FLOAT16: 0.05, DType.BFLOAT16: 0.3}
"""How much likelier than a greedy token another may be, in natural logarithms: by rounding alone."""
SCORE_ERROR = {DType.FLOAT32: 1e-3, DType.FLOAT16: 0.1, DType.BFLOAT16: 0.6}
"""How far the summed log-probability of ``CONTINUATION`` may be off."""


def skip_without(kind: Arithmetic) -> None:
    """Skip the test that asks, if this card cannot compute so."""
    if (reason := kind.why_not) is not None:
        pytest.skip(reason)


@dataclass(frozen=True, slots=True)
class Model:
    """A model directory, and who knows what is right."""

    folder: Path
    tokenizer: Tokenizer
    oracle: "Oracle"


def opt_model(folder: Path, dtype: torch.dtype, **changes: Any) -> Model:
    """A random OPT model of ten layers with heads of 64."""
    from tests.engine.checkpoints import make_checkpoint

    sizes = {
        "num_hidden_layers": 10, "hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 512,
        "max_position_embeddings": MOST_POSITIONS,
    }  # fmt: skip
    make_checkpoint(folder / "hf", dtype=dtype, **{**sizes, **changes})
    return imported(folder)


def llama_model(folder: Path, variant: str, dtype: torch.dtype, **changes: Any) -> Model:
    """A random model of Llama's family."""
    from tests.engine.llama_checkpoints import make_checkpoint

    sizes = {
        "num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.1,
        "max_position_embeddings": MOST_POSITIONS,
    }  # fmt: skip
    make_checkpoint(folder / "hf", variant, dtype=dtype, **{**sizes, **changes})
    return imported(folder)


def imported(folder: Path) -> Model:
    """The checkpoint in ``folder / "hf"``, imported beside it.

    The oracle is loaded anew in float32: a model that is cast has rounded what it computes positions with.
    """
    from transformers import AutoModelForCausalLM

    from tests.engine.llama_checkpoints import Oracle

    import_checkpoint(folder / "hf", folder / "model")
    shape = sizes_for(read_manifest(folder / "model").config).shape
    tokenizer = Tokenizer.of_model(folder / "model" / TOKENIZER_NAME, shape)
    exact = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    return Model(folder / "model", tokenizer, Oracle(exact))


def options(name: str, disk_dir: Path, **more: Any) -> PlanOptions:
    """The options of a placement on the first card."""
    return options_of(name, device="cuda:0", **{**BUDGETS, "disk_dir": disk_dir, **more})


def texts(lengths: Sequence[int] = LENGTHS) -> list[str]:
    """Texts of the given numbers of letters, each of which is a token."""
    return [
        "".join(chr(ord("a") + (index + i * i) % 26) for i in range(length)) for index, length in enumerate(lengths)
    ]


def requests(some: Sequence[str], new_tokens: int = NEW_TOKENS) -> list[Request]:
    """Each text goes on greedily and drawn, and scores a continuation."""
    greedy = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    drawn = SamplingParams(
        max_new_tokens=new_tokens, temperature=0.8, top_k=50, top_p=0.9, seed=3, ignore_eos=True
    )  # fmt: skip
    made = [Request(("greedy", index), Generate(text, greedy)) for index, text in enumerate(some)]
    made += [Request(("drawn", index), Generate(text, drawn, sample_index=index)) for index, text in enumerate(some)]
    return made + [Request(("score", index), Score(text, CONTINUATION)) for index, text in enumerate(some)]


Found = dict[Hashable, tuple[int, ...] | float]
"""Token ids of what was generated and log-probabilities of what was scored, by key."""


def found_in(outputs: Iterable[Output]) -> Found:
    """What came of ``requests``."""
    found: Found = {}
    for output in outputs:
        result = output.result
        assert isinstance(result, Generation | Scoring), result
        found[output.key] = result.token_ids if isinstance(result, Generation) else result.logprob
    return found


def results(engine: Engine, some: Sequence[str]) -> Found:
    """What an engine makes of ``requests``."""
    return found_in(engine.run(requests(some)))


def about(found: Found) -> dict[Hashable, object]:
    """Tokens exactly, log-probabilities nearly, since what is computed together rounds otherwise."""
    return {key: pytest.approx(value, abs=1e-3) if isinstance(value, float) else value for key, value in found.items()}


def check(found: Found, model: Model, some: Sequence[str], dtype: DType) -> None:
    """Each greedy token is the likeliest, within rounding; scores are the oracle's."""
    for index, text in enumerate(some):
        prompt, generated = model.tokenizer.encode(text), found["greedy", index]
        assert isinstance(generated, tuple)
        assert len(generated) == NEW_TOKENS
        logprobs = model.oracle.logprobs((*prompt, *generated))[len(prompt) - 1 : -1]
        regret = logprobs.max(-1).values - logprobs[torch.arange(len(generated)), torch.tensor(generated)]
        assert float(regret.max()) <= REGRET[dtype], text
        context, continuation = model.tokenizer.encode_pair(text, CONTINUATION)
        scored = model.oracle.logprobs((*context, *continuation))[len(context) - 1 : -1]
        total = float(scored[torch.arange(len(continuation)), torch.tensor(continuation)].sum())
        assert found["score", index] == pytest.approx(total, abs=SCORE_ERROR[dtype]), text


def engine_threads() -> list[str]:
    """The names of the threads of engines that are not closed."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("overnight-")]


def free_memory() -> int:
    """Bytes of the card that nobody holds, once nothing is left over here."""
    gc.collect()
    torch.cuda.synchronize(GPU)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(GPU)[0]


def child_command(task: str, *arguments: str | Path) -> list[str]:
    """The command line of a process that does a task of ``tests.gpu.child``; to be run in ``ROOT``."""
    return [sys.executable, "-m", "tests.gpu.child", task, *map(str, arguments)]


def run_child(command: Sequence[str], **environment: str) -> str:
    """What a process said that ended well."""
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S - 60, env={**os.environ, **environment}
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout


def tell(capsys: pytest.CaptureFixture[str], text: str) -> None:
    """Print a figure, also where the test passes."""
    with capsys.disabled():
        sys.stdout.write(f"\n  {text}\n")
