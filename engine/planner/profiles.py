"""Profiles as files: what a machine can do, measured on it or shipped as a preset, in a versioned JSON form."""

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

from engine.dtypes import DType
from engine.errors import HardwareAbsent, HardwareError
from engine.memory.lane import LaneName
from engine.planner.hardware import CONTAINED, LINKS, Hardware, Width
from engine.planner.rates import Figure, Rate
from engine.tiers import TierName

FORMAT = "overnight hardware profile"
VERSION = 1


def preset_names() -> tuple[str, ...]:
    """The machines whose profiles are shipped."""
    names = (entry.name for entry in files("engine.planner").joinpath("presets").iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in names if name.endswith(".json")))


def load_hardware(name_or_path: str | Path) -> Hardware:
    """A shipped preset by its name, else a profile by its path.

    Raises:
        HardwareAbsent: there is no such preset or file.
        HardwareError: it is no profile.
    """
    if str(name_or_path) in preset_names():
        text = files("engine.planner").joinpath("presets", f"{name_or_path}.json").read_text(encoding="utf-8")
    else:
        path = Path(name_or_path)
        # No reader waits for a writer, or reads without an end.
        if path.exists() and not path.is_file():
            raise HardwareError(
                f"{str(name_or_path)!r} is no file; give a profile, or one of {', '.join(preset_names())}"
            )
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise HardwareAbsent(
                f"{str(name_or_path)!r} is neither a file nor a hardware preset; "
                f"presets are {', '.join(preset_names())}"
            ) from None
        except OSError as error:
            raise HardwareError(f"{str(name_or_path)!r} cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise HardwareError(f"{str(name_or_path)!r} is no hardware profile: it is not text") from error
    try:
        data = json.loads(text)
    except ValueError as error:
        raise HardwareError(f"{str(name_or_path)!r} is not JSON: {error}") from error
    return hardware_from_json(data, str(name_or_path))


def profile_json(hardware: Hardware) -> dict[str, object]:
    """Plain JSON values that ``hardware_from_json`` takes back."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "name": hardware.name,
        "description": hardware.description,
        "identity": dict(hardware.identity),
        "device": hardware.device,
        "shares_host_memory": hardware.shares_host_memory,
        "capacity": {str(tier): _figure_json(figure) for tier, figure in hardware.capacity.items()},
        "matmul": {dtype: _rate_json(rate) for dtype, rate in hardware.matmul.items()},
        "prompt_attention": _rate_json(hardware.prompt_attention),
        "decode_attention": _rate_json(hardware.decode_attention),
        "host_attention": None if hardware.host_attention is None else _rate_json(hardware.host_attention),
        "lanes": {str(lane): _rate_json(rate) for lane, rate in hardware.lanes.items()},
        "layer_overhead": _figure_json(hardware.layer_overhead),
        "segment_overhead": _figure_json(hardware.segment_overhead),
        "pass_overhead": _figure_json(hardware.pass_overhead),
        "sequence_overhead": _figure_json(hardware.sequence_overhead),
        "host_overhead": _figure_json(hardware.host_overhead),
        "widths": [
            {
                "hidden_size": width.hidden_size,
                "matmul": {dtype: _rate_json(rate) for dtype, rate in width.matmul.items()},
                "head": {dtype: _rate_json(rate) for dtype, rate in width.head.items()},
                "prompt_attention": _rate_json(width.prompt_attention),
                "decode_attention": _rate_json(width.decode_attention),
            }
            for width in hardware.widths
        ],
        "scratch_attention": None if hardware.scratch_attention is None else _rate_json(hardware.scratch_attention),
        "kv_lanes": {str(lane): _rate_json(rate) for lane, rate in hardware.kv_lanes.items()},
        **{
            name: None if figure is None else _figure_json(figure)
            for name, figure in (("unpacking", hardware.unpacking), ("packing", hardware.packing))
        },
        **{
            name: None if rate is None else _rate_json(rate)
            for name, rate in (
                ("packed_decode", hardware.packed_decode), ("packed_host_attention", hardware.packed_host_attention),
            )
        },
    }  # fmt: skip


def hardware_from_json(data: object, where: str = "hardware profile") -> Hardware:
    """Take back what ``profile_json`` gave; ``where`` names it in errors.

    Raises:
        HardwareError: not such a profile; the sentence says what is wrong with which part.
    """
    top = _Reader(data, where)
    if top.text("format") != FORMAT:
        raise HardwareError(f"{where} is not a hardware profile: its format should be {FORMAT!r}")
    version = top.number("version")
    if version != VERSION:
        raise HardwareError(
            f"{where} has version {version:g} and this overnight reads version {VERSION}: "
            "measure again with overnight doctor --measure"
        )
    try:
        return Hardware(
            name=top.text("name"),
            description=top.text("description"),
            identity={key: top.at("identity").text(key) for key in top.at("identity").names()},
            device=top.text("device"),
            shares_host_memory=top.boolean("shares_host_memory"),
            capacity={tier: top.at("capacity").figure(tier) for tier in TierName},
            matmul={dtype: top.at("matmul").rate(dtype) for dtype in DType if dtype in top.at("matmul").names()},
            prompt_attention=top.rate("prompt_attention"),
            decode_attention=top.rate("decode_attention"),
            host_attention=None if top.is_null("host_attention") else top.rate("host_attention"),
            lanes={lane: top.at("lanes").rate(lane) for lane in LINKS},
            layer_overhead=top.figure("layer_overhead"),
            segment_overhead=top.figure("segment_overhead"),
            pass_overhead=top.figure("pass_overhead"),
            # The shipped presets, whose other figures contain these, have none of them.
            sequence_overhead=top.figure("sequence_overhead") if top.has("sequence_overhead") else CONTAINED,
            host_overhead=top.figure("host_overhead") if top.has("host_overhead") else CONTAINED,
            widths=tuple(width.width() for width in top.items("widths")) if top.has("widths") else (),
            scratch_attention=top.rate("scratch_attention") if top.is_given("scratch_attention") else None,
            kv_lanes=_lanes(top.at("kv_lanes")) if top.has("kv_lanes") else {},
            unpacking=top.figure("unpacking") if top.is_given("unpacking") else None,
            packing=top.figure("packing") if top.is_given("packing") else None,
            packed_decode=top.rate("packed_decode") if top.is_given("packed_decode") else None,
            packed_host_attention=(
                top.rate("packed_host_attention") if top.is_given("packed_host_attention") else None
            ),
        )
    except ValueError as error:
        raise HardwareError(f"{where}: {error}") from error


_Built = TypeVar("_Built")


class _Reader:
    """One JSON object; a value that is absent or of another type is an error that names its place."""

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, dict):
            raise HardwareError(f"{where} should be a JSON object")
        self._data = data
        self._where = where

    def names(self) -> tuple[str, ...]:
        return tuple(str(key) for key in self._data)

    def has(self, key: str) -> bool:
        return key in self._data

    def is_given(self, key: str) -> bool:
        return self._data.get(key) is not None

    def items(self, key: str) -> "list[_Reader]":
        values = self._get(key)
        if not isinstance(values, list):
            raise self._wrong(key, "a list")
        return [_Reader(value, f"{self._where}: {key}[{index}]") for index, value in enumerate(values)]

    def width(self) -> Width:
        matmul, head = self.at("matmul"), self.at("head")
        return Width(
            hidden_size=int(self.number("hidden_size")),
            matmul={dtype: matmul.rate(dtype) for dtype in DType if matmul.has(dtype)},
            head={dtype: head.rate(dtype) for dtype in DType if head.has(dtype)},
            prompt_attention=self.rate("prompt_attention"),
            decode_attention=self.rate("decode_attention"),
        )

    def at(self, key: str) -> "_Reader":
        return _Reader(self._get(key), f"{self._where}: {key}")

    def is_null(self, key: str) -> bool:
        return self._get(key) is None

    def text(self, key: str) -> str:
        value = self._get(key)
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def boolean(self, key: str) -> bool:
        value = self._get(key)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._data.get(key, default) if default is not None else self._get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a number")
        return value

    def figure(self, key: str) -> Figure:
        inner = self.at(key)
        return inner._built(lambda: Figure(inner.number("value"), inner.text("source"), inner._is_fitted()))

    def rate(self, key: str) -> Rate:
        inner = self.at(key)
        points = inner._get("points")
        if not isinstance(points, list) or not all(_is_point(point) for point in points):
            raise inner._wrong("points", "a list of [size, rate]")
        pairs = tuple((float(size), float(rate)) for size, rate in points)
        share = inner.number("busy_share", 1.0)
        return inner._built(lambda: Rate(pairs, inner.text("source"), inner._is_fitted(), share))

    def _is_fitted(self) -> bool:
        return "fitted" in self._data and self.boolean("fitted")

    def _built(self, build: Callable[[], _Built]) -> _Built:
        try:
            return build()
        except ValueError as error:
            raise HardwareError(f"{self._where}: {error}") from error

    def _get(self, key: str) -> object:
        if key not in self._data:
            raise HardwareError(f"{self._where} has no {key!r}")
        return self._data[key]

    def _wrong(self, key: str, wanted: str) -> HardwareError:
        return HardwareError(f"{self._where}: {key} should be {wanted}, not {self._data.get(key)!r}")


def _lanes(reader: _Reader) -> dict[LaneName, Rate]:
    return {lane: reader.rate(lane) for lane in LINKS if reader.has(lane)}


def _is_point(point: object) -> bool:
    return (
        isinstance(point, list)
        and len(point) == 2
        and all(isinstance(value, int | float) and not isinstance(value, bool) for value in point)
    )


def _figure_json(figure: Figure) -> dict[str, object]:
    written: dict[str, object] = {"value": figure.value, "source": figure.source}
    if figure.fitted:
        written["fitted"] = True
    return written


def _rate_json(rate: Rate) -> dict[str, object]:
    written: dict[str, object] = {"points": [list(point) for point in rate.points], "source": rate.source}
    if rate.busy_share != 1.0:
        written["busy_share"] = rate.busy_share
    if rate.fitted:
        written["fitted"] = True
    return written
