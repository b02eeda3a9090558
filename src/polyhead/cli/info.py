"""`polyhead info`: what a model is made of and what it costs, without loading its weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from polyhead.errors import ConfigError

if TYPE_CHECKING:
    from rich.tree import Tree
    from torch import Tensor, nn

    from polyhead.models.model import TaskModel

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "4 bit": 0.5}
_WIDTH = 100
_LONGEST = 400


@dataclass(frozen=True)
class Args:
    """Show a model's parameters, memory, FLOPs a token, settings and parts. No weight is read.

    FLOPs of a token's forward: 2 N + 4 C H D L, with N the weights of all matrix products (a tied
    head counts, embeddings do not, of experts only those a token visits), C the tokens it attends
    to, H query heads of width D, L layers.

    Examples:
      polyhead info smollm2-135m
      polyhead info deberta-v3
      polyhead info llama --set vocab_size=32000 d_model=512 d_ff=1376 num_layers=8 num_heads=8
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Directory, .gguf file, named model or owner/name; a published model's short name, as in
    `polyhead diff --help`; or a family, with its default sizes."""
    set: tuple[str, ...] = ()
    """Fields of a family's config, name=value."""
    context: int | None = None
    """Tokens for the attention's share of the FLOPs; None is the model's max_seq_len."""
    json: bool = False
    """One JSON object instead of a page."""


def run(args: Args) -> int:
    """Look and print."""
    from polyhead.cli.meta import outline
    from polyhead.models.registry import families

    try:
        seen = outline(args.model, args.set)
    except ConfigError:
        if args.set or args.model not in families() or Path(args.model).exists():
            raise
        _print_fields(args.model)
        return 0
    model, source = seen.model, str(seen.path or args.model)
    found = {"model": source, **figures(model, args.context)}
    if seen.preset is not None:
        found["checkpoint"] = seen.preset.checkpoint
    if seen.path is not None:
        found["weights_bytes_stored"] = stored(seen.path)
    if args.json:
        print(json.dumps({**found, "config": model.hf_config()}))
    else:
        _print(model, found)
    return 0


def figures(model: "TaskModel", context: int | None = None) -> dict[str, Any]:
    """Parameters, bytes and FLOPs of a model, which may be on the meta device."""
    from polyhead.nn.attention import MultiHeadAttention
    from polyhead.nn.embedding import TokenEmbedding
    from polyhead.train.flops import attention_flops, product_weights

    config = model.config
    context = context or getattr(config, "max_seq_len", 1024)
    if context < 1:
        raise ConfigError(f"context is {context}; it must be 1 or more")
    layers = [part for part in model.modules() if isinstance(part, MultiHeadAttention)]
    windows = getattr(config, "windows", None) or [None] * len(layers)
    seen = [min(context, window or context) for window in windows]
    total = model.num_parameters()
    embeddings = sum(
        part.weight.numel() for part in model.modules() if isinstance(part, TokenEmbedding)
    )
    products = product_weights(model)
    kv = sum(2 * part.num_kv_heads * part.head_dim for part in layers)
    return {
        "parameters": total,
        "parameters_embeddings": embeddings,
        "parameters_by_part": _by_part(model),
        "weights_bytes": {name: round(total * size) for name, size in BYTES.items()},
        "kv_cache_values_per_token": kv,
        "kv_cache_bytes_per_token": {name: kv * BYTES[name] for name in ("float32", "bfloat16")},
        "matmul_parameters_per_token": products,
        "context": context,
        "flops_per_token": 2 * products + attention_flops(layers, seen),
    }


def _by_part(model: "TaskModel") -> dict[str, int]:
    """Parameters of the backbone's children and of the head; what is shared counts where first."""
    seen: set[int] = set()

    def count(part: "nn.Module") -> int:
        fresh = [p for p in part.parameters() if id(p) not in seen]
        seen.update(map(id, fresh))
        return sum(p.numel() for p in fresh)

    parts = {name: count(part) for name, part in model.backbone.named_children()}
    if model.head is not None:
        parts["head"] = count(model.head)
    return {name: size for name, size in parts.items() if size}


