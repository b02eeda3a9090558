"""Which states carry the difference between two runs: each put into the other run, one by one.

B rows, T tokens, L layers, H heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.explain.capture import capture
from polyhead.explain.inputs import Inputs, Target, call, token_ids
from polyhead.explain.replace import replace
from polyhead.models.model import TaskModel


@dataclass(frozen=True)
class PatchingGrid:
    """How much of the difference each patch brings back: 0 none of it, 1 all, `[L, columns]`.

    names: of the rows. columns are tokens, or heads. clean, corrupted: what the target was of each
    run, the mean of its rows.
    """

    names: list[str]
    effect: Tensor
    clean: float
    corrupted: float


def patching_grid(
    model: TaskModel,
    clean: Inputs,
    corrupted: Inputs,
    target: Target,
    what: str = "residual",
    where: str = "*",
) -> PatchingGrid:
    """What the clean run computed, put into the corrupted one at one place at a time.

    target: logits to a number for each row, such as the logit of an answer less that of another.
    what: of `KINDS`: of `heads` each is patched alone, at all tokens; of others each token. clean
    and corrupted are of the same shape; a target that is alike in both raises ConfigError
    (Meng et al. 2022; Wang et al. 2023).
    """
    sizes = token_ids(clean).shape, token_ids(corrupted).shape
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"the clean run is {list(sizes[0])} tokens and the corrupted one {list(sizes[1])}; "
            "patching wants as many of both"
        )
    with torch.no_grad():
        with capture(model, where, what) as seen:
            best = float(target(call(model, clean)).mean())
        widths = {state.shape[1] for state in seen.values()}
        if len(widths) > 1:
            raise ConfigError(
                f"the {what} of {where!r} are of {sorted(widths)} columns; name one stack"
            )
        worst = float(target(call(model, corrupted)).mean())
        if abs(best - worst) < 1e-9:
            raise ConfigError(f"the target is {best:.4g} in both runs; there is nothing to explain")
        rows = [
            [
                _patched(model, corrupted, target, what, (name, state), column)
                for column in range(state.shape[1])
            ]
            for name, state in seen.items()
        ]
    effect = (torch.tensor(rows) - worst) / (best - worst)
    return PatchingGrid(list(seen), effect, best, worst)


def _patched(
    model: TaskModel,
    inputs: Inputs,
    target: Target,
    what: str,
    source: tuple[str, Tensor],
    column: int,
) -> float:
    name, state = source

    def change(x: Tensor) -> Tensor:
        found = x.clone()
        found[:, column] = state[:, column]
        return found

    with replace(model, name if "@" in name else f"{name}@0", what, change):
        return float(target(call(model, inputs)).mean())
