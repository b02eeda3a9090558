"""What transformers gives out of its insides, by the names that ours has for the same."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import polyhead as ph
from polyhead.models.model import TaskModel

CLOSE = 1e-5
INSIDE = {"output_attentions": True, "output_hidden_states": True}
# Of their outputs those of attention, and whose they are here.
WEIGHTS = {
    "attentions": "attention", "encoder_attentions": "encoder",
    "decoder_attentions": "decoder", "cross_attentions": "cross",
}  # fmt: skip
STATES = {
    "hidden_states": "", "encoder_hidden_states": "encoder", "decoder_hidden_states": "decoder",
}  # fmt: skip


def eager(model: Any) -> Any:
    """Theirs, by the path that has weights to give out."""
    model.set_attn_implementation("eager")
    return model.eval()


@torch.no_grad()
def check_inside(folder: Path, theirs: Any, inputs: Mapping[str, Tensor], **named: Any) -> None:
    """Weights, states and routing of all layers are theirs, and looking changes no answer.

    inputs: what both are called with. named: what theirs takes besides.
    """
    ours = ph.load(folder)
    output = eager(theirs)(**inputs, **named, **INSIDE)
    plain = ours(**inputs)
    with ph.capture(ours, what=("weights", "scores", "residual_in", "residual")) as seen:
        looked = ours(**inputs)
    assert near(looked, plain)
    keep = inputs.get("attention_mask")
    check_weights(seen["weights"], output, keep)
    for name, weights in seen["weights"].items():
        assert near(seen["scores"][name].softmax(-1).nan_to_num(), weights)
    for theirs_are, part in STATES.items():
        if getattr(output, theirs_are, None) is not None:
            check_states(ours, seen, getattr(output, theirs_are), part, keep)


def check_weights(found: Mapping[str, Tensor], output: Any, keep: Tensor | None) -> None:
    checked = 0
    for theirs_are, part in WEIGHTS.items():
        given = getattr(output, theirs_are, None)
        if given is None:
            continue
        own = [weights for name, weights in found.items() if is_of(name, part)]
        assert len(given) <= len(own)
        for expected, weights in zip(given, own, strict=False):
            assert near(*(counted(w.transpose(1, 2), part, keep) for w in (weights, expected)))
            checked += 1
    assert checked


def is_of(name: str, part: str) -> bool:
    is_cross = name.partition("@")[0].endswith(".cross")
    return is_cross if part == "cross" else f".{part}" in name and not is_cross


def check_states(
    ours: TaskModel,
    seen: Mapping[str, Mapping[str, Tensor]],
    given: Any,
    part: str,
    keep: Tensor | None,
) -> None:
    """What each layer reads is what they say; the last of theirs may be normed already."""
    own = [x for name, x in seen["residual_in"].items() if f".{part}" in name]
    assert len(own) >= len(given) - 1
    for expected, state in zip(given[:-1], own, strict=False):
        assert near(counted(state, part, keep), counted(expected, part, keep))


def counted(x: Tensor, part: str, keep: Tensor | None) -> Tensor:
    """What tokens `[B, T, ...]` that are no padding have; positions of padding are nobody's."""
    is_source = part in ("", "attention", "encoder")
    return x[keep.bool()] if is_source and keep is not None else x


def near(ours: Tensor, theirs: Tensor) -> bool:
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    bound = CLOSE * max(1.0, theirs.abs().max().item())
    return (ours.float() - theirs.float()).abs().max().item() <= bound
