"""From an optimum in real numbers to plans that could be written with flags: whole layers, whole percents. No torch."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from math import ceil, floor

from engine.planner.placing import whole_layers
from engine.planner.plan import Plan, PlanOptions
from engine.planner.relaxation import TIE, Choice, Optimum
from engine.tiers import Shares, TierName

_TIERS = tuple(TierName)


def roundings(optimum: Optimum, fixed: PlanOptions, num_layers: int) -> Iterator[PlanOptions]:
    """Whole layers and whole percents near an optimum; sequences on device and host as room is left, too.

    ``fixed``: what a person asked for stays.
    """
    choice, layers, kv = optimum.choice, optimum.layers, optimum.kv
    weights = [fixed.weights] if fixed.weights else list(_layer_shares(num_layers, choice, layers))
    caches: list[Shares | None] = [fixed.kv] if fixed.kv else list(_near_percents(kv))
    if fixed.kv is None and kv[TierName.DISK] < 0.01:
        caches.append(None)
    for shares, cache in product(weights, caches):
        yield replace(
            fixed,
            micro_batch=choice.micro_batch,
            micro_batches=choice.micro_batches,
            weights=shares,
            kv=cache,
            host_attention="on" if choice.host_attention else fixed.host_attention,
            stay_packed=choice.stay_packed,
        )


def moves(options: PlanOptions, plan: Plan, fixed: PlanOptions, step: int) -> Iterator[PlanOptions]:
    """Up to ``step`` percent of the layers or of the cache in another tier than in this plan, which ``options`` led to.

    ``fixed``: what a person asked for stays.
    """
    pool = sum(plan.kv_bytes.values())
    kv = options.kv
    if kv is None:
        device = round(100 * plan.kv_bytes[TierName.DEVICE] / pool)
        kv = Shares(device, 100 - device, 0)
    if fixed.weights is None and options.weights is not None:
        yield from (replace(options, weights=moved) for moved in _moved(options.weights, step))
    if fixed.kv is None:
        yield from (replace(options, kv=moved) for moved in _moved(kv, step))


def _layer_shares(total: int, choice: Choice, layers: Mapping[TierName, float]) -> Iterator[Shares]:
    seen = set()
    around = [sorted({floor(layers[tier]), ceil(layers[tier] - 1e-6)}) for tier in (TierName.DEVICE, TierName.HOST)]
    for device, host in product(*around):
        for on_device in {device, max(0, device - 1)}:
            on_host = min(host, total - on_device)
            counts = {
                TierName.DEVICE: on_device, TierName.HOST: on_host, TierName.DISK: total - on_device - on_host,
            }  # fmt: skip
            if any(counts[tier] for tier in _TIERS[1:] if tier not in choice.streams):
                continue
            shares = _shares_for(total, counts)
            if shares is not None and shares not in seen:
                seen.add(shares)
                yield shares


def _moved(shares: Shares, step: int) -> Iterator[Shares]:
    """Up to ``step`` percent moved from one tier to another."""
    for source, target in product(_TIERS, _TIERS):
        percent = min(step, shares.of(source))
        if source is not target and percent:
            parts = {tier: shares.of(tier) for tier in _TIERS}
            parts[source] -= percent
            parts[target] += percent
            yield Shares(*parts.values())


def _near_percents(shares: Mapping[TierName, float]) -> Iterable[Shares]:
    """Whole percents within one of the shares of device and host; the disk has the rest."""
    device, host = (100 * shares[tier] for tier in (TierName.DEVICE, TierName.HOST))
    if shares[TierName.DISK] < TIE:
        yield from (Shares(on_device, 100 - on_device, 0) for on_device in sorted({floor(device), ceil(device)}))
        return
    for on_device, on_host in product({floor(device), ceil(device)}, {floor(host), ceil(host)}):
        if on_device + on_host <= 100:
            yield Shares(on_device, on_host, 100 - on_device - on_host)


def _shares_for(total: int, counts: Mapping[TierName, int]) -> Shares | None:
    """Percents that ``whole_layers`` turns into exactly these counts, if there are any."""
    device, host = (round(100 * counts[tier] / total) for tier in (TierName.DEVICE, TierName.HOST))
    for step_device, step_host in product((0, -1, 1), repeat=2):
        on_device, on_host = device + step_device, host + step_host
        if min(on_device, on_host) < 0 or on_device + on_host > 100:
            continue
        shares = Shares(on_device, on_host, 100 - on_device - on_host)
        if whole_layers(total, shares) == dict(counts):
            return shares
    return None
