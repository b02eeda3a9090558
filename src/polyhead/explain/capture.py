"""Attention weights of a running model, captured from outside."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from polyhead.errors import ConfigError
from polyhead.nn.attention import MultiHeadAttention

Reduce = Callable[[Tensor], Tensor]


@contextmanager
def capture(
    model: nn.Module, where: str = "*", reduce: Reduce | None = None
) -> Generator[dict[str, Tensor]]:
    """The attention weights `[B, H, Q, K]` of the layers named, by the name of each.

    where: a part of the name, whole between dots (`layers.3`, `cross`), or a pattern
    (`*.layers.[0-3].attention`). reduce: applied to the weights before they are kept. A layer that
    runs several times keeps its last. Layers not named stay on the fused path; answers stay the
    same to rounding. Raises ConfigError if no attention has such a name.
    """
    chosen = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MultiHeadAttention) and _is_named(name, where)
    }
    if not chosen:
        names = [n for n, m in model.named_modules() if isinstance(m, MultiHeadAttention)]
        raise ConfigError(
            f"no attention is called {where!r}; this model has {', '.join(names[:4]) or 'none'} ..."
        )
    seen: dict[str, Tensor] = {}
    probes = {name: _keep(seen, name, reduce) for name in chosen}
    for name, module in chosen.items():
        module.probes.append(probes[name])
    try:
        yield seen
    finally:
        for name, module in chosen.items():
            module.probes.remove(probes[name])


def _keep(seen: dict[str, Tensor], name: str, reduce: Reduce | None) -> Callable[[Tensor], None]:
    def probe(weights: Tensor) -> None:
        with torch.no_grad():
            seen[name] = weights.detach() if reduce is None else reduce(weights.detach())

    return probe


def _is_named(name: str, where: str) -> bool:
    return fnmatchcase(name, where) or f".{where}." in f".{name}."
