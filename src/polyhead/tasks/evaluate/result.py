"""What an evaluation gives back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """A figure with its 95 % interval, which is None where the samples do not allow one."""

    value: float
    interval: tuple[float, float] | None = None

    def __float__(self) -> float:
        return self.value


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a model makes of a task.

    metrics: by name; `accuracy` is found["accuracy"] too. samples: how many were seen, in the unit
    that `note` may say more of. cut: samples whose beginning the model had no room for. records:
    one a sample, as `--out` writes them.
    """

    task: str
    metrics: Mapping[str, Metric]
    samples: int
    cut: int = 0
    note: str = ""
    records: tuple[Mapping[str, Any], ...] = ()

    def __getitem__(self, name: str) -> Metric:
        return self.metrics[name]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """By how much the second model's figure is above the first's, over the same samples.

    interval: 95 %, of the samples drawn in pairs; where 0 lies outside, chance is no likely reason.
    """

    task: str
    metric: str
    value: float
    interval: tuple[float, float] | None
