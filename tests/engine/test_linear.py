"""Products with what follows them: the same as one after the other."""

import pytest
import torch

import engine.formats.linear as linear_module
from engine.formats.linear import linear

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("fuses", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_bias_and_relu(
    tokens: int, bias: bool, relu: bool, dtype: torch.dtype, fuses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fuses:
        monkeypatch.setattr(linear_module, "_has_onednn", lambda: False)
    torch.manual_seed(0)
    x, weight, offset = torch.randn(tokens, 48), torch.randn(24, 48), torch.randn(24)
    x, weight, offset = (part.to(dtype) for part in (x, weight, offset))
    expected = x.float() @ weight.float().T + (offset.float() if bias else 0)
    if relu:
        expected = expected.clamp_min(0)
    before = x.clone()
    found = linear(x, weight, offset if bias else None, relu=relu)
    assert found.dtype == dtype
    assert torch.equal(x, before)
    scale = 48**0.5
    torch.testing.assert_close(found.float(), expected, atol=TOLERANCE[dtype] * scale, rtol=TOLERANCE[dtype])
