"""`polyhead explain`: one page of what every head looks at, and which are worth a look."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from polyhead.cli.common import note, working
from polyhead.cli.texts import print_json
from polyhead.cli.translate import whole
from polyhead.errors import ConfigError, FileError
from polyhead.serve.opening import Opening

if TYPE_CHECKING:
    from polyhead.explain.page import Finding, Page

_NAMED = 6  # heads that a line on standard output names


@dataclass(frozen=True)
class Args:
    """Write a page that shows what a model looks at: every head of every layer, to walk through.

    The page is one HTML file of less than 2 MB that needs no network: lines between tokens,
    heatmap, text and image, what each layer would answer, and the heads that stand out (induction,
    previous token, sinks, delimiters) with the tokens that show it. Standard output says the same
    in words.

    Examples:
      polyhead explain smollm2-135m "Mary and John went out. Mary and" --out mary.html
      polyhead explain bert/ "He ate the fish." --second "It was fresh." --out pair.html
      polyhead explain Helsinki-NLP/opus-mt-en-es "Good morning." --out morning.html
      polyhead explain vit/ --image cat.jpg --out cat.html
      polyhead explain clip/ "a photo of a cat" --image cat.jpg --out clip.html
      polyhead explain smollm2-135m notes.txt --max-tokens 300 --layers "*.layers.1?.*" --json
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Directory, .gguf file, training run, name (see `polyhead pull`) or owner/name of the hub."""
    text: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="TEXT")] = None
    """What the model reads: a text in quotes, a file that holds it, or - for standard input."""
    second: str | None = None
    """Of an encoder, a second text; of an encoder-decoder, what it writes (without it, what it
    would)."""
    image: str | None = None
    """An image file, for models that read images."""
    out: str | None = None
    """The page to write; without it, only standard output says what was found."""
    layers: str = "*"
    """Part of a layer's name (layers.3, encoder, cross), or a pattern; others are left out."""
    max_tokens: int | None = None
    """Tokens of each text that are read; what is longer loses its end."""
    force: bool = False
    """Write over a page that is there."""
    json: bool = False
    """One JSON object: model, facts, findings (title, text, heads with their layers' names and
    values, a token that shows it), out."""
    opening: Annotated[Opening, tyro.conf.arg(name="")] = field(default_factory=Opening)


def run(args: Args) -> int:
    """Look, write the page, and say what there is to see."""
    out = None if args.out is None else Path(args.out)
    if out is not None and out.exists() and not args.force:
        raise FileError(f"{out} is there; pass --force to write over it")
    if out is None and args.force:
        raise ConfigError("--force is for a page that is written; name it with --out FILE.html")
    page = _page(args)
    if out is not None:
        with working(f"writing {out}"):
            page.save(out, force=args.force)
    if args.json:
        print_json([_record(args.model, page, out)])
        return 0
    for name, value in page.facts.items():
        print(f"{name}: {value}")
    for finding in page.findings:
        print(f"\n{finding.title}: {finding.text}{_named(page, finding)}")
    if out is not None:
        note(f"{out}: {out.stat().st_size / 1e6:.2f} MB; open it in a browser")
    return 0


def _page(args: Args) -> "Page":
    text = None if args.text is None else whole(args.text)
    model, path = args.opening.open_model(args.model)
    from polyhead.adapt.load import tokenizer
    from polyhead.images import Processor
    from polyhead.tasks.fit import kind_of
    from polyhead.tasks.inside import inside
    from polyhead.tasks.looking import READ_IMAGES

    words = None if kind_of(model) == "vision" else tokenizer(path)
    has_use = args.image is not None and kind_of(model) in READ_IMAGES
    processor = Processor.load(path) if has_use else None
    with working("looking"):
        return inside(
            model, words, text, args.second, args.image, processor=processor, where=args.layers,
            title=args.model, max_tokens=args.max_tokens,
        )  # fmt: skip


def _named(page: "Page", finding: "Finding") -> str:
    if not finding.heads:
        return ""
    stack = page.stacks[finding.stack]
    heads = [f"{stack.number(layer)}.{head}" for layer, head in finding.heads[:_NAMED]]
    values = [f"{value:.2f}" for value in finding.values[:_NAMED]]
    more = ", ..." if len(finding.heads) > _NAMED else ""
    pairs = ", ".join(f"{head} ({value})" for head, value in zip(heads, values, strict=True))
    return f"\n  layer.head {pairs}{more}"


def _record(model: str, page: "Page", out: Path | None) -> dict[str, object]:
    return {
        "model": model,
        "facts": dict(page.facts),
        "findings": [_finding(page, finding) for finding in page.findings],
        "out": None if out is None else str(out),
    }


def _finding(page: "Page", finding: "Finding") -> dict[str, object]:
    stack = page.stacks[finding.stack]
    tokens: Sequence[str] = page.sides[stack.queries].tokens
    return {
        "title": finding.title,
        "text": finding.text,
        "stack": stack.name,
        "heads": [
            {"layer": stack.number(layer), "head": head, "name": name, "value": value}
            for (layer, head), name, value in zip(
                finding.heads, finding.names, finding.values, strict=True
            )
        ],
        "token": None
        if finding.token is None
        else {"index": finding.token, "text": tokens[finding.token]},
    }
