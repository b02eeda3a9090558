"""What keeps a few steps from spoiling a run: averages, and what lies far above them."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from polyhead.errors import PolyheadError
from polyhead.train.config import TrainConfig

KEPT = 0.97  # of a running mean at each step, as in ZClip (Kumar et al. 2025)
WARM = 25  # steps before anything is judged


@dataclass
class Average:
    """Mean and variance of what was seen, the latest counting most; `count` of them."""

    mean: float = 0.0
    variance: float = 0.0
    count: int = 0

    def score(self, value: float) -> float:
        """How many standard deviations a value lies above the mean; 0 until enough is known."""
        if self.count < WARM:
            return 0.0
        return (value - self.mean) / max(math.sqrt(self.variance), 1e-12)

    def add(self, value: float) -> None:
        """Take a value in; the first ones make the mean by themselves."""
        self.count += 1
        kept = min(KEPT, 1 - 1 / self.count)
        away = value - self.mean
        self.mean += (1 - kept) * away
        self.variance = kept * (self.variance + (1 - kept) * away * away)


class Guard:
    """Watches the norms of gradients and the losses of a run, as its settings ask.

    skipped: steps left out one after the other. rewinds: of the whole run. clipped: whether the
    last norm was an outlier.
    """

    def __init__(self, config: TrainConfig, state: Mapping[str, Mapping[str, float]] | None = None):
        self.config = config
        known = state or {}
        self.norms = _read(known.get("norms"))
        self.losses = _read(known.get("losses"))
        self.skipped = self.rewinds = 0
        self.clipped = False

    def limit(self, norm: float) -> float:
        """The largest norm that a gradient may have: infinite, or what brings an outlier back.

        An outlier z standard deviations out comes to threshold² / z of them (ZClip, equation 9).
        """
        allowed, threshold = math.inf, self.config.zclip
        score = self.norms.score(norm)
        if threshold and score > threshold:
            deviation = (norm - self.norms.mean) / score
            allowed = self.norms.mean + threshold * threshold / score * deviation
        self.clipped = allowed < math.inf
        self.norms.add(min(norm, allowed))
        return allowed

    def skip(self, step: int, why: str) -> None:
        """Count a step that was left out; PolyheadError for one too many in a row."""
        self.skipped += 1
        if self.skipped > self.config.skips:
            raise PolyheadError(
                f"step {step}: {why}; {self.config.skips} steps before it were left out, too"
            )

    def is_spike(self, loss: float) -> bool:
        """Whether a loss lies too far above those before; one that does not is taken in."""
        self.skipped = 0
        if self.config.rewind and self.losses.score(loss) > self.config.rewind:
            return True
        self.losses.add(loss)
        return False

    def rewind(self, step: int, loss: float) -> None:
        """Count a rewind; PolyheadError for one too many."""
        self.rewinds += 1
        if self.rewinds > self.config.skips:
            raise PolyheadError(
                f"the loss leapt to {loss:.4g} at step {step}, and the run was rewound "
                f"{self.config.skips} times before: lower lr, or check the data"
            )

    def state(self) -> dict[str, dict[str, float]]:
        """What a checkpoint keeps."""
        return {"norms": asdict(self.norms), "losses": asdict(self.losses)}


def _read(values: Mapping[str, float] | None) -> Average:
    if values is None:
        return Average()
    return Average(values["mean"], values["variance"], int(values["count"]))
