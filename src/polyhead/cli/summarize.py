"""`polyhead summarize`: texts made short."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from polyhead.cli.translate import Writing, rewrite, whole
from polyhead.errors import DataError
from polyhead.serve.opening import Opening


@dataclass(frozen=True)
class Args:
    """Summarize with an encoder-decoder, such as T5.

    Texts longer than the model lose their end; a line on standard error says how many did.

    Examples:
      polyhead summarize t5-small article.txt
      cat article.txt | polyhead summarize t5-small - --max-new-tokens 60 --json
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Directory, training run, name (see `polyhead pull`) or owner/name of the hub."""
    texts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TEXT ...")]
    """Texts, or files, each of which is one; - reads one from standard input."""
    json: bool = False
    """One JSON object a text and line: source, text, score, tokens, cut (its end was not read)."""
    writing: Annotated[Writing, tyro.conf.arg(name="")] = field(default_factory=Writing)
    opening: Annotated[Opening, tyro.conf.arg(name="")] = field(default_factory=Opening)


def run(args: Args) -> int:
    """Summarize and print."""
    texts = [whole(text) for text in args.texts]
    if not texts:
        raise DataError("there is no text; give one in quotes, a file, or - for standard input")
    model, tokenizer = args.opening.open(args.model)
    from polyhead.tasks.translate import Summarizer

    rewrite(Summarizer(model, tokenizer, prefix=args.writing.prefix), texts, args)
    return 0
