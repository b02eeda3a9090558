"""How far a figure over samples may be from that over all there could be: 95 % intervals."""

import math
from collections.abc import Sequence

import numpy as np

_Z = 1.959964  # of a normal distribution, 95 % lie within so many deviations
_DRAWS, _SEED = 2000, 0
_AT_ONCE = 1 << 22  # numbers


def wilson(right: int, every: int) -> tuple[float, float]:
    """Of a share of successes (Wilson 1927); it stays within 0 and 1, and is honest near them."""
    share = right / every
    spread = _Z * math.sqrt(share * (1 - share) / every + _Z**2 / (4 * every**2))
    middle, scale = share + _Z**2 / (2 * every), 1 + _Z**2 / every
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def ratio_interval(above: Sequence[float], below: Sequence[float]) -> tuple[float, float] | None:
    """Of `sum(above) / sum(below)`, each pair a unit that is drawn as a whole: the percentile
    bootstrap (Efron 1979), the same draws each time. None for fewer than two units."""
    if len(above) < 2:
        return None
    units = np.array([above, below], dtype=np.float64)
    drawn = _resampled(units)
    return _middle(drawn[0] / drawn[1])


def paired_interval(
    first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]]
) -> tuple[float, float] | None:
    """Of the second's ratio less the first's; unit i of both is drawn together."""
    if len(first) < 2:
        return None
    units = np.concatenate([np.array(first, np.float64).T, np.array(second, np.float64).T])
    drawn = _resampled(units)
    return _middle(drawn[2] / drawn[3] - drawn[0] / drawn[1])


def _resampled(units: np.ndarray) -> np.ndarray:
    """Sums `[K, draws]` of units `[K, N]` drawn with replacement."""
    random, count = np.random.default_rng(_SEED), units.shape[1]
    at_once = max(1, _AT_ONCE // count)
    sums: list[np.ndarray] = []
    for start in range(0, _DRAWS, at_once):
        draws = min(at_once, _DRAWS - start)
        # How often each unit is drawn, rather than which: one product gives all sums.
        times = random.multinomial(count, np.full(count, 1 / count), size=draws)
        sums.append(units @ times.T)
    return np.concatenate(sums, axis=1)


def _middle(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)
