"""Every compute operation on a GPU that is not there: fake tensors have a shape and a device, and no values.

What this holds: no host tensor is mixed into compute, nothing makes the host wait inside a pass, kernels of CUDA take
what they are given, and shapes come out right. Copies, streams and events cannot be faked; ``tests/gpu`` has those.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from engine.attention.kernels import merge
from engine.attention.packed import (
    Folding,
    Places,
    Ragged,
    attend_packed,
    attend_part,
    foldings_of,
    ragged_numbers,
    ragged_of,
)
from engine.attention.table import Kernel
from engine.devices.facts import MachineFacts
from engine.dtypes import DType
from engine.executor import Executor
from engine.kvcache.cache import KVCache
from engine.kvcache.segments import Segment, arrange
from engine.memory.device import Pieces
from engine.memory.lane import Event, LaneName, Reached
from engine.memory.memory import Memory
from engine.model.family import EMBED, HEAD, Family, NamedWeights, layer_name, run_layer
from engine.model.registry import family_for
from engine.model.sampling import next_tokens, score_tokens
from engine.planner.plan import Plan, PlanOptions
from engine.planner.plan_input import PlanInput
from engine.planner.resolve import resolve_plan
from engine.request import SamplingParams
from engine.schedule.passes import Pass
from engine.sequence import Sequence as Tokens
from engine.stage import Stage
from engine.tiers import Shares, TierName
from engine.units import MIB
from engine.weights.files import WeightFiles
from engine.weights.layout import Storing, stored_as
from engine.weights.manifest import UnitEntry
from tests.engine.checkpoints import SMALL, VARIANTS
from tests.engine.llama_checkpoints import SMALL as LLAMA

GPU = torch.device("cuda:0")
ON_DEVICE = Shares(100, 0, 0)
SYNCS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
}


class OneDevice(TorchDispatchMode):
    """Refuses operations over host and device tensors, and those that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if "cuda" in devices:
            assert func not in SYNCS, f"{func}: the host waits for the device"
            masks = [x for x in tensors if x.dtype == torch.bool]
            assert not (func.overloadpacket is torch.ops.aten.index and masks), f"{func}: the shape hangs on values"
            self.seen.add(func.overloadpacket.__name__)
        result = func(*args, **kwargs)
        if tensors:
            devices |= {x.device.type for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor)}
        assert len(devices) <= 1, f"{func}: host and device tensors"
        return result


