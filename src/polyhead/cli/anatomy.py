"""What a model is made of, read off its modules: one fact a line. E width, H heads."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from polyhead.models.model import TaskModel
from polyhead.models.window_mlp import WindowMLP
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.embedding import Table, TokenEmbedding
from polyhead.nn.feedforward import ACTIVATIONS
from polyhead.nn.head import LanguageHead
from polyhead.nn.moe import MixtureOfExperts
from polyhead.nn.patches import PatchEmbedding
from polyhead.nn.position import LearnedPositions

Stacks = Mapping[str, list[nn.Module]]
"""Blocks by what they stand in: "encoder" and "decoder", "text" and "vision", or "" alone."""

# Whose norms follow the sum of a part and its input; all others see the input of a part.
POST_NORM = ("PostNormBlock", "DebertaBlock")
POSITIONS: Mapping[str, Callable[[Any], str]] = {
    "LearnedPositions": lambda part: f"learned, {part.weight.shape[0]:,}",
    "PatchPositions": lambda part: "learned for each patch",
    "SinusoidalPositions": lambda part: "sinusoids",
    "MarianPositions": lambda part: "sinusoids, sines before cosines",
    "Rotary": lambda part: f"rotary, base {part.base:,.0f}{_scaling(part)}",
    "DynamicRotary": lambda part: f"rotary, base {part.base:,.0f}{_scaling(part)}",
    "T5Bias": lambda part: f"a bias for each head and distance, {part.num_buckets} buckets",
    "Disentangled": lambda part: f"disentangled, a table of {part.table.weight.shape[0]} distances",
    "Alibi": lambda part: "ALiBi",
    "Shaw": lambda part: "vectors of distances (Shaw)",
    "WindowBias": lambda part: f"a bias for each head and offset in {part.edge} × {part.edge}",
}
EXTRAS = {
    "LayerScale": "a learned scale on each part",
    "Convolution": "a convolution beside the first layer",
    "PatchMerging": "patches merge two by two between stages",
    "Projector": "a projector from the image tower into the text",
}


@dataclass(frozen=True)
class Fact:
    """One line of a table: what of which part has which value."""

    part: str
    name: str
    value: str


def anatomy(model: TaskModel) -> list[Fact]:
    """Every fact of a model, which may be on the meta device, in the order of a forward."""
    stacks = _stacks(model.backbone)
    found = {
        "layers": _layers(model, stacks),
        "embedding": _embedding(model),
        "position": {"kind": _position(model)},
        "norm": _norm(model, stacks),
        "window": _window(model),
        "recurrence": _recurrence(model),
        "attention": _attention(model, stacks) if stacks else {},
        "feed-forward": _feed_forward(stacks),
        "sharing": _sharing(model, stacks),
        "head": {
            "here": "none" if model.head is None else type(model.head).__name__,
            "heads": ", ".join(model.config.row(model.config.model_type).heads) or "none",
        },
        "parameters": _parameters(model, stacks),
    }
    return [
        Fact(part, name, value)
        for part, values in found.items()
        for name, value in values.items()
        if value
    ]


def _stacks(backbone: nn.Module) -> dict[str, list[nn.Module]]:
    found: dict[str, list[nn.Module]] = {}
    for name, part in backbone.named_modules():
        if hasattr(part, "attention") and hasattr(part, "ffn"):
            first = name.partition(".")[0]
            found.setdefault("" if first in ("layers", "stages") else first, []).append(part)
    return found


def _layers(model: TaskModel, stacks: Stacks) -> dict[str, str]:
    counts = {name: str(_depth(model, blocks)) for name, blocks in stacks.items()}
    width = _each(stacks, lambda block: f"{block.attention_norm.weight.shape[0]:,}")
    return {"number": _joined(counts), "width": width, "beside": _extras(model)}


def _depth(model: TaskModel, blocks: list[nn.Module]) -> int:
    """Layers a token passes, of which several may be one block."""
    shared = getattr(model.config, "num_groups", None) is not None
    return int(getattr(model.config, "num_layers")) if shared else len(blocks)  # noqa: B009


def _extras(model: TaskModel) -> str:
    names = dict.fromkeys(type(part).__name__ for part in model.backbone.modules())
    return ", ".join(EXTRAS[name] for name in names if name in EXTRAS)


def _embedding(model: TaskModel) -> dict[str, str]:
    backbone = model.backbone
    tokens = [part for part in backbone.modules() if isinstance(part, TokenEmbedding)]
    patches = [part for part in backbone.modules() if isinstance(part, PatchEmbedding)]
    types = _named(backbone, "token_types", Table)
    norms = _named(backbone, "embedding_norm", nn.Module)
    widened = _named(backbone, "widen", nn.Linear)
    wide = f", widened to {widened[0].out_features:,}" if widened else ""
    return {
        "tokens": " / ".join(
            f"{part.weight.shape[0]:,} × {part.weight.shape[1]:,}{wide}" for part in tokens
        ),
        "scaled": " / ".join(f"× {p.scale:.4g}" for p in tokens if getattr(p, "scale", 1.0) != 1.0),
        "patches": " / ".join(
            "{} × {} pixels".format(*part.projection.kernel_size) for part in patches
        ),
        "token types": " / ".join(str(part.weight.shape[0]) for part in types) or "none",
        "norm": type(norms[0]).__name__ if norms else "none",
    }


def _position(model: TaskModel) -> str:
    # DeBERTa's enhanced decoder adds places where the vocabulary is near, and not before.
    is_late = not getattr(model.config, "biased_input", True)
    found = dict.fromkeys(
        POSITIONS[type(part).__name__](part)
        + (" (in the head alone)" if is_late and isinstance(part, LearnedPositions) else "")
        for part in model.backbone.modules()
        if type(part).__name__ in POSITIONS
    )
    # A plain table under that name is learned as well.
    found |= dict.fromkeys(
        f"learned, {part.weight.shape[0]:,}"
        for part in _named(model.backbone, "positions", Table)
        if type(part).__name__ not in POSITIONS
    )
    return " + ".join(found) or "none"


def _norm(model: TaskModel, stacks: Stacks) -> dict[str, str]:
    finals = [name for name in stacks if _owner(model.backbone, name, "norm") is not None]
    return {
        "kind": _each(stacks, lambda block: type(block.attention_norm).__name__),
        "where": _each(
            stacks,
            lambda block: (
                "after each part" if type(block).__name__ in POST_NORM else "before each part"
            ),
        ),
        "final": _joined({name: "yes" if name in finals else "no" for name in stacks}),
        "eps": _each(stacks, lambda block: f"{block.attention_norm.eps:g}"),
        "bias": _each(
            stacks,
            lambda block: "no" if getattr(block.attention_norm, "bias", None) is None else "yes",
        ),
    }


def _window(model: TaskModel) -> dict[str, str]:
    """What a model without attention looks back over, where that has an end."""
    part = model.backbone
    if not isinstance(part, WindowMLP):
        return {}
    config = part.config
    return {
        "tokens": f"{config.window}, the current one among them",
        "hidden layer": f"{config.read_width:,} to {config.d_model:,}, tanh",
        "direct connections": "yes" if config.direct else "no",
    }


def _recurrence(model: TaskModel) -> dict[str, str]:
    found = [part for part in model.backbone.modules() if isinstance(part, nn.LSTM)]
    return {
        "kind": ", ".join(type(part).__name__ for part in found),
        "layers": ", ".join(str(part.num_layers) for part in found),
        "width": ", ".join(f"{part.hidden_size:,}" for part in found),
    }


def _attention(model: TaskModel, stacks: Stacks) -> dict[str, str]:
    def of(read: Callable[[MultiHeadAttention], str]) -> str:
        return _each(stacks, lambda block: read(block.attention))

    return {
        "kind": of(lambda part: type(part).__name__),
        "sees": _sees(model, stacks),
        "heads": of(lambda part: str(part.num_heads)),
        "kv heads": of(_kv_heads),
        "head width": of(lambda part: str(part.head_dim)),
        "scale": of(lambda part: _scale(part.scale)),
        "biases": of(lambda part: _biased(part, ("q", "k", "v", "out"))),
        "norm of q, k": of(lambda part: "no" if isinstance(part.q_norm, nn.Identity) else "yes"),
    }


def _kv_heads(part: MultiHeadAttention) -> str:
    share = part.num_heads // part.num_kv_heads
    return "as many" if share == 1 else f"{part.num_kv_heads}, each for {share} of queries"


def _sees(model: TaskModel, stacks: Stacks) -> str:
    config = model.config
    kind = getattr(config, "kind", "decoder")
    past, everything = "itself and what is before", "all there is"
    if any(type(part).__name__ == "WindowBias" for part in model.backbone.modules()):
        edge = getattr(config, "window")  # noqa: B009
        return f"windows of {edge} × {edge} patches, shifted in every other layer"
    if kind == "encoder-decoder":
        return f"encoder {everything}; decoder {past}, and the encoder"
    if kind == "two towers":
        return f"text {past}; vision {everything}"
    if kind == "image-text":
        return f"vision {everything}; language {past}"
    window = getattr(config, "window", None) if getattr(config, "use_window", True) else None
    where = past if kind == "decoder" else everything
    return f"{where}, of {window:,} tokens" if window else where


def _feed_forward(stacks: Stacks) -> dict[str, str]:
    def of(read: Callable[[Any], str]) -> str:
        return _each(stacks, lambda block: read(block.ffn))

    return {
        "kind": of(lambda part: type(part).__name__),
        "width": of(lambda part: f"{_inner(part):,}"),
        "activation": of(lambda part: _activation(getattr(part, "experts", part))),
        "gate": of(lambda part: "yes" if hasattr(getattr(part, "experts", part), "gate") else "no"),
        "biases": of(
            lambda part: (
                "none"
                if isinstance(part, MixtureOfExperts)
                else _biased(part, ("gate", "up", "down"))
            )
        ),
        "experts": of(
            lambda part: (
                f"{part.experts.gate.shape[0]}, {part.top_k} a token"
                if isinstance(part, MixtureOfExperts)
                else "none"
            )
        ),
    }


def _sharing(model: TaskModel, stacks: Stacks) -> dict[str, str]:
    own = {name: len(blocks) for name, blocks in stacks.items()}
    deep = {name: _depth(model, blocks) for name, blocks in stacks.items()}
    shared = {
        name: "none" if own[name] == deep[name] else f"{deep[name]} layers share {own[name]}"
        for name in stacks
    }
    heads = () if model.head is None else model.head.modules()
    writes = any(isinstance(part, LanguageHead) for part in heads)
    tied = "one table" if model.is_tied else "apart"
    return {"layers": _joined(shared), "head and embedding": tied if writes else ""}


def _parameters(model: TaskModel, stacks: Stacks) -> dict[str, str]:
    tables = [part for part in model.backbone.modules() if isinstance(part, TokenEmbedding)]
    blocks = [block for some in stacks.values() for block in some]
    return {
        "all": f"{model.num_parameters():,}",
        "of token tables": f"{_count(tables):,}",
        "of layers": f"{_count(blocks):,}" if blocks else "",
    }


def _count(parts: Iterable[nn.Module]) -> int:
    weights = {id(weight): weight for part in parts for weight in part.parameters()}
    return sum(weight.numel() for weight in weights.values())


def _each(stacks: Stacks, read: Callable[[Any], str]) -> str:
    """What each stack's blocks say, once where they agree."""
    return _joined(
        {
            name: " / ".join(dict.fromkeys(read(block) for block in blocks))
            for name, blocks in stacks.items()
        }
    )


