"""Models of smaller shapes: whole heads, neurons and experts go, those that count least.

H heads, G of them with keys of their own, F neurons, N experts. What stays is another model of the
same family, which its configuration describes.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.compress.importance import Importance, magnitude
from polyhead.compress.layers import check_floats
from polyhead.errors import ConfigError
from polyhead.models.config import Config
from polyhead.models.model import TaskModel
from polyhead.models.registry import family_of
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.feedforward import FeedForward, GatedFeedForward
from polyhead.nn.moe import MixtureOfExperts
from polyhead.nn.position import Alibi, T5Bias, alibi_slopes

State = dict[str, Tensor]
WIDTHS = ("d_ff", "decoder_d_ff", "d_expert", "shared_d_ff")
HEADS = (
    ("num_heads", "num_kv_heads", "head_dim"),
    ("num_decoder_heads", "num_decoder_kv_heads", "decoder_head_dim"),
)
STEP = 32  # neurons, where a layer is wide enough for that to be a small share of it


def shrink(
    model: TaskModel,
    *,
    heads: float = 0.0,
    kv_heads: float = 0.0,
    neurons: float = 0.0,
    experts: float = 0.0,
    importance: Importance | None = None,
) -> TaskModel:
    """A copy of `model` without the least important of its parts: smaller matrices, less to do.

    heads:      share of each attention's query heads; where several read the same keys, of those.
    kv_heads:   share of the heads of keys and values, which go with all queries that read them, so
                that caches are smaller too. Where each query has its own, `heads` is the same.
    neurons:    share of each feed-forward's inner width, of each expert's too. From 512 on, widths
                stay multiples of 32.
    experts:    share of each mixture's experts.
    importance: what counts how much; None asks the weights alone. `polyhead.importance` asks texts.
    Every layer loses as many as any other, each its own least ones; but heads that read one table
    of positions together (T5's, ALiBi's slopes) go from all its layers together. A layer that
    serves several depths stays shared. The copy saves as a plain checkpoint. Where Hugging Face's
    config.json has no key for the width of a head, `head_dim` stands there, which others do not
    read. The old model is untouched.
    Errors: ConfigError for shares that cannot be, for parts that the model does not have, and for a
    model that has adapters or is in few bits.
    """
    asked = Shares(heads, kv_heads, neurons, experts)
    check_floats(model)
    if model.config.ranks:
        raise ConfigError("a model of low rank is not made smaller: start from merge_low_rank")
    asked.check(model)
    found = importance or magnitude(model)
    config = _smaller(model.config, asked)
    wanted = _blank(config)
    kept = staying_heads(model.backbone, wanted, found)
    if getattr(config, "slopes", None) is not None:
        config = replace(config, slopes=_kept_slopes(model, kept))  # pyright: ignore[reportCallIssue]
        wanted = _blank(config)
    state = dict(model.backbone.state_dict())
    _cut_attention(model.backbone, state, kept)
    _cut_experts(model.backbone, wanted, state, found)
    _cut_neurons(model.backbone, wanted, state, found)
    wanted.load_state_dict({n: t.detach().clone() for n, t in state.items()}, assign=True)
    return _with_backbone(model, wanted, config)


@dataclass(frozen=True)
class Shares:
    """What is to go, of each kind of part."""

    heads: float = 0.0
    kv_heads: float = 0.0
    neurons: float = 0.0
    experts: float = 0.0

    def check(self, model: TaskModel) -> None:
        """ConfigError for a share that cannot be, and for parts that the model does not have."""
        kinds: Mapping[str, Any] = {
            "heads": MultiHeadAttention,
            "kv_heads": MultiHeadAttention,
            "neurons": FeedForward | GatedFeedForward | MixtureOfExperts,
            "experts": MixtureOfExperts,
        }
        shares = {item.name: getattr(self, item.name) for item in fields(self)}
        for name, share in shares.items():
            if not 0 <= share < 1:
                raise ConfigError(f"{name} is {share}: a share from 0 to below 1")
            parts = [part for part in model.backbone.modules() if isinstance(part, kinds[name])]
            if share and not parts:
                raise ConfigError(f"{name} is {share}, and {model.config.model_type} has none")
            if share and any(len(getattr(_q_norm(part), "shape", ())) > 1 for part in parts):
                raise ConfigError(
                    f"{name} is {share}: {model.config.model_type} norms all heads of a layer "
                    "together, so that none can go without changing the others"
                )
        if not any(shares.values()):
            raise ConfigError(f"nothing is to go: give a share of {', '.join(shares)}")


def smaller(model: TaskModel, asked: Shares) -> nn.Module:
    """The backbone that would be left, without its weights. Errors: ConfigError as of `shrink`."""
    asked.check(model)
    return _blank(_smaller(model.config, asked))


def _blank(config: Config) -> nn.Module:
    with torch.device("meta"):
        return family_of(config.model_type).backbone(config)


def _q_norm(part: nn.Module) -> Any:
    return getattr(part, "q_norm", None)


def _smaller(config: Config, asked: Shares) -> Config:
    """The config of what stays, and of the towers within it. Slopes are the first ones yet."""
    said = {item.name: getattr(config, item.name) for item in fields(config)}
    changed: dict[str, Any] = {
        name: _smaller(value, asked) for name, value in said.items() if isinstance(value, Config)
    }
    if "num_heads" in said and (asked.heads or asked.kv_heads):
        changed |= _fewer_heads(config, said, asked)
    if asked.neurons:
        changed |= _fewer_neurons(config, said, asked.neurons)
    if asked.experts and said.get("num_experts"):
        changed["num_experts"] = _left("experts", said["num_experts"], asked.experts)
        if changed["num_experts"] < said["top_k"]:
            raise ConfigError(
                f"experts is {asked.experts}: {changed['num_experts']} would be left, and each "
                f"token goes to {said['top_k']}; ask for less"
            )
    return replace(config, **changed)


def _fewer_heads(config: Any, said: Mapping[str, Any], asked: Shares) -> dict[str, Any]:
    """Counts of heads, with the width that they have."""
    changed: dict[str, Any] = {}
    for heads, kv_heads, head_dim in HEADS:
        queries, keys, width = (said.get(name) for name in (heads, kv_heads, head_dim))
        if queries is None:
            continue
        if isinstance(queries, tuple):  # of the stages of an image model
            widths = width or tuple(config.width(i) // n for i, n in enumerate(queries))
            counts = [_heads_left(count, count, asked)[0] for count in queries]
            changed |= {heads: tuple(counts), head_dim: tuple(widths)}
            continue
        changed[heads], left = _heads_left(queries, keys or queries, asked)
        changed[head_dim] = width or config.d_model // queries
        if keys is not None:
            changed[kv_heads] = left
    if said.get("slopes") is not None or said.get("position") == "alibi":
        changed["slopes"] = (1.0,) * changed["num_heads"]
    return changed


def _heads_left(heads: int, kv_heads: int, asked: Shares) -> tuple[int, int]:
    """Heads and heads of keys that stay."""
    if heads == kv_heads:
        left = _left("heads", heads, max(asked.heads, asked.kv_heads))
        return left, left
    readers = _left("heads", heads // kv_heads, asked.heads)
    left = _left("kv_heads", kv_heads, asked.kv_heads)
    return left * readers, left


def _left(what: str, count: int, share: float) -> int:
    """How many of so many stay. Errors: ConfigError for a share of which none would go, or all."""
    gone = int(share * count + 0.5)
    if share and not gone:
        raise ConfigError(
            f"{what} is {share}: of {count} side by side none would go; ask for {0.5 / count:.2g} "
            "or more"
        )
    if gone == count:
        raise ConfigError(f"{what} is {share}: of {count} side by side none would stay")
    return count - gone


def _fewer_neurons(config: Any, said: Mapping[str, Any], share: float) -> dict[str, Any]:
    if "mlp_ratio" in said:
        ratio = said["mlp_ratio"] * (1 - share)
        return {"mlp_ratio": int(ratio) if ratio == int(ratio) else ratio}
    widths = {name: said[name] for name in WIDTHS if said.get(name)}
    if "d_ff" in said and said["d_ff"] is None:
        widths["d_ff"] = 4 * config.d_model
    return {name: _width_left(width, share) for name, width in widths.items()}


def _width_left(width: int, share: float) -> int:
    step = STEP if width >= 16 * STEP and width % STEP == 0 else 1
    return step * _left("neurons", width // step, share)


def staying_heads(old: nn.Module, new: nn.Module, found: Importance) -> dict[str, Tensor]:
    """Numbers of the heads that stay, in order, by each attention's name."""
    return {
        name: _chosen_heads(scores, _part(old, name), _part(new, name))
        for name, scores in scores_of_heads(old, found).items()
    }


