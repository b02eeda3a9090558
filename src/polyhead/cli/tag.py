"""`polyhead tag`: names and other tags of words."""

from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal

import tyro

from polyhead.cli.texts import lines_of, print_json, print_table, progress
from polyhead.serve.opening import Opening


@dataclass(frozen=True)
class Args:
    """Find the words of each text that the model has tags for, such as names and places.

    The model needs a tagging head; `polyhead train DATA --objective tag` makes one. Long texts are
    read in windows. start and end count characters: entity == text[start:end].

    Examples:
      polyhead tag runs/names "Ada Lovelace lived in London"
      polyhead tag runs/names --file letters.txt --json > entities.jsonl
      polyhead tag runs/speech --words "Time flies like an arrow"
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Directory, .gguf file, training run, name (see `polyhead pull`) or owner/name of the hub."""
    texts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TEXT ...")]
    """Texts in quotes; - reads one a line from standard input."""
    file: str | None = None
    """A UTF-8 file with a text on each line."""
    words: bool = False
    """A tag for every word between spaces, O too."""
    aggregation: Literal["none", "simple", "first", "max", "average"] = "simple"
    """How tokens become entities: simple joins neighbours of one tag; first, max and average let a
    word's tokens agree before; none shows each token."""
    window: int | None = None
    """Tokens of a window of a long text; None is 512, or the model's length."""
    head: str | None = None
    """Which head, where the model has several."""
    json: bool = False
    """One JSON object a text and line: text, entities with label, text, start, end, score."""
    opening: Annotated[Opening, tyro.conf.arg(name="")] = field(default_factory=Opening)


def run(args: Args) -> int:
    """Tag and print."""
    lines = lines_of(args.texts, args.file)
    model, tokenizer = args.opening.open(args.model, lines)
    from polyhead.tasks.tag import Tagger

    tag = Tagger(model, tokenizer, args.aggregation, args.head, args.window)
    with progress("tagging") as tell:
        if args.words:
            rows = [line.split() for line in lines]
            lines = [" ".join(row) for row in rows]
            found = tag.words(rows, progress=tell)
        else:
            found = tag(lines, progress=tell)
    if args.json:
        print_json(
            {"text": line, "entities": [asdict(entity) for entity in entities]}
            for line, entities in zip(lines, found, strict=True)
        )
        return 0
    print_table(
        ("line", "label", "score", "start", "end", "entity"),
        [
            (number, one.label, one.score, one.start, one.end, one.text)
            for number, entities in enumerate(found, 1)
            for one in entities
        ],
    )
    return 0
