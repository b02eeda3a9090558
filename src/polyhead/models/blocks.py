"""The blocks of a built model, and which of its parameters are their matrices."""

from torch import nn

from polyhead.models.model import BESIDE
from polyhead.nn.embedding import Table
from polyhead.nn.head import Head, LanguageHead


def in_blocks(model: nn.Module) -> set[str]:
    """Names of the matrices that a block multiplies with: no tables, heads or adapters."""
    blocks = tuple(f"{block}." for block in blocks_of(model))
    apart = [
        f"{name}."
        for name, part in model.named_modules()
        if isinstance(part, Table | Head | LanguageHead) and name
    ]
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2
        and name.startswith(blocks)
        and not name.startswith(tuple(apart))
        and f".{BESIDE}." not in name
    }


def blocks_of(model: nn.Module) -> list[str]:
    """Names of what stands in lists of modules and holds no list itself, in order."""
    lists = [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    items = [
        f"{name}.{number}" if name else str(number)
        for name in lists
        for number in range(len(model.get_submodule(name)))  # pyright: ignore[reportArgumentType]
    ]
    return [item for item in items if not any(other.startswith(f"{item}.") for other in lists)]