def stored(path: Path) -> int:
    """Bytes of a checkpoint's weights as they are stored."""
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def _print_fields(family: str) -> None:
    """The fields of a family that cannot be built without sizes."""
    import dataclasses

    from polyhead.cli.fields import config_fields
    from polyhead.models.registry import family_of

    kind = family_of(family).config
    given = {item.name: item.default for item in dataclasses.fields(kind)}
    print(f"{family} has no default sizes; give them with --set name=value. Its fields:")
    for name, hint in config_fields(kind).items():
        default = given[name]
        shown = "needed" if default is dataclasses.MISSING else f"default {default!r}"
        print(f"  {name:<22}{getattr(hint, '__name__', str(hint)):<14}{shown}")


def _print(model: "TaskModel", found: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if _terminal() else _WIDTH)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("model", str(found["model"]))
    if "checkpoint" in found:
        table.add_row("sizes of", str(found["checkpoint"]))
    table.add_row("family", model.config.model_type)
    shared = ", the head's too" if model.is_tied else ""
    table.add_row(
        "parameters",
        f"{found['parameters']:,} ({found['parameters_embeddings']:,} in the embedding{shared})",
    )
    sizes = ", ".join(f"{name} {_bytes(n)}" for name, n in found["weights_bytes"].items())
    table.add_row("weights", sizes)
    if "weights_bytes_stored" in found:
        table.add_row("on disk", _bytes(found["weights_bytes_stored"]))
    cache = ", ".join(f"{k} {_bytes(n)}" for k, n in found["kv_cache_bytes_per_token"].items())
    table.add_row("KV cache a token", cache)
    table.add_row(
        "FLOPs a token",
        f"{found['flops_per_token'] / 1e6:,.1f} M at {found['context']} tokens of context: "
        f"2 x {found['matmul_parameters_per_token']:,}"
        + (" + attention" if found["kv_cache_values_per_token"] else ""),
    )
    # Captured: rich would make an exit of its own of a reader that has gone.
    with console.capture() as page:
        console.print(table)
        console.print()
        console.print(_tree(model))
        console.print()
        settings = {
            k: v for k, v in model.hf_config().items() if k not in ("architectures", "dtype")
        }
        console.print("config.json", markup=False)
        for name, value in sorted(settings.items()):
            console.print(f"  {name} = {_short(value)}", markup=False, soft_wrap=True)
    print(page.get(), end="")


def _short(value: Any) -> str:
    """JSON, of long tables (a thousand labels) the beginning."""
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ... ({len(value)} entries)"


def _terminal() -> bool:
    import sys

    return sys.stdout.isatty()


def _tree(model: "TaskModel") -> "Tree":
    """The parts with their parameters; layers that are alike are shown once."""
    from rich.tree import Tree

    tree = Tree(f"{model.config.model_type}  {_count(model)}")
    backbone = tree.add(f"backbone  {_count(model.backbone)}")
    for name, part in model.backbone.named_children():
        _grow(backbone, name, part)
    if model.head is not None:
        tied = "  (the embedding's weight)" if model.is_tied else ""
        tree.add(f"head  {type(model.head).__name__}  {_count(model.head)}{tied}")
    return tree


def _grow(tree: "Tree", name: str, part: "nn.Module") -> None:
    from torch import nn

    if not isinstance(part, nn.ModuleList):
        branch = tree.add(f"{name}  {_named(part)}  {_count(part)}".rstrip())
        for inner, child in part.named_children():
            _grow(branch, inner, child)
        return
    alike: list[list[int]] = []
    for index, child in enumerate(part):
        if alike and repr(part[alike[-1][0]]) == repr(child):
            alike[-1].append(index)
        else:
            alike.append([index])
    for group in alike:
        label = f"{name}.{group[0]}" + (f"-{group[-1]}" if len(group) > 1 else "")
        _grow(tree, f"{label}  {len(group)} x" if len(group) > 1 else label, part[group[0]])


def _named(part: "nn.Module") -> str:
    """A part's class, and the shape of a weight of its own."""
    weight: Tensor | None = getattr(part, "weight", None)
    own = dict(part.named_parameters(recurse=False))
    shape = f" {list(weight.shape)}" if weight is not None and "weight" in own else ""
    # rich reads brackets as markup.
    return f"{type(part).__name__}{shape}".replace("[", "\\[")


def _count(part: "nn.Module") -> str:
    size = sum(p.numel() for p in part.parameters())
    return f"{size:,}" if size else ""


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
