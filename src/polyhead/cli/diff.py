"""`polyhead diff`: what parts change between two families or two checkpoints."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from polyhead.cli.common import note

if TYPE_CHECKING:
    from polyhead.cli.anatomy import Fact
    from polyhead.cli.meta import Outline

_WIDTH = 150
_WHY = 44


@dataclass(frozen=True)
class Args:
    """Compare two models part by part, and say why the second has what the first has not.

    A model is a published one by its short name, a family, a directory, a .gguf file or owner/name
    of the hub. The table is read off the models' own parts; no weight is loaded.

    Examples:
      polyhead diff bert deberta-v3
      polyhead diff gpt2 llama
      polyhead diff runs/a runs/b --all
      polyhead diff t5 flan-t5 --json

    Short names: bert roberta distilbert albert deberta deberta-v3 gpt2 llama mistral qwen2 qwen3
    mixtral t5 flan-t5 marian vit deit dinov2 swin clip llava.
    """

    first: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="A")]
    """The model to begin from."""
    second: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="B")]
    """The model to compare with it."""
    all: bool = False
    """Show what is the same, too."""
    json: bool = False
    """One JSON object: a, b, and rows with part, name, a, b, why."""


@dataclass(frozen=True)
class Difference:
    """One line: a fact of both models, None where a model has no such part."""

    part: str
    name: str
    a: str | None
    b: str | None
    why: str


def run(args: Args) -> int:
    """Compare and print."""
    from polyhead.cli.meta import outline

    first, second = outline(args.first), outline(args.second)
    rows = differences(_facts(first), _facts(second))
    shown = [row for row in rows if args.all or row.a != row.b]
    if args.json:
        found = [row.__dict__ for row in shown]
        print(
            json.dumps({"a": _title(first), "b": _title(second), "rows": found}, ensure_ascii=False)
        )
    elif shown:
        _print(_title(first), _title(second), shown)
    else:
        note(f"{args.first} and {args.second} are made of the same parts; --all shows them")
    return 0


def differences(first: "Sequence[Fact]", second: "Sequence[Fact]") -> list[Difference]:
    """Both models' facts side by side, in the order of a forward."""
    from polyhead.cli.reasons import reason

    ours = {(fact.part, fact.name): fact.value for fact in first}
    theirs = {(fact.part, fact.name): fact.value for fact in second}
    parts = list(dict.fromkeys(part for part, _ in [*ours, *theirs]))
    keys = sorted(dict.fromkeys([*ours, *theirs]), key=lambda key: parts.index(key[0]))
    rows: list[Difference] = []
    for key in keys:
        a, b = ours.get(key), theirs.get(key)
        rows.append(Difference(*key, a, b, "" if a == b else reason(*key, a, b)))
    return rows


def _facts(model: "Outline") -> "list[Fact]":
    from polyhead.cli.anatomy import Fact, anatomy

    found = anatomy(model.model)
    if model.preset is not None:
        found.append(Fact("training", "objective", model.preset.objective))
        found.append(Fact("training", "tokenizer", model.preset.tokenizer))
    elif model.path is not None and (kind := _tokenizer(model)):
        found.append(Fact("training", "tokenizer", kind))
    return found


def _tokenizer(model: "Outline") -> str:
    """The kind of a checkpoint's tokenizer; "" where it has none."""
    from polyhead.adapt.load import tokenizer
    from polyhead.errors import PolyheadError

    try:
        words = tokenizer(str(model.path))
    except PolyheadError:
        return ""
    return f"{type(words.backend.model).__name__}, {words.vocab_size:,} tokens"


def _title(model: "Outline") -> str:
    return model.name if model.preset is None else f"{model.name} ({model.preset.checkpoint})"


def _print(first: str, second: str, rows: Sequence[Difference]) -> None:
    import sys

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("part", "", first, second):
        table.add_column(name, overflow="fold")
    table.add_column("why", style="dim", max_width=_WHY)
    last = ""
    for row in rows:
        part = row.part if row.part != last else ""
        last = row.part
        table.add_row(*map(Text, (part, row.name, row.a or "–", row.b or "–")), row.why)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
    # Captured: rich would make an exit of its own of a reader that has gone.
    with console.capture() as page:
        console.print(table)
    print("\n".join(line.rstrip() for line in page.get().rstrip("\n").split("\n")))
