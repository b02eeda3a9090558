"""`polyhead fill`: what stands behind a mask."""

from dataclasses import asdict, dataclass, field
from typing import Annotated

import tyro

from polyhead.cli.texts import lines_of, print_json, print_table, progress
from polyhead.serve.opening import Opening


@dataclass(frozen=True)
class Args:
    """Say what stands where a text has a mask: [MASK], <mask>, or what the tokenizer calls it.

    The model needs a masked-LM head, as BERT's and RoBERTa's checkpoints have;
    `polyhead train DATA --objective masked-lm` makes one.

    Examples:
      polyhead fill bert/ "The capital of France is [MASK]."
      polyhead fill roberta/ "She <mask> the <mask> home." --top-k 3
      polyhead fill bert/ --file cloze.txt --json > words.jsonl
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Directory, .gguf file, training run, name (see `polyhead pull`) or owner/name of the hub."""
    texts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TEXT ...")]
    """Texts in quotes, each with one mask or more; - reads one a line from standard input."""
    file: str | None = None
    """A UTF-8 file with a text on each line."""
    top_k: int = 5
    """How many tokens to show for each mask."""
    json: bool = False
    """One JSON object a text and line: text, and for each of its masks token, token_id, score and
    the text filled."""
    opening: Annotated[Opening, tyro.conf.arg(name="")] = field(default_factory=Opening)


def run(args: Args) -> int:
    """Fill and print."""
    lines = lines_of(args.texts, args.file)
    model, tokenizer = args.opening.open(args.model, lines)
    from polyhead.tasks.fill import Filler

    with progress("filling") as tell:
        found = Filler(model, tokenizer)(lines, top_k=args.top_k, progress=tell)
    if args.json:
        print_json(
            {"text": line, "masks": [[asdict(one) for one in mask] for mask in masks]}
            for line, masks in zip(lines, found, strict=True)
        )
        return 0
    print_table(
        ("line", "mask", "token", "score", "text"),
        [
            (line, number, one.token, one.score, one.text)
            for line, masks in enumerate(found, 1)
            for number, mask in enumerate(masks, 1)
            for one in mask
        ],
    )
    return 0
