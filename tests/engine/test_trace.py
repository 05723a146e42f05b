"""The trace: it parses whenever it is read, lanes are one slice at a time, and its sums are those of the passes."""

import json
import threading
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine import Generate, PassReport, PassStats, PlanOptions, Request, SamplingParams, Score, Shares
from engine.devices.host import HostDevice
from engine.devices.simulated import SimulatedDevice
from engine.loading import load_engine
from engine.memory.device import Device, Pieces
from engine.memory.lane import Event as LaneEvent
from engine.memory.lane import LaneName
from engine.trace import TraceFile
from engine.units import KIB, MIB

Event = dict[str, Any]


def no_error(error: OSError) -> None:
    raise AssertionError(error)


def stats(**changes: Any) -> PassStats:
    figures: dict[str, Any] = {"lane_bytes": {}, "lane_seconds": {}, "weight_bytes": 0, "bound_by": "disk_read"}
    counts = {"prefill_tokens": 5, "decode_tokens": 7, "num_sequences": 8, "num_waiting": 1}
    return PassStats(**{"seconds": 1.0, **counts, **figures, **changes})


def read(path: Path) -> tuple[dict[int, str], list[Event]]:
    """The threads' names, and the slices in the order they were written."""
    events = json.loads(path.read_text())
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    return names, [{**event, "thread": names[event["tid"]]} for event in events if event["ph"] == "X"]


def requests() -> list[Request]:
    sampling = SamplingParams(max_new_tokens=6, ignore_eos=True)
    made = [Request(number, Generate("abcdefgh" * (1 + number % 3), sampling)) for number in range(6)]
    return [*made, Request("score", Score("some context", " and more"))]


PLACEMENTS: dict[str, dict[str, Any]] = {
    "resident": {"weights": Shares(100, 0, 0), "kv": Shares(100, 0, 0)},
    "host": {"weights": Shares(0, 100, 0), "kv": Shares(0, 100, 0), "activations": "host"},
    "disk": {"weights": Shares(0, 0, 100), "kv": Shares(0, 0, 100), "activations": "disk"},
}


@pytest.mark.parametrize("make_device", [HostDevice, lambda: SimulatedDevice(delay_s=0.0005)], ids=["cpu", "simulated"])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_slices_add_up_to_the_passes_and_never_overlap(
    name: str, make_device: Any, tiny_model: Path, tmp_path: Path
) -> None:
    device: Device = make_device()
    budgets = {"device_memory": 16 * MIB, "host_memory": 16 * MIB, "disk_space": 1 * MIB, "disk_dir": tmp_path}
    options = PlanOptions(**budgets, micro_batch=16, micro_batches=2, extent_tokens=32, **PLACEMENTS[name])
    trace = TraceFile(tmp_path / "trace.json", no_error)
    with load_engine(tiny_model, options, device=device, recorder=trace) as engine:
        passes = [report.stats for report in engine.passes(iter(requests()))]
        again = [report.stats for report in engine.passes(iter(requests()[:1]))]
    trace.close()

    _, slices = read(tmp_path / "trace.json")
    ends: dict[str, float] = defaultdict(float)
    for event in slices:
        assert event["ts"] >= ends[event["thread"]] - 0.002, "one at a time, in order"
        ends[event["thread"]] = event["ts"] + event["dur"]

    groups: list[list[Event]] = [[]]
    for event in slices:
        groups[-1].append(event)
        if event["thread"] == "passes":
            groups.append([])
    loading, *groups, rest = groups
    assert loading[-1]["name"] == "load"
    assert rest == []
    assert [group[-1]["name"] for group in groups] == [f"pass {number + 1}" for number in range(len(passes + again))]
    for group, figures in zip(groups, passes + again, strict=True):
        num_bytes: Counter[str] = Counter()
        busy: defaultdict[str, float] = defaultdict(float)
        for event in group[:-1]:
            num_bytes[event["thread"]] += event.get("args", {}).get("bytes", 0)
            busy[event["thread"]] += event["dur"] / 1e6
        assert dict(+num_bytes) == figures.lane_bytes
        assert dict(busy) == pytest.approx(figures.lane_seconds, abs=1e-6 * len(group))
        args = group[-1]["args"]
        assert (args["prefill_tokens"], args["decode_tokens"]) == (figures.prefill_tokens, figures.decode_tokens)
        assert args["bound_by"] == figures.bound_by
        assert figures.lane_seconds[figures.bound_by] == max(figures.lane_seconds.values())
        assert 0 < figures.lane_seconds["device_compute"] <= figures.seconds
    moves = name == "disk" or (name == "host" and not device.shares_host_memory)
    assert any(figures.lane_bytes for figures in passes) == moves
    computed = {event["name"] for group in groups for event in group if event["thread"] == "device_compute"}
    assert computed == {"embed", "layer.0", "layer.1", "head"}
    whats = {event["name"] for group in groups for event in group if event["thread"] != "device_compute"}
    assert ("KV cache" in whats) == ("activations" in whats) == moves