def scores_of_heads(backbone: nn.Module, found: Importance) -> dict[str, Tensor]:
    """What heads count by each attention's name: the same for all layers that choose together."""
    together = _together(backbone)
    scores: dict[str, Tensor] = {}
    for name, part in _named(backbone, MultiHeadAttention):
        own = _scores(found.heads, name, (part.num_heads,))
        # Layers that choose together have an equal say.
        own = own / own.sum().clamp_min(1e-30) if name in together else own
        table = together.get(name, name)
        scores[table] = scores[table] + own if table in scores else own
    return {
        name: scores[together.get(name, name)] for name, _ in _named(backbone, MultiHeadAttention)
    }


def _chosen_heads(scores: Tensor, old: MultiHeadAttention, new: MultiHeadAttention) -> Tensor:
    readers = new.num_heads // new.num_kv_heads
    by_key = scores.view(old.num_kv_heads, -1)  # [G, H / G]
    most = by_key.topk(readers, dim=1).indices.sort(1).values
    keys = by_key.gather(1, most).sum(1).topk(new.num_kv_heads).indices.sort().values
    return (keys[:, None] * by_key.shape[1] + most[keys]).flatten()


def _together(backbone: nn.Module) -> dict[str, str]:
    """What each attention's heads share with those of other layers, by its name."""
    found: dict[str, str] = {}
    for name, part in backbone.named_modules():
        position, layers = getattr(part, "relative", None), getattr(part, "layers", None)
        if isinstance(position, T5Bias | Alibi) and isinstance(layers, nn.ModuleList):
            prefix = f"{name}." if name else ""
            table = "slopes" if isinstance(position, Alibi) else f"{prefix}relative.table"
            names = (f"{prefix}layers.{number}.attention" for number in range(len(layers)))
            found |= dict.fromkeys(names, table)
    return found


