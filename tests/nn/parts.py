"""Tables the tests of attention share: positions, masks and the sizes they are tried at."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from polyhead.nn.mask import Mask
from polyhead.nn.patterns import big_bird, prefix, strided
from polyhead.nn.position import Alibi, Position, Shaw, T5Bias
from polyhead.nn.probe import Probe
from polyhead.nn.rope_scaling import DynamicNTK, Linear, Llama3, Yarn
from polyhead.nn.rotary import DynamicRotary, Rotary

M = TypeVar("M", bound=nn.Module)

B, T, H, D = 3, 10, 4, 8
E = H * D
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Keeps(Probe):
    """Keeps the weights it sees in a list."""

    def __init__(self, seen: list[Tensor]) -> None:
        self.seen = seen

    def weights(self, weights: Tensor) -> Tensor:
        self.seen.append(weights)
        return weights


def by_head(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q + k) % (h + 2) == 0


with DEVICE:
    KEEP = torch.arange(T) < torch.tensor([[10], [6], [1]])
    SEGMENTS = torch.tensor([[0] * 4 + [1] * 6, [0] * 10, [2, 2, 0, 0, 0, 1, 1, 1, 1, 1]])

    MASKS: dict[str, Mask] = {
        "everything": Mask(),
        "causal": Mask(causal=True),
        "window": Mask(causal=True, window=3),
        "keep": Mask(causal=True, keep=KEEP),
        "padding-alone": Mask(keep=KEEP),
        "nothing-for-some": Mask(keep=torch.arange(T) < torch.tensor([[10], [0], [3]])),
        "segments": Mask(causal=True, segments=SEGMENTS),
        "by-head": Mask(allow=(by_head,), heads=H),
        "strided": strided(3) & Mask(causal=True),
        "prefix": prefix(torch.tensor([2, 0, 5])),
        "big-bird": big_bird(2, 1, 2, T),
        "either": Mask(causal=True, window=2) | Mask(segments=SEGMENTS),
    }

# Every one is made with a reach short enough that the tests go beyond it.
POSITIONS: dict[str, Callable[[], Position | None]] = {
    "none": lambda: None,
    "rotary": lambda: Rotary(D, 100.0),
    "rotary-linear": lambda: Rotary(D, 100.0, Linear(3.0)),
    "rotary-yarn": lambda: Rotary(D, 100.0, Yarn(4.0, 8, 1.1)),
    "rotary-llama3": lambda: Rotary(D, 100.0, Llama3(8.0, 1.0, 4.0, 16)),
    "rotary-dynamic": lambda: DynamicRotary(D, 100.0, DynamicNTK(4.0, 6)),
    "alibi": lambda: Alibi(H),
    "t5": lambda: randomized(T5Bias(H, 8, 12)),
    "t5-causal": lambda: randomized(T5Bias(H, 8, 12, bidirectional=False)),
    "shaw": lambda: randomized(Shaw(D, 3)),
}


def randomized(module: M, std: float = 0.5) -> M:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std)
    return module


def shaken(module: M, by: float, seed: int) -> M:
    """Its parameters moved, so that those that begin alike differ."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * by)
    return module
