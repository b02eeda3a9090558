"""Parts that learned whole beside an adapter, as PEFT's directories hold them."""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from polyhead.adapt.adapters import trained_parts
from polyhead.adapt.lora import LoraConfig
from polyhead.errors import FileError
from polyhead.models.keys import Rules, Tied, to_theirs
from polyhead.models.model import BESIDE, TaskModel, checkpoint_rules

_CLASSIFIERS = ("classifier", "score")  # heads that PEFT takes whole, by their first words


def written_whole(model: TaskModel, config: LoraConfig) -> dict[str, Tensor]:
    """The tensors of parts that learned whole, under the checkpoint's names; what is tied under all
    of them, as PEFT gives each of such parts weights of its own."""
    parts = tuple(f"{path}." for path, _ in trained_parts(model, config.trained))
    # Each once, where it stands first; state_dict() would let FSDP take its weights apart again.
    ours = {
        key.removeprefix("backbone."): value.detach()
        for key, value in model.named_parameters()
        if key.startswith(parts) and f".{BESIDE}." not in key
    }
    rules = checkpoint_rules(model.config, model.head_kind)
    found = to_theirs(rules, ours) if ours else {}
    for rule in rules:
        if isinstance(rule, Tied) and rule.same_as in found:
            found[rule.theirs] = found[rule.same_as]
    return found


def check_tied(rules: Rules, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """FileError where parts that are one weight here learned apart."""
    for rule in rules:
        if isinstance(rule, Tied):
            one, two = tensors.get(rule.theirs), tensors.get(rule.same_as)
            if one is not two and (one is None or two is None or not torch.equal(one, two)):
                raise FileError(
                    f"{folder} trained {rule.theirs if two is None else rule.same_as} apart from "
                    f"{rule.same_as if two is None else rule.theirs}, and the model has one weight "
                    "for both: train them tied (ensure_weight_tying)"
                )


def saved_modules(tensors: Collection[str], task: str | None) -> list[str] | None:
    """The modules that hold them, none of which is inside another."""
    found = {name.rpartition(".")[0] for name in tensors}
    if task in ("SEQ_CLS", "TOKEN_CLS"):
        tops = {name: name.partition(".")[0] for name in found}
        found = {tops[name] if tops[name] in _CLASSIFIERS else name for name in found}
    outer = (name for name in found if not any(name.startswith(f"{one}.") for one in found))
    return sorted(outer) or None