def _kept_slopes(model: TaskModel, kept: Mapping[str, Tensor]) -> tuple[float, ...]:
    config: Any = model.config
    slopes = config.slopes or alibi_slopes(config.num_heads).tolist()
    table = next(name for name, shared in _together(model.backbone).items() if shared == "slopes")
    return tuple(slopes[head] for head in kept[table].tolist())


def _cut_attention(backbone: nn.Module, state: State, kept: Mapping[str, Tensor]) -> None:
    together = _together(backbone)
    for name, part in _named(backbone, MultiHeadAttention):
        heads, width = kept[name], part.head_dim
        keys = (heads // (part.num_heads // part.num_kv_heads)).unique()
        for layer, numbers in (
            ("q", heads), ("distance_q", heads), ("distance_k", heads), ("k", keys), ("v", keys),
        ):  # fmt: skip
            _cut(state, f"{name}.{layer}", _spread(numbers, width))
        _cut(state, f"{name}.out", _spread(heads, width), dim=1)
        bias = f"{name.removesuffix('attention')}bias.table"
        if bias in state:  # Swin's, of a layer; those of a stack once for all its layers
            state[bias] = state[bias].index_select(1, heads)
    for table in {table for table in together.values() if f"{table}.weight" in state}:
        name = next(name for name, own in together.items() if own == table)
        state[f"{table}.weight"] = state[f"{table}.weight"].index_select(1, kept[name])


def _spread(heads: Tensor, width: int) -> Tensor:
    """The rows of some heads."""
    return (heads[:, None] * width + torch.arange(width, device=heads.device)).flatten()


def _cut(state: State, layer: str, index: Tensor, dim: int = 0) -> None:
    """Leave of a linear layer some rows, or columns, if it is there."""
    for kind in ("weight", "bias")[: 2 - dim]:
        if (name := f"{layer}.{kind}") in state:
            state[name] = state[name].index_select(dim, index)


def _cut_neurons(old: nn.Module, new: nn.Module, state: State, found: Importance) -> None:
    for name, part in _named(old, FeedForward | GatedFeedForward):
        width = part.up.out_features
        scores = _scores(found.neurons, name, (width,))
        index = scores.topk(_part(new, name).up.out_features).indices.sort().values
        for layer in ("gate", "up"):
            _cut(state, f"{name}.{layer}", index)
        _cut(state, f"{name}.down", index, dim=1)


def _cut_experts(old: nn.Module, new: nn.Module, state: State, found: Importance) -> None:
    for name, part in _named(old, MixtureOfExperts):
        smaller = _part(new, name)
        count, width = part.experts.gate.shape[:2]
        scores = _scores(found.experts, name, (count,))
        stay = scores.topk(smaller.num_experts).indices.sort().values
        _cut(state, f"{name}.router", stay)
        neurons = _scores(found.neurons, f"{name}.experts", (count, width))[stay]
        index = neurons.topk(smaller.experts.gate.shape[1], dim=1).indices.sort(1).values
        for layer in ("gate", "up"):
            whole = state[f"{name}.experts.{layer}"]
            state[f"{name}.experts.{layer}"] = whole[stay[:, None], index]
        down = state[f"{name}.experts.down"].transpose(1, 2)
        down = down[stay[:, None], index].transpose(1, 2).contiguous()
        state[f"{name}.experts.down"] = down


def _scores(found: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    scores = found.get(name)
    if scores is None or scores.shape != shape:
        said = "nothing" if scores is None else f"{list(scores.shape)} numbers"
        raise ConfigError(
            f"importance says {said} of {name}, which wants {list(shape)}: was it asked of this "
            "model?"
        )
    return scores


def _named(backbone: nn.Module, kind: Any) -> Iterator[tuple[str, Any]]:
    return ((name, part) for name, part in backbone.named_modules() if isinstance(part, kind))


def _part(backbone: nn.Module, name: str) -> Any:
    return backbone.get_submodule(name)


def _with_backbone(model: TaskModel, backbone: nn.Module, config: Config) -> TaskModel:
    """A copy of a model with another backbone in the place of its own."""
    found = copy.deepcopy(model, {id(model.backbone): backbone.train(model.training)})
    found.config, found.origin = config, None
    found.tie()
    return found
