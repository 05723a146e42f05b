"""The balance: on a machine of known speeds, passes come to last as long as the links, and not longer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.balance import MIN_PROMPT_TOKENS, Balance
from engine.memory.lane import LaneName
from engine.passes import PassStats


def stats(compute_s: float, links_s: float, prefill: int, decode: int) -> PassStats:
    lanes = {LaneName.DEVICE_COMPUTE: compute_s} | ({LaneName.DISK_READ: links_s} if links_s else {})
    return PassStats(
        seconds=max(compute_s, links_s),
        prefill_tokens=prefill,
        decode_tokens=decode,
        num_sequences=1,
        num_waiting=9,
        lane_bytes={},
        lane_seconds={str(lane): seconds for lane, seconds in lanes.items()},
        weight_bytes=0,
        bound_by="",
    )


@given(
    prompt_token_s=st.floats(1e-4, 5e-3),
    decode_token_s=st.floats(0, 0.03),
    fixed_s=st.floats(0, 0.2),
    decode=st.integers(0, 20),
    links_s=st.floats(1.5, 10),
)
def test_compute_comes_to_last_as_long_as_the_links(
    prompt_token_s: float, decode_token_s: float, fixed_s: float, decode: int, links_s: float
) -> None:
    balance = Balance()
    prefill = 4096
    for _ in range(60):
        balance.learn(stats(fixed_s + prompt_token_s * prefill + decode_token_s * decode, links_s, prefill, decode))
        assert balance.prompt_tokens is not None
        prefill = balance.prompt_tokens
    compute_s = fixed_s + prompt_token_s * prefill + decode_token_s * decode
    assert compute_s == pytest.approx(links_s, rel=0.1) or prefill == MIN_PROMPT_TOKENS


def test_nothing_is_held_back_where_nothing_is_streamed() -> None:
    balance = Balance()
    for _ in range(3):
        balance.learn(stats(2.0, 0.0, 2048, 3))
    assert balance.prompt_tokens is None


def test_prompts_do_not_starve_where_decoding_alone_takes_longer_than_the_links() -> None:
    balance = Balance()
    for _ in range(20):
        balance.learn(stats(5.0, 1.0, balance.prompt_tokens or 2048, 500))
    assert balance.prompt_tokens == MIN_PROMPT_TOKENS


def test_passes_without_prompts_tell_what_decoding_takes() -> None:
    balance = Balance()
    balance.learn(stats(1.0, 2.0, 1000, 0))  # 1 ms a prompt token
    for _ in range(20):
        balance.learn(stats(0.5, 2.0, 0, 16))
    assert balance.prompt_tokens == pytest.approx(1500, abs=2)
