"""How deep in a model each parameter stands, and which of them are matrices of a block."""

from collections.abc import Mapping

from torch import nn

from polyhead.models.model import BESIDE
from polyhead.nn.embedding import Table
from polyhead.nn.head import Head, LanguageHead


def depths(model: nn.Module) -> Mapping[str, float]:
    """Each parameter's depth by its name: 0 of what is below all blocks, 1 of what is above.

    Blocks are what stands in lists of modules, each stack (an encoder, a decoder) by itself.
    """
    blocks = blocks_of(model)
    stacks: dict[str, list[str]] = {}
    for block in blocks:
        stacks.setdefault(_stack(block), []).append(block)
    places = {
        block: (number + 1) / (len(some) + 1)
        for some in stacks.values()
        for number, block in enumerate(some)
    }
    found: dict[str, float] = {}
    begun = False
    for name, _ in model.named_parameters():
        block = next((one for one in blocks if name.startswith(f"{one}.")), None)
        begun = begun or block is not None
        found[name] = places[block] if block is not None else float(begun)
    return found


def num_blocks(model: nn.Module) -> int:
    """Of the deepest stack."""
    stacks = [_stack(block) for block in blocks_of(model)]
    return max((stacks.count(stack) for stack in set(stacks)), default=0)


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


def _stack(block: str) -> str:
    """The part of the model that a block is in the first list of."""
    return next(
        ".".join(words[:at]) for words in [block.split(".")] for at in range(len(words))
        if words[at].isdecimal()
    )  # fmt: skip
