"""Our plans in four bits, beside what FlexGen published of its own."""

import pytest

from benchmarks.claims.claim import Claim, Machine
from benchmarks.claims.listed import CLAIMS
from benchmarks.flexgen_table import (
    BOTH,
    COMPRESSED_ROWS,
    FORMATS,
    PLAIN,
    CompressedRow,
    document,
    in_four_bits,
    print_four_bits,
)
from engine.planner.advice import LEAST_GAIN
from engine.planner.hardware import UNPACKED_BYTES

CLAIMED = [each for each in CLAIMS if "_four_bits." in each.figure]
SAID = {
    "opt-30b": "best: plain with host attention; four bits gain nothing over plain",
    "opt-175b": "best: both with host attention; four bits gain ",
}


def claim_of(row: CompressedRow) -> Claim:
    (claim,) = (each for each in CLAIMED if each.figure.endswith(f".{row.model} {row.prompt_len}"))
    return claim


@pytest.mark.parametrize("row", COMPRESSED_ROWS, ids=lambda row: row.model)
def test_which_of_our_plans_is_best_beside_flexgen_in_four_bits(
    row: CompressedRow, capsys: pytest.CaptureFixture[str]
) -> None:
    """Plain, the 30B model finds room in host memory, and four bits only cost compute; 175B has to come from disk."""
    found = in_four_bits(row)
    rates = found["predicted_ours"]
    assert list(rates) == list(FORMATS)
    assert max(rates.values()) > 2 * row.published
    if row.model == "opt-30b":
        assert found["best"] == PLAIN
        assert found["gain"] < LEAST_GAIN
        assert found["details"][PLAIN]["host_attention"]
    else:
        assert found["best"] == BOTH
        assert rates[BOTH] >= 2.6
    claim = claim_of(row)
    assert claim.command == ("benchmarks.flexgen_table", "--json")
    line = claim.line_for(Machine.CUDA)
    assert line is not None
    assert line.is_met(claim.read(document([], [found])))
    print_four_bits([found])
    told = capsys.readouterr().out
    assert f"priced at {UNPACKED_BYTES} bytes" in told
    assert f"FlexGen (c) {row.published:.2f}" in told
    assert SAID[row.model] in told
    for name in FORMATS:
        (shown,) = (each for each in told.splitlines() if each.startswith(f"{name:<12} "))
        assert "device_compute" in shown
        assert "host_to_device" in shown
