"""The balance: on a machine of known speeds, passes come to last as long as the links, and not longer."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.memory.lane import LaneName
from engine.schedule.balance import MIN_PROMPT_TOKENS, RECENT, Balance
from engine.schedule.passes import PassStats


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


@dataclass(frozen=True)
class Machine:
    """A pass takes ``fixed_s`` and ``prompt_token_s`` for each prompt token to compute, and ``links_s`` to bring."""

    prompt_token_s: float = 1e-3
    fixed_s: float = 0.4
    links_s: float = 2.0

    @property
    def balanced(self) -> float:
        """Prompt tokens with which compute lasts as long as the links."""
        return (self.links_s - self.fixed_s) / self.prompt_token_s

    def run(self, balance: Balance, passes: int, shown: Callable[[int], float] = lambda _: 1.0) -> list[int]:
        """Prompt tokens of each pass; of pass ``n``, a part ``shown(n)`` of its compute is told."""
        found = []
        for index in range(passes):
            prefill = min(4096, balance.prompt_tokens or 4096)
            found.append(prefill)
            compute_s = self.fixed_s + self.prompt_token_s * prefill
            balance.learn(stats(compute_s * shown(index), self.links_s, prefill, 1))
        return found


PARTS = [0.1, 0.25, 4.0, 10.0]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("wrong", [20, 50, 99])
def test_one_pass_in_a_hundred_that_tells_nonsense_changes_nothing(part: float, wrong: int) -> None:
    machine = Machine()
    found = machine.run(Balance(), 130, lambda index: part if index == wrong else 1.0)
    assert found[15:] == pytest.approx([machine.balanced] * 115, rel=0.03)


@pytest.mark.parametrize("part", PARTS)
def test_nor_is_a_first_pass_believed_for_long(part: float) -> None:
    machine = Machine()
    found = machine.run(Balance(), 40, lambda index: 1.0 if index else part)
    assert found[20:] == pytest.approx([machine.balanced] * 20, rel=0.03)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("every", [3, 7, 20])
def test_passes_do_not_swing_though_some_show_a_part_of_their_compute(part: float, every: int) -> None:
    """As a pass does that is told of before its compute has ended."""
    machine = Machine()
    found = machine.run(Balance(), 200, lambda index: part if index % every == 1 else 1.0)
    assert found[40:] == pytest.approx([machine.balanced] * 160, rel=0.1)


@pytest.mark.parametrize(
    "then",
    [Machine(links_s=4.0), Machine(links_s=1.0), Machine(fixed_s=1.0), Machine(prompt_token_s=4e-3),
     Machine(prompt_token_s=5e-4)],
)  # fmt: skip
def test_a_change_that_lasts_is_believed(then: Machine) -> None:
    """A change of links or decoding after 2 passes, of prompts after 5; then the passes approach the new balance."""
    balance = Balance()
    Machine().run(balance, 50)
    after = then.run(balance, 40)
    assert after[RECENT:] != pytest.approx([Machine().balanced] * (40 - RECENT), rel=0.1)
    assert after[25:] == pytest.approx([min(4096, then.balanced)] * 15, rel=0.1)