class Unhurried(SimulatedDevice):
    """Copies begin when somebody waits for them, and no sooner: whoever does not wait finds them under way."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._held: dict[LaneName, list[threading.Event]] = defaultdict(list)

    def copy(self, lane: LaneName, pieces: Pieces, after: LaneEvent) -> LaneEvent:
        wanted = threading.Event()
        with self._lock:
            self._held[lane].append(wanted)
            return Held(self, lane, wanted, super().copy(lane, pieces, When(wanted, after)))

    def begin(self, lane: LaneName, last: threading.Event) -> None:
        """Let the copies up to this one begin: a lane does one after another."""
        with self._lock:
            held = self._held[lane]
            upto = held.index(last) + 1 if last in held else 0
            for wanted in held[:upto]:
                wanted.set()
            del held[:upto]

    def close(self) -> None:
        for lane in LaneName:
            if held := self._held[lane]:
                self.begin(lane, held[-1])
        super().close()


@dataclass(frozen=True)
class When:
    """What a copy comes after: that it is wanted, and what it was to come after anyway."""

    wanted: threading.Event
    after: LaneEvent

    def wait(self) -> None:
        self.wanted.wait()
        self.after.wait()

    def span(self) -> tuple[float, float] | None:
        return self.after.span()


@dataclass(frozen=True)
class Held:
    """The end of a copy, which begins when this is waited for."""

    device: Unhurried
    lane: LaneName
    wanted: threading.Event
    copied: LaneEvent

    def wait(self) -> None:
        self.device.begin(self.lane, self.wanted)
        self.copied.wait()

    def span(self) -> tuple[float, float] | None:
        return self.copied.span()


def sums(reports: list[PassReport]) -> Counter[str]:
    """Bytes of a run, by lane."""
    return sum((Counter(report.stats.lane_bytes) for report in reports), Counter())


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_a_run_counts_every_byte_of_its_keys_and_values(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    """Two layers of 32 float32 keys and values a token: each goes away once and comes back for each later token."""
    options = PlanOptions(
        device_memory=16 * MIB, host_memory=16 * MIB, disk_space=16 * MIB, disk_dir=tmp_path,
        weights=Shares(100, 0, 0), kv=Shares.parse("0/100/0" if kind == "host" else "0/0/100"),
    )  # fmt: skip
    token_bytes = 2 * 2 * 32 * 4
    device = Unhurried() if kind == "host" else HostDevice()
    away, back = ("device_to_host", "host_to_device") if kind == "host" else ("disk_write", "disk_read")
    with load_engine(tiny_model, options, device=device) as engine:
        for wanted in (requests()[:6], requests()[:2], requests()[:6]):  # none of it is left for the run after it
            reports = list(engine.passes(iter(wanted)))
            usage = [(o.prompt_tokens, o.completion_tokens) for report in reports for o in report.outputs]
            # A sequence's last token is never computed with, and a prompt is computed in one pass.
            stored = sum(prompt + generated - 1 for prompt, generated in usage)
            brought = sum(prompt + step for prompt, generated in usage for step in range(generated - 1))
            assert len(reports) == 6
            assert sums(reports) == {away: stored * token_bytes, back: brought * token_bytes}


def test_a_run_counts_every_byte_of_its_hidden_states(tiny_model: Path, tmp_path: Path) -> None:
    """32 float32 values a token, which go away after the embedding and after each of two layers."""
    options = PlanOptions(
        device_memory=16 * MIB, host_memory=16 * MIB, disk_dir=tmp_path, activations="host",
        weights=Shares(100, 0, 0), kv=Shares(100, 0, 0),
    )  # fmt: skip
    with load_engine(tiny_model, options, device=Unhurried()) as engine:
        reports = list(engine.passes(iter(requests()[:6])))
    tokens = sum(report.stats.prefill_tokens + report.stats.decode_tokens for report in reports)
    moved = 3 * 32 * 4 * tokens  # as often back: each pass ends with the head
    assert sums(reports) == {"device_to_host": moved, "host_to_device": moved}


def test_compute_does_not_count_what_it_waits_for(tiny_model: Path, tmp_path: Path) -> None:
    """A layer's weights come when compute waits for them, so its compute must begin where their copy has ended."""
    options = PlanOptions(
        device_memory=16 * MIB, host_memory=16 * MIB, disk_dir=tmp_path, weights=Shares(0, 100, 0), kv=Shares(100, 0, 0)
    )
    trace = TraceFile(tmp_path / "trace.json", no_error)
    with load_engine(tiny_model, options, device=Unhurried(), recorder=trace) as engine:
        list(engine.passes(iter(requests()[:1])))
    trace.close()
    _, slices = read(tmp_path / "trace.json")
    copied = {each["name"]: each["ts"] + each["dur"] for each in slices if each["thread"] == "host_to_device"}
    began = {each["name"]: each["ts"] for each in reversed(slices) if each["thread"] == "device_compute"}
    for layer in ("layer.0", "layer.1"):
        assert began[layer] >= copied[layer] - 0.002, "both are rounded"


