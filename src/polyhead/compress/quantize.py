"""A built model in fewer bits, by surgery: no model file knows of it."""

import copy
from typing import Any

from torch import Tensor, nn

from polyhead.compress.formats import FORMATS, PackedWeight
from polyhead.compress.layers import PackedTable, pack_experts, pack_layer, tie_packed
from polyhead.errors import ConfigError
from polyhead.models.model import BESIDE, TaskModel
from polyhead.nn.embedding import TokenEmbedding
from polyhead.nn.head import LanguageHead
from polyhead.nn.moe import Experts


def quantize(model: TaskModel, form: str = "nf4", *, embeddings: str | None = None) -> TaskModel:
    """A copy of `model` whose matrices are kept in few bits and unpacked when they are used.

    form:       "nf4": 4.13 bits a weight (QLoRA, Dettmers et al. 2023), "nf6": 6.13, "int4": 5, in
                even steps for each 32 weights, "int8": 8.5, a scale for each 32, "int8-rows": 8,
                a scale a row. What begins with int is what `pack` makes fast.
    embeddings: of the tables of tokens and the language heads, which bear few bits ill; "none"
                leaves them as they are, None is nf6 with nf4 and nf6, else int8.
    Linear layers and experts of the backbone are packed; norms, biases, routers and other heads
    stay. The copy computes in the old model's dtype; its matrices do not learn: an adapter can. It
    saves as the floats that its matrices unpack to. The old model is untouched.
    Errors: ConfigError for another form, and for a model that has adapters or is packed already.
    """
    finer = embeddings or ("int8" if form.startswith("int") else "nf6")
    for name in (form, finer):
        if name not in FORMATS and not name == embeddings == "none":
            raise ConfigError(f"form is {name!r}: choose one of {', '.join(FORMATS)}")
    names = dict(model.named_modules())
    if any(f".{BESIDE}." in name or hasattr(part, "packed") for name, part in names.items()):
        raise ConfigError("the model has adapters or few bits already; start from a plain one")
    found, layers, tables = _copied(model, finer != "none")
    for layer in layers:
        if isinstance(layer, Experts):
            pack_experts(layer, FORMATS[form])
        else:
            pack_layer(layer, FORMATS[form])
    if finer != "none":
        _pack_vocabulary(found, tables, FORMATS[finer], model.is_tied)
    return found


def _pack_vocabulary(
    model: TaskModel, tables: list[TokenEmbedding], form: type[PackedWeight], tied: bool
) -> None:
    for table in tables:
        pack_layer(table, form)
    for head in _language_heads(model):
        if tied:
            embedding: Any = getattr(model.backbone, "embedding")  # noqa: B009
            assert isinstance(embedding, PackedTable)
            tie_packed(head, embedding)
        else:
            pack_layer(head, form)


def weight_bytes(model: nn.Module) -> int:
    """What a model's weights take in memory, each counted once."""
    seen: dict[int, Tensor] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        seen[tensor.data_ptr()] = tensor
    return sum(tensor.numel() * tensor.element_size() for tensor in seen.values())


def _copied(
    model: TaskModel, embeddings: bool
) -> tuple[TaskModel, list[nn.Module], list[TokenEmbedding]]:
    """The model with what is to be packed shared, and where that is: layers and tables."""
    backbone = list(model.backbone.modules())
    layers = [part for part in backbone if type(part) in (nn.Linear, Experts)]
    tables = [part for part in backbone if type(part) is TokenEmbedding] if embeddings else []
    heads = _language_heads(model) if embeddings else []
    shared = [p for part in (*layers, *heads) for p in part.parameters() if p.ndim >= 2]
    shared += [table.weight for table in tables]
    memo: dict[int, Any] = {id(parameter): parameter for parameter in shared}
    found = copy.deepcopy(model, memo)
    return found, [memo[id(layer)] for layer in layers], [memo[id(table)] for table in tables]


def _language_heads(model: TaskModel) -> list[LanguageHead]:
    parts = [] if model.head is None else list(model.head.modules())
    return [part for part in parts if isinstance(part, LanguageHead)]
