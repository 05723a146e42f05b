"""A device whose attention kernel is wrong is refused before a model is computed with it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.attention import self_test
from engine.attention.packed import attend_packed, attend_part
from engine.attention.self_test import check_attention
from engine.attention.table import Kernel
from engine.dtypes import DType
from engine.errors import DeviceUnavailable
from engine.loading import load_engine
from engine.planner.plan import PlanOptions
from engine.shape import ModelShape
from engine.units import MIB
from engine.weights.importing import import_checkpoint
from tests.engine.checkpoints import make_checkpoint
from tests.engine.like_cuda import LikeCuda

KERNELS = [
    (Kernel.FLASH, DType.FLOAT16),
    (Kernel.FLASH, DType.BFLOAT16),
    (Kernel.EFFICIENT, DType.FLOAT16),
    (Kernel.EFFICIENT, DType.FLOAT32),
]


def shape(num_heads: int, num_kv_heads: int, head_size: int) -> ModelShape:
    return ModelShape(
        num_layers=1, hidden_size=num_heads * head_size, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_size=head_size, ffn_size=8, vocab_size=8, max_positions=64, bos_token_id=None, eos_token_ids=(2,),
        workspace_values=8,
    )  # fmt: skip


def device_with(kernel: Kernel) -> LikeCuda:
    """A card that has this kernel in half precision."""
    return LikeCuda((8, 0) if kernel is Kernel.FLASH else (7, 5))


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
@pytest.mark.parametrize("heads", [(12, 12, 64), (8, 2, 128), (3, 1, 8)])
def test_a_right_kernel(kernel: Kernel, dtype: DType, heads: tuple[int, int, int]) -> None:
    device = device_with(kernel)
    check_attention(device, dtype, shape(*heads))
    device.close()


Wrong = Callable[[pytest.MonkeyPatch], None]


def no_mask(patch: pytest.MonkeyPatch) -> None:
    """Every query sees every key."""
    kernels = torch.ops.overnight.attend_packed

    def call(*arguments: object) -> None:
        kernels(*arguments[:6], False, *arguments[7:])

    patch.setattr(torch.ops.overnight, "attend_packed", call)


def a_key_too_many(patch: pytest.MonkeyPatch) -> None:
    """It reads beyond the end of a sequence."""

    def call(kernel: Kernel, q: torch.Tensor, kv: torch.Tensor, ragged: self_test.Ragged, out: torch.Tensor) -> None:
        ragged.used.add_(1)
        attend_packed(kernel, q, kv, ragged, out)

    patch.setattr(self_test, "attend_packed", call)


def wrong_weights(patch: pytest.MonkeyPatch) -> None:
    """Its log-sum-exp is that of the base two, so that parts are merged with the wrong weights."""

    def call(*arguments: object, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = attend_part(*arguments, causal=causal)  # type: ignore[arg-type]
        return out, lse * 1.4427

    patch.setattr(self_test, "attend_part", call)


def nothing(patch: pytest.MonkeyPatch) -> None:
    """It was not compiled for this card, and did nothing."""
    patch.setattr(self_test, "attend_packed", lambda *_: None)
    patch.setattr(torch, "empty_like", torch.zeros_like)


@pytest.mark.parametrize("wrong", [no_mask, a_key_too_many, wrong_weights, nothing])
@pytest.mark.parametrize("kernel", list(Kernel))
def test_a_wrong_kernel(kernel: Kernel, wrong: Wrong, monkeypatch: pytest.MonkeyPatch) -> None:
    device = device_with(kernel)
    wrong(monkeypatch)
    with pytest.raises(DeviceUnavailable, match=rf"^the {kernel} attention of PyTorch 2.* on simulated is wrong in"):
        check_attention(device, DType.FLOAT16, shape(8, 2, 32))
    device.close()


def test_a_model_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that was allocated for it is left, and the device can be closed."""
    make_checkpoint(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "model")
    a_key_too_many(monkeypatch)
    options = PlanOptions(device_memory=64 * MIB, host_memory=64 * MIB)
    with pytest.raises(DeviceUnavailable, match="report this sentence"):
        load_engine(tmp_path / "model", options, device=LikeCuda((7, 5)))
