"""Measuring the machine: little of it, since what is measured is the same."""

import json
import threading
from contextlib import closing
from dataclasses import astuple, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.devices.host import HostDevice
from engine.errors import HardwareError
from engine.measure import QUICK, identity_of, measure
from engine.measure.overheads import Overheads
from engine.planner.hardware import LINKS, Hardware, Width
from engine.planner.profiles import load_hardware, profile_json
from engine.planner.rates import Figure, Rate, between
from engine.profile import keep_profile, store_profile, stored_profile
from tests.engine.like_cuda import LikeCuda


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("measured") / "spill"


@pytest.fixture(scope="module")
def measured(folder: Path) -> Hardware:
    before = set(threading.enumerate())
    found = measure(HostDevice(), folder, effort=QUICK)
    assert [thread.name for thread in threading.enumerate() if thread not in before] == []
    return found


@pytest.fixture(scope="module")
def measured_apart(tmp_path_factory: pytest.TempPathFactory) -> Hardware:
    """With copies as a GPU makes them."""
    with closing(LikeCuda()) as device:
        return measure(device, tmp_path_factory.mktemp("measured"), effort=QUICK)


@pytest.fixture(params=["measured", "measured_apart"])
def either(request: pytest.FixtureRequest) -> Hardware:
    hardware = request.getfixturevalue(request.param)
    assert isinstance(hardware, Hardware)
    return hardware


def test_every_figure_is_there_and_none_is_negative(either: Hardware) -> None:
    measured = either
    figures = measured.figures()
    assert {f"lanes.{lane}" for lane in LINKS} <= set(figures)
    assert {"widths.64.decode_attention", "widths.128.prompt_attention"} <= set(figures)
    assert ("scratch_attention" in figures) == measured.shares_host_memory != ("host_attention" in figures)
    assert {"kv_lanes.disk_read", "kv_lanes.disk_write", "sequence_overhead", "prompt_attention"} <= set(figures)
    for place, figure in figures.items():
        if isinstance(figure, Rate):
            assert all(rate > 0 for _, rate in figure.points), place
            assert 0 < figure.busy_share <= 1, place
        else:  # what is left of a difference may be nothing
            assert figure.value > 0 or (place.endswith("overhead") and figure.value == 0), place


seconds = st.floats(1e-6, 10)


@given(st.tuples(seconds, seconds, seconds, seconds))
def test_overheads_are_those_that_the_passes_were_made_of(parts: tuple[float, float, float, float]) -> None:
    of_pass, of_sequence, of_layer, of_segment = parts
    found = Overheads.of(
        {
            (layers, number): of_pass + number * of_sequence + layers * (of_layer + number * of_segment)
            for layers in (4, 16)
            for number in (1, 32)
        }
    )
    assert astuple(found) == pytest.approx(parts, abs=1e-7 * sum(parts))


@given(st.tuples(seconds, seconds, seconds, seconds))
def test_passes_that_contradict_each_other_give_no_overhead_below_nothing(
    pass_s: tuple[float, float, float, float],
) -> None:
    sizes = [(4, 1), (4, 32), (16, 1), (16, 32)]
    assert min(astuple(Overheads.of(dict(zip(sizes, pass_s, strict=True))))) >= 0


def test_products_are_a_curve_for_each_dtype_and_width(either: Hardware) -> None:
    measured = either
    assert [width.hidden_size for width in measured.widths] == [size for size, _ in QUICK.widths]
    for width in measured.widths:
        assert [tokens for tokens, _ in width.matmul["bfloat16"].points] == list(QUICK.tokens)
        assert [rows for rows, _ in width.head["bfloat16"].points] == list(QUICK.rows)
        assert set(width.matmul) == set(width.head) == {"bfloat16", "float32"}
    assert measured.matmul["bfloat16"].points == measured.widths[-1].matmul["bfloat16"].points


def test_nothing_is_left_in_the_folder(measured: Hardware, folder: Path) -> None:
    assert measured.name
    assert list(folder.iterdir()) == []


