"""`polyhead embed`: a vector for each text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from polyhead.cli.common import note
from polyhead.cli.texts import lines_of, note_cut, print_json, print_table, progress
from polyhead.errors import ConfigError, FileError
from polyhead.serve.opening import Opening

if TYPE_CHECKING:
    import numpy as np

    from polyhead.models.model import TaskModel
    from polyhead.text.tokenizer import Tokenizer

_AT_ONCE = 2048  # texts between two words of progress
_SHOWN = 5


@dataclass(frozen=True)
class Args:
    """Turn each text into a vector whose cosine to others says how alike they are.

    Directories of sentence-transformers give their own pooling, length and normalisation; of any
    other model the vector is the mean over the text's tokens, of length 1. Texts longer than the
    model lose their end; a line on standard error says how many did.

    Examples:
      polyhead embed minilm-l6 "A cat sleeps." "A kitten naps." --json
      polyhead embed minilm-l6 --file sentences.txt --out vectors.npy
      polyhead embed e5/ --file questions.txt --prompt-name query --truncate-dim 256 --json
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Directory, .gguf file, training run, name (see `polyhead pull`) or owner/name of the hub."""
    texts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TEXT ...")]
    """Texts in quotes; - reads one a line from standard input."""
    file: str | None = None
    """A UTF-8 file with a text on each line."""
    out: Path | None = None
    """A .npy file for the vectors, float32 [texts, width]."""
    batch_size: int = 32
    """Texts at once at 24 tokens each; more of shorter ones."""
    truncate_dim: int | None = None
    """Keep so many numbers of each vector, for models that were trained so."""
    prompt_name: str | None = None
    """Which of the checkpoint's prompts to put before every text."""
    json: bool = False
    """One JSON object a text and line: text, embedding."""
    opening: Annotated[Opening, tyro.conf.arg(name="")] = field(default_factory=Opening)


def run(args: Args) -> int:
    """Embed and print, or write."""
    if args.truncate_dim is not None and args.truncate_dim < 1:
        raise ConfigError(f"--truncate-dim is {args.truncate_dim}; it must be at least 1")
    if args.out is not None and args.out.suffix != ".npy":
        raise FileError(f"{args.out} does not end in .npy; name it {args.out.with_suffix('.npy')}")
    lines = lines_of(args.texts, args.file)
    model, tokenizer = args.opening.open(args.model, lines)
    with progress("embedding") as tell:
        vectors, cut = _embedded(args, model, tokenizer, lines, tell)
    _show(args, lines, vectors)
    from polyhead.tasks.embed import limit

    note_cut(cut, len(lines), limit(model))
    return 0


def _show(args: Args, lines: Sequence[str], vectors: "np.ndarray") -> None:
    """Written to a file, or printed whole, or the first numbers of each."""
    if args.out is not None:
        import numpy as np

        np.save(args.out, vectors)
        note(f"{args.out}: {vectors.shape[0]} vectors of {vectors.shape[1]} numbers")
    if args.json:
        print_json(
            {"text": line, "embedding": [float(f"{value:.8g}") for value in row]}
            for line, row in zip(lines, vectors.tolist(), strict=True)
        )
    elif args.out is None:
        names = [str(number) for number in range(min(_SHOWN, vectors.shape[1]))]
        rows: list[Sequence[Any]] = [
            (vectors.shape[1], *row[:_SHOWN], line)
            for line, row in zip(lines, vectors.tolist(), strict=True)
        ]
        print_table(("width", *names, "text"), rows)


def _embedded(
    args: Args,
    model: "TaskModel",
    tokenizer: "Tokenizer",
    lines: Sequence[str],
    tell: Callable[[int, int], None],
) -> "tuple[np.ndarray, int]":
    """`[texts, width]`, and how many texts were cut."""
    import numpy as np

    from polyhead.tasks.embed import cut_texts, embed

    found, cut = [], 0
    for first in range(0, len(lines), _AT_ONCE):
        some = lines[first : first + _AT_ONCE]
        found.append(
            embed(
                model,
                tokenizer,
                some,
                batch_size=args.batch_size,
                convert_to_tensor=False,
                prompt_name=args.prompt_name,
                truncate_dim=args.truncate_dim,
            )
        )
        cut += len(cut_texts(model, tokenizer, some, prompt_name=args.prompt_name))
        tell(first + len(some), len(lines))
    return np.concatenate(found), cut