def test_the_file_is_whole_after_each_pass(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text("what was here before, and is longer than what comes next" * 100)
    trace = TraceFile(path, no_error)
    names, slices = read(path)
    assert set(names.values()) == {"passes", *LaneName}
    assert slices == []
    for number in range(1, 4):
        trace.moved(LaneName.DISK_READ, "layer.0", (1.0, 2.0), 5)
        assert len(read(path)[1]) == 2 * (number - 1), "written once a pass"
        trace.passed((1.0, 2.0), stats())
        assert len(read(path)[1]) == 2 * number
    lane, this_pass = read(path)[1][:2]
    assert (lane["thread"], lane["name"], lane["dur"], lane["args"]) == ("disk_read", "layer.0", 1e6, {"bytes": 5})
    assert (this_pass["thread"], this_pass["name"], this_pass["dur"]) == ("passes", "pass 1", 1e6)
    assert this_pass["args"] == {
        "prefill_tokens": 5, "decode_tokens": 7, "num_sequences": 8, "num_waiting": 1, "weight_bytes": 0,
        "bound_by": "disk_read",
    }  # fmt: skip
    trace.moved(LaneName.DISK_READ, "the last", (3.0, 4.0), 5)
    trace.close()
    assert read(path)[1][-1]["name"] == "the last"


def test_a_full_disk_ends_the_trace_and_nothing_else(tmp_path: Path) -> None:
    import resource
    import signal

    errors: list[OSError] = []
    trace = TraceFile(tmp_path / "trace.json", errors.append)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * KIB, limits[1]))
    try:
        for _ in range(1000):
            trace.moved(LaneName.DISK_READ, "layer.0", (1.0, 2.0), 5)
            trace.passed((1.0, 2.0), stats())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    trace.close()
    assert len(errors) == 1
    assert 10 < len(read(tmp_path / "trace.json")[1]) < 100