def test_an_interrupted_measurement_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(what: str) -> None:
        if what == "links":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(HostDevice(), tmp_path, effort=QUICK, say=interrupted)
    assert list(tmp_path.iterdir()) == []


def test_a_profile_survives_the_file(measured: Hardware, tmp_path: Path) -> None:
    path = store_profile(tmp_path / "home", measured)
    assert load_hardware(path) == measured
    assert (tmp_path / "home").stat().st_mode & 0o777 == 0o700
    stored = stored_profile(path)
    assert stored is not None
    assert stored.hardware == measured
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_profile_that_cannot_be_written_leaves_the_old_one(measured: Hardware, tmp_path: Path) -> None:
    path = store_profile(tmp_path, measured)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        store_profile(tmp_path, replace(measured, description=object()))  # type: ignore[arg-type]
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_another_machine_is_told_from_this_one(measured: Hardware, folder: Path, tmp_path: Path) -> None:
    here = identity_of(HostDevice(), folder)
    stored = stored_profile(store_profile(tmp_path, measured))
    assert stored is not None
    assert stored.is_of(here)
    assert {"device", "processor", "cores", "torch", "disk"} <= set(here)
    for key in here:
        assert not stored.is_of({**here, key: "another"}), key


def test_a_folder_that_cannot_be_written_costs_no_measurement(measured: Hardware, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    warned: list[str] = []
    keep_profile(tmp_path / "file", measured, warned.append)
    assert "cannot be kept" in warned[0]


def test_a_damaged_width_says_where(measured: Hardware, tmp_path: Path) -> None:
    data = profile_json(measured)
    path = tmp_path / "profile.json"
    for change, said in [
        ({"widths": {}}, "widths should be a list"),
        ({"widths": [{}]}, r"widths\[0\] has no"),
        ({"kv_lanes": {"disk_read": {"points": [[1]], "source": ""}}}, "points"),
        ({"widths": [data["widths"][0]] * 2}, "ascending"),  # type: ignore[index]
    ]:
        path.write_text(json.dumps(data | change))
        with pytest.raises(HardwareError, match=said):
            load_hardware(path)


curves = st.lists(st.tuples(st.floats(1, 4096), st.floats(1, 1e13)), min_size=1, max_size=5, unique_by=lambda p: p[0])


@given(curves, curves, st.integers(64, 20_000), st.floats(1, 4096))
def test_a_width_in_between_is_between(
    narrow: list[tuple[float, float]], wide: list[tuple[float, float]], size: int, tokens: float
) -> None:
    low, high = Rate(tuple(sorted(narrow)), "a test"), Rate(tuple(sorted(wide)), "a test")
    found = between({768: low, 2048: high}, size)
    if size <= 768:
        assert found == low
    elif size >= 2048:
        assert found == high
    else:
        for tokens_there, rate in found.points:
            rates = low.at(tokens_there), high.at(tokens_there)
            assert min(rates) * (1 - 1e-9) <= rate <= max(rates) * (1 + 1e-9)
        assert found.at(tokens) > 0


def test_what_a_width_lacks_comes_from_elsewhere(measured: Hardware) -> None:
    one = Rate.constant(1.0, "a test")
    narrow = Width(hidden_size=64, matmul={"bfloat16": one}, head={}, prompt_attention=one, decode_attention=one)
    hardware = replace(measured, widths=(narrow,), sequence_overhead=Figure(0, "a test"), kv_lanes={})
    assert hardware.prompt_rate(768) == hardware.decode_rate(768) == one
    assert replace(measured, widths=()).prompt_rate(768) == measured.prompt_attention
    assert hardware.matmul_rate("bfloat16", 768) == one
    assert hardware.head_rate("bfloat16", 768) == one
    assert hardware.matmul_rate("float32", 768) == measured.matmul["float32"]
    assert hardware.kv_rate(LINKS[0]) == measured.lanes[LINKS[0]]
    with pytest.raises(HardwareError, match="float16"):
        hardware.head_rate("float16", 768)
