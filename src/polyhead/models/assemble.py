"""Models made: fresh ones from a config, and those that take a checkpoint's tensors."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.errors import FileError
from polyhead.models.config import Config
from polyhead.models.factors import factor
from polyhead.models.initialize import initialize
from polyhead.models.keys import Dropped, Rule, differ, knows, to_ours
from polyhead.models.model import TaskModel, checkpoint_rules
from polyhead.models.registry import Family, family_of

# How the first BERT checkpoints call a norm's parts, and DeBERTa v3's source a layer.
OLD_NAMES = (
    ("LayerNorm.gamma", "LayerNorm.weight"),
    ("LayerNorm.beta", "LayerNorm.bias"),
    ("mask_predictions.classifer.", "mask_predictions.classifier."),
)


def build(
    family: str, *, head: str | None = None, seed: int | None = None, **fields: Any
) -> TaskModel:
    """A fresh model from its config's fields.

    head: one of those its type can carry, or "none"; None is the type's first. seed: of the
    weights; None draws from torch's global state.
    """
    kind = family_of(family)
    config = kind.config.fresh(family, **fields)
    head = next(iter(kind.row(family).heads), "none") if head is None else head
    if seed is None:
        return assemble(kind, config, head)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return assemble(kind, config, head)


def assemble(family: Family, config: Config, head: str, has_pooler: bool = True) -> TaskModel:
    """Backbone and head of a config, with fresh weights (none on the meta device).

    has_pooler: whether a model without a head keeps its type's pooler.
    """
    row = family.row(config.model_type)
    backbone = family.backbone(config)
    factor(backbone, config.ranks)
    top = None if head == "none" else row.kind(head).build(config)
    parts = () if top is None else top.modules()
    reads_pooled = any(getattr(part, "reads_pooled", False) for part in parts)
    wants_pooler = has_pooler if top is None else reads_pooled
    pooler = row.pooler(config) if row.pooler is not None and wants_pooler else None
    model = TaskModel(config, backbone, top, pooler, head)
    if not any(parameter.is_meta for parameter in model.parameters()):
        initialize(model, getattr(config, "num_layers", 1), getattr(config, "init_std", 0.02))
    model.tie()
    return model


def from_tensors(
    config: Config,
    tensors: Mapping[str, Tensor],
    head: str,
    dtype: torch.dtype | None,
    is_new: bool = False,
) -> TaskModel:
    """A model that takes Hugging Face's tensors as its weights, without copying where it can.

    is_new: what the checkpoint lacks of head and pooler, or has in another shape, is drawn fresh.
    """
    family = family_of(config.model_type)
    tensors = _Named(tensors, known_names(config, tensors))
    config = config.as_stored(tensors.keys())
    if differ(checkpoint_rules(config, head), tensors):
        # Said to be tied, but trained apart: transformers believes the tensors, too.
        config = config.untied()
    rules = list(checkpoint_rules(config, head))
    poolers = [rule for rule in rules if isinstance(rule, Rule) and _is_top(rule.ours, "pooler.")]
    has_pooler = any(knows(poolers, name) for name in tensors)
    with torch.device("meta"):
        model = assemble(family, config, head, has_pooler)
    if model.pooler is None:
        rules = [rule for rule in rules if rule not in poolers]
        rules += [Dropped(rule.theirs) for rule in poolers]
    own = [rule for rule in rules if isinstance(rule, Rule) and _is_top(rule.ours, "head.")]
    if own and not is_new and not any(knows(own, name) for name in tensors):
        raise FileError(
            f"the checkpoint has no head {head!r}, which its config.json names or leaves to be "
            "guessed; load it with head='none', or name the head that it has"
        )
    # What belongs to another head of this type is no fault, and of no use.
    rules += _other_heads(config)
    shapes = {
        name.removeprefix("backbone."): value.shape for name, value in model.state_dict().items()
    }
    tops = {name for name in shapes if _is_top(name, "head.", "pooler.")} if is_new else set[str]()
    ours = to_ours(rules, tensors, shapes, tops)
    state = {name: _ready(tensor, dtype) for name, tensor in ours.items()}
    if missing := tops - ours.keys():
        drawn = _drawn_top(config, head)
        state |= {name: _ready(drawn[name], dtype) for name in missing}
    model.load_state_dict(
        {name if _is_top(name, "head.", "pooler.") else f"backbone.{name}": value
         for name, value in state.items()},
        assign=True,
    )  # fmt: skip
    model.drawn = tuple(sorted({name.partition(".")[0] for name in missing}))
    return model.eval()


def _drawn_top(config: Config, head: str) -> dict[str, Tensor]:
    """Fresh weights of a head and a pooler."""
    row = config.row(config.model_type)
    top = nn.ModuleDict()
    if head != "none":
        top["head"] = row.kind(head).build(config)
    if row.pooler is not None:
        top["pooler"] = row.pooler(config)
    initialize(top, 1, getattr(config, "init_std", 0.02))
    return top.state_dict()


def _is_top(name: str | tuple[str, ...], *prefixes: str) -> bool:
    return isinstance(name, str) and name.startswith(prefixes)


def _other_heads(config: Config) -> list[Dropped]:
    """The tensors of every head that this type can carry."""
    kinds = config.row(config.model_type).heads.values()
    return [Dropped(rule.theirs) for kind in kinds for rule in kind.rules(config)]


def known_names(config: Config, names: Collection[str]) -> dict[str, str]:
    """Each name of a checkpoint by what one with a head calls it today."""
    row = config.row(config.model_type)
    prefix = row.prefix
    is_bare = bool(prefix) and not any(name.startswith(prefix) for name in names)
    heads = _other_heads(config) if is_bare else []
    return {
        (prefix if is_bare and not knows(heads, name) else "") + _modern(name, row.renamed): name
        for name in names
    }


def _modern(name: str, renamed: Mapping[str, str]) -> str:
    for old, new in OLD_NAMES:
        name = name.replace(old, new)
    for old, new in renamed.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
    return name


class _Named(Mapping[str, Tensor]):
    """Tensors under other names, read when asked."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _ready(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is not None:
        tensor = tensor.to(dtype)
    return tensor.contiguous()