def _joined(values: Mapping[str, str]) -> str:
    said = list(dict.fromkeys(values.values()))
    if len(said) < 2:
        return said[0] if said else ""
    return "; ".join(f"{name} {value}".strip() for name, value in values.items())


def _named(backbone: nn.Module, name: str, kind: type[Any]) -> list[Any]:
    return [
        part
        for path, part in backbone.named_modules()
        if path.rpartition(".")[2] == name and isinstance(part, kind)
    ]


def _owner(backbone: nn.Module, stack: str, name: str) -> Any:
    return getattr(getattr(backbone, stack) if stack else backbone, name, None)


def _inner(part: Any) -> int:
    return part.experts.gate.shape[1] if hasattr(part, "experts") else part.up.out_features


def _activation(part: Any) -> str:
    return next((name for name, own in ACTIVATIONS.items() if own is part.activation), "other")


def _biased(part: Any, names: Iterable[str]) -> str:
    there = [name for name in names if getattr(getattr(part, name, None), "bias", None) is not None]
    return ", ".join(there) or "none"


def _scale(scale: float) -> str:
    square = round(scale**-2)
    return "1" if square == 1 else f"1/√{square}"


def _scaling(part: Any) -> str:
    name = type(part.scaling).__name__
    return "" if name == "Unscaled" else f", stretched ({name})"
