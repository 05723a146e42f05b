"""Products with what follows them: the same as one after the other."""

import pytest
import torch

import engine.formats.linear as linear_module
from engine.formats.linear import add_linear_, linear, logits

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(params=["fast", "matrix units", "slow"])
def has_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """As on this processor without matrix units and with, and as on one that multiplies float32 alone at full speed."""
    monkeypatch.setattr(linear_module, "has_matrix_units", lambda: request.param == "matrix units")
    if request.param == "slow":
        monkeypatch.setattr(linear_module, "has_products", lambda dtype: dtype == torch.float32)
        monkeypatch.setattr(linear_module, "_CAST", 10)  # the last of several casts is a smaller one
    return request.param != "slow"


@pytest.mark.usefixtures("has_products")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_bias_and_relu(tokens: int, bias: bool, relu: bool, dtype: torch.dtype) -> None:
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


@pytest.mark.usefixtures("has_products")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_a_product_is_added_to_what_is_there(tokens: int, padded: bool, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, offset, there = (torch.randn(*size).to(dtype) for size in ((tokens, 48), (24, 48), (24,), (tokens, 24)))
    expected = there.float() + x.float() @ weight.float().T + (offset.float() if bias else 0)
    wide = torch.cat((weight, torch.full((24, 16), 1000.0, dtype=dtype)), 1) if padded else weight
    add_linear_(there, x, wide, offset if bias else None)
    torch.testing.assert_close(there.float(), expected, atol=TOLERANCE[dtype] * 48**0.5, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_logits_are_float32(tokens: int, dtype: torch.dtype, has_products: bool) -> None:
    torch.manual_seed(0)
    x, table = torch.randn(tokens, 48).to(dtype), torch.randn(24, 48).to(dtype)
    expected = x.float() @ table.float().T
    found = logits(x, table)
    assert found.dtype == torch.float32
    exact = dtype == torch.float32 or (tokens > 1 and not has_products)  # then nothing is rounded to 16 bits
    tolerance = TOLERANCE[torch.float32] if exact else TOLERANCE[dtype]
    torch.testing.assert_close(found, expected, atol=tolerance * 48**0.5, rtol=tolerance)


@pytest.mark.usefixtures("has_products")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_what_pads_a_row_of_weights_counts_for_nothing(tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, offset = (torch.randn(*size).to(dtype) for size in ((tokens, 48), (24, 48), (24,)))
    wide = torch.cat((weight, torch.full((24, 16), 1000.0, dtype=dtype)), 1)
    before = x.clone()
    tolerance = TOLERANCE[dtype]
    for found, expected in (
        (linear(x, wide, offset), linear(x, weight, offset)), (logits(x, wide), logits(x, weight)),
    ):  # fmt: skip
        torch.testing.assert_close(found, expected, atol=tolerance * 48**0.5, rtol=tolerance)
    assert torch.equal(x, before)
