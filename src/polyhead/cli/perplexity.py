"""`polyhead perplexity`: how well a model predicts a text."""

import json
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from polyhead.cli.common import read_text, working
from polyhead.serve.opening import Opening


@dataclass(frozen=True)
class Args:
    """Score every token of a text once, in sliding windows.

    Bits per byte compares models of different tokenizers; perplexity (per token) does not.

    Examples:
      polyhead perplexity smollm2-135m README.md
      polyhead perplexity runs/docs book.txt --context 256 --stride 64 --json
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Directory, .gguf file, training run, name (see `polyhead pull`) or owner/name of the hub."""
    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """A UTF-8 text file; - is standard input."""
    context: int | None = None
    """Tokens of a window; None is the model's own length, at most 2048."""
    stride: int | None = None
    """How far windows advance; a token has at least context - stride before it. None is half."""
    batch_size: int = 8
    """Windows at once."""
    json: bool = False
    """One JSON object instead of lines."""
    opening: Annotated[Opening, tyro.conf.arg(name="")] = field(default_factory=Opening)


def run(args: Args) -> int:
    """Score and print."""
    text = read_text(args.file)
    model, tokenizer = args.opening.open(args.model)
    from polyhead.tasks.perplexity import perplexity

    with working(f"scoring {args.file}"):
        found = perplexity(
            model,
            tokenizer,
            text,
            context=args.context,
            stride=args.stride,
            batch_size=args.batch_size,
        )
    if args.json:
        names = ("perplexity", "bits_per_byte", "loss", "tokens", "bytes")
        print(json.dumps({name: getattr(found, name) for name in names}))
        return 0
    print(f"perplexity     {found.perplexity:.4f}")
    print(f"bits per byte  {found.bits_per_byte:.4f}")
    print(f"tokens         {found.tokens}")
    return 0