class PlainIndexing(TorchFunctionMode):
    """Indexing by views and ``index_select``: Python's own asks for a CUDA that this build of PyTorch may not have."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return self.at(*args)
        if func is Tensor.__setitem__:
            target, index, value = args
            return torch.ops.aten.copy_(self.at(target, index), value)
        if func is Tensor.copy_:
            return torch.ops.aten.copy_(*args)
        if getattr(func, "__name__", "") == "data_ptr":
            return id(args[0])  # no two lie at one place
        return func(*args, **(kwargs or {}))

    def at(self, x: Tensor, index: Any) -> Tensor:
        items = index if isinstance(index, tuple) else (index,)
        dim = 0
        for place, item in enumerate(items):
            if item is None:
                x, dim = x.unsqueeze(dim), dim + 1
            elif item is Ellipsis:
                dim = x.dim() - sum(later is not None for later in items[place + 1 :])
            elif isinstance(item, slice):
                assert item.step is None
                x, dim = torch.ops.aten.slice(x, dim, item.start, item.stop), dim + 1
            elif isinstance(item, Tensor):
                assert item.device == x.device, "an index on the host would be copied, and the host would wait"
                x, dim = x.index_select(dim, item), dim + 1
            else:
                x = x.select(dim, item)
        return x


class Downloaded:
    """Values on the host, as far as they matter here."""

    def __init__(self, count: int) -> None:
        self.count = count

    def tolist(self) -> list[int]:
        return [0] * self.count


class FakeCuda:
    """What compute asks of a device, with fake memory; once weights are loaded, what moves between memories is
    refused."""

    name = "cuda:0"
    shares_host_memory = False
    torch_device = GPU
    loads = True

    def __init__(self, capability: tuple[int, int] | None = None) -> None:
        self.capability = capability

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=GPU)

    def allocate_host(self, num_bytes: int) -> Tensor:
        assert self.loads, "nothing lies on the host"
        return torch.empty(num_bytes, dtype=torch.uint8)

    def copy(self, lane: LaneName, pieces: Pieces, after: Event) -> Event:
        assert self.loads, "nothing moves in a pass"
        return Reached()

    def upload(self, values: Tensor) -> Tensor:
        assert values.device.type == "cpu"
        return torch.empty(values.shape, dtype=values.dtype, device=GPU)

    def download(self, values: Tensor) -> "Downloaded":
        """Fake tensors have no values."""
        assert values.device == GPU
        assert values.dim() == 1
        return Downloaded(len(values))

    def compute_mark(self) -> Reached:
        return Reached()

    @contextmanager
    def computing(self) -> Iterator[None]:
        yield


@pytest.fixture
def guard() -> Iterator[OneDevice]:
    one = OneDevice()
    with ExitStack() as stack:
        for mode in (torch.inference_mode(), FakeTensorMode(), one, PlainIndexing()):
            stack.enter_context(mode)
        yield one


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=GPU)


def assert_like(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert (x.device, tuple(x.shape), x.dtype) == (GPU, shape, dtype)


DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def config(**changes: object) -> dict[str, object]:
    return {"model_type": "opt", **SMALL, **changes}


def unit_weights(family: Family, dtype: torch.dtype) -> dict[str, NamedWeights]:
    return {
        unit.name: {spec.name: on_gpu(*spec.shape, dtype=dtype) for spec in unit.tensors} for unit in family.units()
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_embeds_computes_layers_and_ends_in_logits(
    variant: str, dtype: torch.dtype, guard: OneDevice
) -> None:
    family = family_for(config(**VARIANTS[variant]))
    shape = family.shape
    weights = unit_weights(family, dtype)
    ids = torch.empty(11, dtype=torch.int64, device=GPU)
    hidden = family.embed(weights[EMBED], ids, ids)
    assert_like(hidden, (11, shape.hidden_size), dtype)

    def attended(qkv: Tensor) -> Tensor:
        assert_like(qkv, (11, shape.num_heads + 2 * shape.num_kv_heads, shape.head_size), dtype)
        return torch.empty_like(qkv[:, : shape.num_heads])

    hidden = run_layer(family.layer(weights[layer_name(1)], hidden, family.prepare(ids, dtype)), attended)
    assert_like(hidden, (11, shape.hidden_size), dtype)
    table = weights[EMBED] if family.head_needs_embedding() else None
    assert_like(family.head(weights[HEAD], table, hidden), (11, shape.vocab_size), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("lengths", [(1, 1, 1), (33, 1, 20)])
def test_attention_of_many_sequences_in_every_branch(
    lengths: tuple[int, ...], kv_heads: int, dtype: torch.dtype, guard: OneDevice
) -> None:
    kernel = Kernel.EFFICIENT if dtype == torch.float32 else Kernel.FLASH
    places = Places(lengths, [5, 100, 300], [length + 40 for length in lengths])
    foldings = foldings_of(kernel, 4, kv_heads)

    def ragged(some: Places, folding: Folding) -> Ragged:
        return ragged_of(
            some, torch.empty(len(ragged_numbers(some, folding, is_part=True)), dtype=torch.int32, device=GPU), folding
        )

    rows = sum(lengths)
    q = on_gpu(rows, 12, 64, dtype=dtype)[:, :4]  # as it lies in the fused product
    pool, out = on_gpu(400, 2, kv_heads, 64, dtype=dtype), on_gpu(rows, 4, 64, dtype=dtype)
    attend_packed(kernel, q, pool, ragged(places, foldings.of(lengths)), out)
    seen = {name for name in guard.seen if "attn" in name or "attention" in name}
    assert seen == {"_efficient_attention_forward" if kernel is Kernel.EFFICIENT else "_varlen_attn_out"}
    for causal in (False, True):
        part = ragged(Places([lengths[0]], [0], [300]), foldings.of_prompts)
        found, lse = attend_part(kernel, q[: lengths[0]], pool, part, causal=causal)
        assert_like(found, (4, lengths[0], 64), dtype)
        assert_like(lse, (4, lengths[0]), torch.float32)
        assert_like(merge([(found, lse)] * 2)[0], (4, lengths[0], 64), dtype)


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_sampling_makes_no_host_wait(rows: int, guard: OneDevice) -> None:
    logits = on_gpu(rows, 500)
    mixed = [SamplingParams(temperature=row % 3 / 2, top_k=row % 7, top_p=0.9) for row in range(rows)]
    device = FakeCuda()
    for params in (mixed, [SamplingParams()] * rows, [SamplingParams(temperature=1.0)] * rows):
        assert_like(next_tokens(logits, params, [0.5] * rows, device.upload), (rows,), torch.int64)
    logprobs, greedy = score_tokens(logits, torch.empty(rows, dtype=torch.int64, device=GPU))
    assert_like(logprobs, (rows,), torch.float32)
    assert_like(greedy, (rows,), torch.bool)


class NoFiles(WeightFiles):
    """Units that lie as an import would store them, without a byte of them."""

    def __init__(self, family: Family, storing: Storing) -> None:
        self._units = {
            name: UnitEntry(name=name, file="", num_bytes=layout.num_bytes, checksum="", tensors=layout.tensors)
            for name, layout in storing.layouts(family.units()).items()
        }

    def read_unit(self, name: str, out: Tensor) -> int:
        return 0

    def close(self) -> None:
        pass


def plan_for(
    family: Family, storing: Storing, disk_dir: Path, capability: tuple[int, int] | None, **asked: Any
) -> Plan:
    dtype = storing.dtype
    options = PlanOptions(
        **{
            "dtype": dtype, "device_memory": 64 * MIB, "weights": ON_DEVICE, "kv": ON_DEVICE, "micro_batches": 3,
            "extent_tokens": 32, "stay_packed": storing.matrices is not None, **asked,
        }
    )  # fmt: skip
    return resolve_plan(
        PlanInput(
            options=options,
            shape=family.shape,
            stored=stored_as(family, storing),
            device="cuda:0",
            facts=MachineFacts(64 * MIB, 64 * MIB, shares_host_memory=False, capability=capability),
            disk_dir=disk_dir,
        )
    )


def sequences() -> dict[str, Tokens]:
    drawn = SamplingParams(temperature=0.7, top_k=5, top_p=0.9)
    return {
        "decoding": Tokens([5] * 41, 40, 60, SamplingParams(), num_computed=40),
        "drawn": Tokens([5] * 41, 40, 60, drawn, num_computed=40),
        "young": Tokens([5] * 11, 10, 60, drawn, num_computed=10),
        "prefilled": Tokens([5] * 90, 90, 110, SamplingParams(), num_computed=50),
        "new": Tokens([5] * 30, 30, 50, drawn),
        "scored": Tokens([5] * 20, 20, 20, score_from=12),
        "scored long": Tokens([5] * 90, 90, 90, score_from=55, num_computed=60),
    }


def one_pass(running: Mapping[str, Tokens], kv: KVCache) -> Pass:
    def segment(name: str, length: int, *, keeps_kv: bool = True) -> Segment:
        one = running[name]
        return Segment(one, one.num_computed, length, kv.held[one] if keeps_kv else None)

    first = arrange((segment("decoding", 1), segment("drawn", 1), segment("young", 1), segment("prefilled", 40)))
    second = arrange((segment("new", 20), segment("scored", 19, keeps_kv=False)))
    third = arrange((replace(segment("new", 10), start=20), segment("scored long", 29)))
    return Pass((first, second, third))


def make_executor(
    family: Family,
    storing: Storing,
    folder: Path,
    capability: tuple[int, int] | None,
    micro_batch: int = 48,
    **asked: Any,
) -> tuple[Executor, KVCache]:
    """On a card that is not there, with fake weights, which stay on the device as they are stored; in fake modes."""
    plan = plan_for(family, storing, folder, capability, micro_batch=micro_batch, **asked)
    device = FakeCuda(capability)
    memory = Memory(device, {**plan.budgets, TierName.DEVICE: 256 * MIB}, folder)  # type: ignore[arg-type]
    stage = Stage(NoFiles(family, storing), family, plan, memory)
    device.loads = False
    return Executor(stage), stage.attention.cache()


def run_fake(executor: Executor, kv: KVCache, running: Mapping[str, Tokens]) -> Sequence[Any]:
    for sequence in running.values():
        assert kv.admit(sequence)
    return executor.run(one_pass(running, kv)).results


@pytest.mark.parametrize(
    ("dtype", "capability", "kernel"),
    [
        (DType.FLOAT16, (7, 5), "_efficient_attention_forward"),
        (DType.FLOAT32, (9, 0), "_efficient_attention_forward"),
        (DType.FLOAT16, (8, 0), "_varlen_attn_out"),
        (DType.BFLOAT16, (9, 0), "_varlen_attn_out"),
    ],
)
@pytest.mark.parametrize("variant", ["125m-like", "350m-like"])
def test_a_whole_pass_stays_on_the_device(
    variant: str, dtype: DType, capability: tuple[int, int], kernel: str, guard: OneDevice, tmp_path: Path
) -> None:
    """Decode, prefill over extents, chunked prefill, scoring with and without a cache: what a pass may hold."""
    family = family_for(config(**VARIANTS[variant]))
    executor, kv = make_executor(family, Storing(dtype), tmp_path, capability)
    running = sequences()
    results = run_fake(executor, kv, running)
    found = {name: result for result in results for name, one in running.items() if result.segment.sequence is one}
    assert set(found) == set(running)
    assert all(found[name].next_token == 0 for name in ("decoding", "drawn", "young", "prefilled", "new"))
    assert len(found["scored"].scores) == 8
    assert len(found["scored long"].scores) == 29
    assert {name for name in guard.seen if "attn" in name or "attention" in name} == {kernel}


@pytest.mark.parametrize(("dtype", "capability"), [(DType.FLOAT16, (7, 5)), (DType.BFLOAT16, (9, 0))])
@pytest.mark.parametrize("model", ["opt", "llama"])
def test_a_whole_pass_over_a_cache_in_four_bits_stays_on_the_device(
    model: str, dtype: DType, capability: tuple[int, int], guard: OneDevice, tmp_path: Path
) -> None:
    """Windows that are full and not, and that become so."""
    family = family_for(config() if model == "opt" else {**LLAMA, "model_type": "llama"})
    executor, kv = make_executor(
        family, Storing(dtype), tmp_path, capability, kv_format="int4", extent_tokens=None, device_memory=256 * MIB
    )
    running = sequences()
    results = run_fake(executor, kv, running)
    assert {id(result.segment.sequence) for result in results} == {id(one) for one in running.values()}


def test_the_guard_sees_what_it_should(guard: OneDevice) -> None:
    """Each of these would be slow or wrong on a GPU, and the checks above rest on their being refused."""
    x, host = on_gpu(4, 4), torch.zeros(4, 4)
    faults: list[Callable[[], object]] = [
        lambda: x + host,
        lambda: x[torch.tensor([1, 2])],
        x[0, 0].item,
        lambda: x.masked_select(x > 0),
        x.cpu,
        lambda: bool((x > 0).all()),
    ]
    for fault in faults:
        with pytest.raises(Exception, match=r"host|device|_local_scalar_dense"):
            fault()
