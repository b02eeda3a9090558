"""`polyhead translate`: texts, or lines of a file, into another language."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from polyhead.cli.common import read_text
from polyhead.cli.texts import note_cut, print_json, progress
from polyhead.errors import DataError
from polyhead.serve.opening import Opening

if TYPE_CHECKING:
    from polyhead.cli.summarize import Args as SummaryArgs
    from polyhead.tasks.translate import Rewriting, Translator


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How answers are written."""

    num_beams: int | None = None
    """Unfinished answers kept of a text; None is what the checkpoint says, or 4. 1 is greedy."""
    max_new_tokens: int | None = None
    """Tokens of an answer at most; None is what the checkpoint says, or 256."""
    length_penalty: float | None = None
    """Above 0 favours long answers; None is what the checkpoint says, or 1."""
    prefix: str | None = None
    """Put before every text, as T5 wants it; None is what the checkpoint says."""


@dataclass(frozen=True)
class Args:
    """Translate with an encoder-decoder: Marian, T5, or one of your own.

    Texts longer than the model lose their end; a line on standard error says how many did.

    Examples:
      polyhead translate Helsinki-NLP/opus-mt-en-es "Good morning."
      polyhead translate runs/en-es book.txt --num-beams 4 > libro.txt
      polyhead translate t5-small - --prefix "translate English to German: " < letter.txt
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Directory, training run, name (see `polyhead pull`) or owner/name of the hub."""
    texts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TEXT ...")]
    """Texts, or files, each of whose lines is one; - reads lines from standard input."""
    file: str | None = None
    """A UTF-8 file more, whose lines are texts; a blank line stays blank."""
    json: bool = False
    """One JSON object a text and line: source, text, score, tokens, cut (its end was not read)."""
    writing: Annotated[Writing, tyro.conf.arg(name="")] = field(default_factory=Writing)
    opening: Annotated[Opening, tyro.conf.arg(name="")] = field(default_factory=Opening)


def run(args: Args) -> int:
    """Translate and print."""
    given = [*args.texts, *([] if args.file is None else [args.file])]
    files = [text == "-" or text is args.file or _is_file(text) for text in given]
    texts: list[str] = []
    for text, is_file in zip(given, files, strict=True):
        texts += read_text(text).splitlines() if is_file else [text]
    if not texts:
        raise DataError("there is no text; give one in quotes, a file, or - for standard input")
    model, tokenizer = args.opening.open(args.model)
    from polyhead.tasks.translate import Translator

    rewrite(Translator(model, tokenizer, prefix=args.writing.prefix), texts, args)
    return 0


def rewrite(writer: "Translator", texts: Sequence[str], args: "Args | SummaryArgs") -> None:
    """Print one answer a text, in their order."""
    how = args.writing
    more = {} if how.length_penalty is None else {"length_penalty": how.length_penalty}
    with progress("writing") as tell:
        found = writer(
            texts,
            num_beams=how.num_beams,
            max_new_tokens=how.max_new_tokens,
            progress=tell,
            **more,
        )
    if args.json:
        print_json(_record(text, one) for text, one in zip(texts, found, strict=True))
    else:
        for answer in found:
            print(" ".join(answer.split()))
    note_cut(sum(one.is_cut for one in found), len(found), writer.model.config.max_tokens)


def _record(source: str, one: "Rewriting") -> dict[str, Any]:
    tokens = len(one.token_ids)
    return {
        "source": source, "text": str(one), "score": one.score, "tokens": tokens, "cut": one.is_cut,
    }  # fmt: skip


def whole(text: str) -> str:
    """A text as given, or what a file or standard input holds."""
    return read_text(text) if text == "-" or _is_file(text) else text


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # longer than a name may be
        return False
