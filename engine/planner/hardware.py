"""What a machine can do: capacities, throughputs and bandwidths, each figure with where it comes from.

A profile is either measured on the machine it describes or shipped as a preset. Units: bytes, seconds, FLOP (a
multiplication and an addition are two), tokens. Frozen values with a versioned JSON form; no torch.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

from engine.errors import HardwareAbsent, HardwareError
from engine.memory.lane import LaneName
from engine.planner.plan import DTYPES, TierName

FORMAT = "overnight hardware profile"
VERSION = 1
PROFILE_NAME = "profile.json"
"""Of the machine at hand, in the folder of all state."""
LINKS = (LaneName.DISK_READ, LaneName.DISK_WRITE, LaneName.HOST_TO_DEVICE, LaneName.DEVICE_TO_HOST)
"""The lanes that move bytes; the other two compute."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One number, and why it should be believed."""

    value: float
    source: str
    fitted: bool = False
    """Adjusted until a model agreed with measurements, rather than measured or published by itself."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.value) or self.value < 0:
            raise ValueError(f"a figure must be a number of 0 or more, not {self.value}")


_CONTAINED = Figure(0, "contained in the other figures")


@dataclass(frozen=True, slots=True)
class Rate:
    """A throughput as a curve over the size of what is done at once: tokens of a product, bytes of a transfer.

    Between two points the logarithm of the rate is linear in that of the size. Below the first point time no longer
    falls with the size (the rate is in proportion to it); above the last the rate stays.
    """

    points: tuple[tuple[float, float], ...]
    """``(size, units per second)``, sizes ascending."""
    source: str
    fitted: bool = False
    busy_share: float = 1.0
    """What is left of the rate while every other lane works, too: memory and links are shared."""

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.points]
        if not sizes or sizes != sorted(set(sizes)) or not all(_positive(*point) for point in self.points):
            raise ValueError(f"a rate needs points of positive size and rate, sizes ascending, not {self.points}")
        if not 0 < self.busy_share <= 1:
            raise ValueError(f"busy_share must be above 0 and at most 1, not {self.busy_share}")

    @classmethod
    def constant(cls, value: float, source: str, *, fitted: bool = False, busy_share: float = 1.0) -> "Rate":
        """The same at any size of at least one."""
        return cls(((1.0, value),), source, fitted, busy_share)

    def at(self, size: float) -> float:
        """Units per second at a size, with no other lane busy."""
        first, last = self.points[0], self.points[-1]
        if size <= first[0]:
            return first[1] * size / first[0]
        if size >= last[0]:
            return last[1]
        index = next(i for i, point in enumerate(self.points) if point[0] >= size)
        (size_a, rate_a), (size_b, rate_b) = self.points[index - 1], self.points[index]
        weight = math.log(size / size_a) / math.log(size_b / size_a)
        return math.exp((1 - weight) * math.log(rate_a) + weight * math.log(rate_b))

    def seconds(self, amount: float, size: float) -> float:
        """Time for ``amount`` units in pieces of ``size``; nothing takes none."""
        return amount / self.at(size) if amount > 0 else 0.0


def between(curves: Mapping[int, Rate], size: int) -> Rate:
    """The curve for a size from those of others: nearest where it is beyond all, else the logarithm in between."""
    if size in curves or len(curves) == 1:
        return curves.get(size) or next(iter(curves.values()))
    low = max((each for each in curves if each < size), default=None)
    high = min((each for each in curves if each > size), default=None)
    if low is None or high is None:
        return curves[low or high or size]
    weight = math.log(size / low) / math.log(high / low)
    below, above = curves[low], curves[high]
    sizes = sorted({point[0] for rate in (below, above) for point in rate.points})
    points = tuple((each, below.at(each) ** (1 - weight) * above.at(each) ** weight) for each in sizes)
    share = below.busy_share ** (1 - weight) * above.busy_share**weight
    return Rate(points, f"between the curves of {low} and {high}", below.fitted or above.fitted, share)


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """What products reach in a model of one hidden size: narrow layers, which stay in caches and in which more of the
    time goes to everything but products, differ from wide ones."""

    hidden_size: int
    matmul: Mapping[str, Rate]
    """By dtype: FLOP/s of a layer's products, norms and residuals included, over the tokens of a micro-batch."""
    head: Mapping[str, Rate]
    """By dtype: FLOP/s of logits, the choice of a token included, over the rows computed together."""
    prompt_attention: Rate
    decode_attention: Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One machine."""

    name: str
    description: str
    device: str
    """``cpu`` or ``cuda``."""
    shares_host_memory: bool
    """Device and host are one memory: nothing is copied between them, and host attention is the device's own."""
    capacity: Mapping[TierName, Figure]
    """Bytes of each tier that a process could take if the machine were its own."""
    matmul: Mapping[str, Rate]
    """By dtype: FLOP/s of products with a layer's weights, over the tokens of a micro-batch."""
    prompt_attention: Rate
    """FLOP/s of attention over prompts on the device, over the tokens of a prompt."""
    decode_attention: Rate
    """Bytes of keys and values that decode attention reads on the device per second, over the bytes of one sequence."""
    host_attention: Rate | None
    """The same on the host, over keys and values that lie there; ``None``: the host does not attend."""
    lanes: Mapping[LaneName, Rate]
    """Bytes/s of each lane that moves bytes, over the bytes of a transfer."""
    layer_overhead: Figure
    """Seconds that a micro-batch costs in each layer however few tokens it has."""
    segment_overhead: Figure
    """Seconds that a sequence costs in each layer, whatever its length."""
    pass_overhead: Figure
    """Seconds before and after the layers of a pass, beside which nothing else is done."""
    sequence_overhead: Figure = _CONTAINED
    """Seconds that a sequence costs in each pass, beside its layers."""
    widths: tuple[Width, ...] = ()
    """By hidden size, ascending; empty: ``matmul`` holds for all, and for logits, too."""
    scratch_attention: Rate | None = None
    """As ``decode_attention``, over keys and values that pass through a scratch buffer, without the time of the lanes
    that bring them, but with ``segment_overhead``; ``None``: nobody measured it, and it is taken to be the same."""
    kv_lanes: Mapping[LaneName, Rate] = field(default_factory=dict)
    """Lanes on which keys and values move at another rate than weights do: through a spill file and the page cache,
    over the bytes that one sequence moves in one layer."""
    identity: Mapping[str, str] = field(default_factory=dict)
    """What tells this machine from others: processor, device, driver, when and with which version it was measured."""

    def __post_init__(self) -> None:
        missing = [str(tier) for tier in TierName if tier not in self.capacity]
        missing += [lane for lane in LINKS if lane not in self.lanes]
        if missing or not self.matmul:
            raise ValueError(f"no figure for {', '.join(missing) or 'matmul'}")
        sizes = [width.hidden_size for width in self.widths]
        if sizes != sorted(set(sizes)) or any(size < 1 for size in sizes):
            raise ValueError(f"widths must be of ascending hidden sizes, not {sizes}")

    def matmul_rate(self, dtype: str, hidden_size: int | None = None) -> Rate:
        """Products in one dtype with the layers of a model of that hidden size; ``None``: of a wide one.

        Raises:
            HardwareError: nobody measured them.
        """
        curves = {width.hidden_size: width.matmul[dtype] for width in self.widths if dtype in width.matmul}
        if hidden_size is not None and curves:
            return between(curves, hidden_size)
        if dtype not in self.matmul:
            raise HardwareError(
                f"hardware profile {self.name!r} has no figure for products in {dtype}, only in "
                f"{', '.join(sorted(self.matmul))}: choose one of these with --dtype, or measure with "
                "overnight doctor --measure"
            )
        return self.matmul[dtype]

    def head_rate(self, dtype: str, hidden_size: int) -> Rate:
        """Logits in one dtype; as the layers' products where nobody measured them.

        Raises:
            HardwareError: nobody measured those, either.
        """
        curves = {width.hidden_size: width.head[dtype] for width in self.widths if dtype in width.head}
        return between(curves, hidden_size) if curves else self.matmul_rate(dtype, hidden_size)

    def prompt_rate(self, hidden_size: int) -> Rate:
        """Attention over prompts on the device."""
        curves = {width.hidden_size: width.prompt_attention for width in self.widths}
        return between(curves, hidden_size) if curves else self.prompt_attention

    def decode_rate(self, hidden_size: int) -> Rate:
        """Decode attention on the device."""
        curves = {width.hidden_size: width.decode_attention for width in self.widths}
        return between(curves, hidden_size) if curves else self.decode_attention

    def kv_rate(self, lane: LaneName) -> Rate:
        """A lane for keys and values."""
        return self.kv_lanes.get(lane, self.lanes[lane])

    def figures(self) -> dict[str, Figure | Rate]:
        """Every figure by its place in the JSON form."""
        found: dict[str, Figure | Rate] = {f"capacity.{tier}": figure for tier, figure in self.capacity.items()}
        found |= {f"matmul.{dtype}": rate for dtype, rate in self.matmul.items()}
        found |= {f"lanes.{lane}": rate for lane, rate in self.lanes.items()}
        for name in ("prompt_attention", "decode_attention", "host_attention", "scratch_attention"):
            rate = getattr(self, name)
            if rate is not None:
                found[name] = rate
        for name in ("layer_overhead", "segment_overhead", "pass_overhead", "sequence_overhead"):
            found[name] = getattr(self, name)
        for width in self.widths:
            found |= {f"widths.{width.hidden_size}.matmul.{dtype}": rate for dtype, rate in width.matmul.items()}
            found |= {f"widths.{width.hidden_size}.head.{dtype}": rate for dtype, rate in width.head.items()}
            found[f"widths.{width.hidden_size}.prompt_attention"] = width.prompt_attention
            found[f"widths.{width.hidden_size}.decode_attention"] = width.decode_attention
        return found | {f"kv_lanes.{lane}": rate for lane, rate in self.kv_lanes.items()}

    def to_json(self) -> dict[str, object]:
        """Plain JSON values that ``from_json`` takes back."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "description": self.description,
            "identity": dict(self.identity),
            "device": self.device,
            "shares_host_memory": self.shares_host_memory,
            "capacity": {str(tier): _figure_json(figure) for tier, figure in self.capacity.items()},
            "matmul": {dtype: _rate_json(rate) for dtype, rate in self.matmul.items()},
            "prompt_attention": _rate_json(self.prompt_attention),
            "decode_attention": _rate_json(self.decode_attention),
            "host_attention": None if self.host_attention is None else _rate_json(self.host_attention),
            "lanes": {str(lane): _rate_json(rate) for lane, rate in self.lanes.items()},
            "layer_overhead": _figure_json(self.layer_overhead),
            "segment_overhead": _figure_json(self.segment_overhead),
            "pass_overhead": _figure_json(self.pass_overhead),
            "sequence_overhead": _figure_json(self.sequence_overhead),
            "widths": [
                {
                    "hidden_size": width.hidden_size,
                    "matmul": {dtype: _rate_json(rate) for dtype, rate in width.matmul.items()},
                    "head": {dtype: _rate_json(rate) for dtype, rate in width.head.items()},
                    "prompt_attention": _rate_json(width.prompt_attention),
                    "decode_attention": _rate_json(width.decode_attention),
                }
                for width in self.widths
            ],
            "scratch_attention": None if self.scratch_attention is None else _rate_json(self.scratch_attention),
            "kv_lanes": {str(lane): _rate_json(rate) for lane, rate in self.kv_lanes.items()},
        }

    @classmethod
    def from_json(cls, data: object, where: str = "hardware profile") -> "Hardware":
        """Take back what ``to_json`` gave; ``where`` names it in errors.

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
            return cls(
                name=top.text("name"),
                description=top.text("description"),
                identity={key: top.at("identity").text(key) for key in top.at("identity").names()},
                device=top.text("device"),
                shares_host_memory=top.boolean("shares_host_memory"),
                capacity={tier: top.at("capacity").figure(tier) for tier in TierName},
                matmul={dtype: top.at("matmul").rate(dtype) for dtype in DTYPES if dtype in top.at("matmul").names()},
                prompt_attention=top.rate("prompt_attention"),
                decode_attention=top.rate("decode_attention"),
                host_attention=None if top.is_null("host_attention") else top.rate("host_attention"),
                lanes={lane: top.at("lanes").rate(lane) for lane in LINKS},
                layer_overhead=top.figure("layer_overhead"),
                segment_overhead=top.figure("segment_overhead"),
                pass_overhead=top.figure("pass_overhead"),
                # The shipped presets, whose other figures contain these, have none of them.
                sequence_overhead=top.figure("sequence_overhead") if top.has("sequence_overhead") else _CONTAINED,
                widths=tuple(width.width() for width in top.items("widths")) if top.has("widths") else (),
                scratch_attention=top.rate("scratch_attention") if top.is_given("scratch_attention") else None,
                kv_lanes=_lanes(top.at("kv_lanes")) if top.has("kv_lanes") else {},
            )
        except ValueError as error:
            raise HardwareError(f"{where}: {error}") from error


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
        try:
            text = Path(name_or_path).read_text(encoding="utf-8")
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
    return Hardware.from_json(data, str(name_or_path))


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
            matmul={dtype: matmul.rate(dtype) for dtype in DTYPES if matmul.has(dtype)},
            head={dtype: head.rate(dtype) for dtype in DTYPES if head.has(dtype)},
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


def _positive(size: float, rate: float) -> bool:
    return math.isfinite(size) and math.isfinite(rate) and size > 0 and rate > 0


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
