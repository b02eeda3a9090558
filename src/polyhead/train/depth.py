"""How deep in a model each parameter stands."""

from collections.abc import Mapping

from torch import nn

from polyhead.models.blocks import blocks_of


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


def _stack(block: str) -> str:
    """The part of the model that a block is in the first list of."""
    return next(
        ".".join(words[:at]) for words in [block.split(".")] for at in range(len(words))
        if words[at].isdecimal()
    )  # fmt: skip
