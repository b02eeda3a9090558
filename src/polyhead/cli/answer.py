"""`polyhead answer`: answers to questions, found in a text."""

from dataclasses import asdict, dataclass, field
from typing import Annotated

import tyro

from polyhead.cli.common import read_text
from polyhead.cli.texts import lines_of, print_json, print_table, progress
from polyhead.errors import DataError
from polyhead.serve.opening import Opening


@dataclass(frozen=True)
class Args:
    """Find the answer to each question in a text of any length.

    The model needs a question-answering head; `polyhead train DATA --objective answer` makes one.
    Long texts are read in windows that overlap. start and end count characters of the text.

    Examples:
      polyhead answer runs/squad "Where was the moth found?" --context story.txt
      polyhead answer runs/squad "Who?" "When?" --text "Ada wrote it in 1843." --top-k 3
      cat story.txt | polyhead answer runs/squad "Who found it?" --context - --json
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Directory, .gguf file, training run, name (see `polyhead pull`) or owner/name of the hub."""
    questions: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="QUESTION ...")
    ]
    """Questions in quotes; - reads one a line from standard input."""
    context: str | None = None
    """A UTF-8 file to find the answers in; - is standard input."""
    text: str | None = None
    """The text itself, in place of --context."""
    file: str | None = None
    """A UTF-8 file with a question on each line."""
    top_k: int = 1
    """Answers to each question."""
    impossible: bool = False
    """Let no answer be the best, where the model was trained so."""
    window: int | None = None
    """Tokens of a window, with the question; None is 384, or the model's length."""
    stride: int | None = None
    """Tokens that two windows share; None is half a window, at most 128."""
    max_answer_len: int = 15
    """Tokens of an answer."""
    head: str | None = None
    """Which head, where the model has several."""
    json: bool = False
    """One JSON object a question and line: question, answers with text, start, end, score."""
    opening: Annotated[Opening, tyro.conf.arg(name="")] = field(default_factory=Opening)


def run(args: Args) -> int:
    """Answer and print."""
    if (args.context is None) == (args.text is None):
        raise DataError("give the text to look in: --context FILE, or --text TEXT")
    if args.context == "-" and "-" in args.questions:
        raise DataError("standard input is the context or the questions, not both; use --file")
    questions = lines_of(args.questions, args.file, "question")
    context = read_text(args.context) if args.context is not None else args.text or ""
    if not context.strip():
        raise DataError("the context is empty; give a text that holds the answer")
    model, tokenizer = args.opening.open(args.model, [context] * len(questions))
    from polyhead.tasks.answer import Answerer

    answer = Answerer(
        model,
        tokenizer,
        window=args.window,
        stride=args.stride,
        max_answer_len=args.max_answer_len,
        handle_impossible_answer=args.impossible,
        head=args.head,
    )
    with progress("reading") as tell:
        found = answer(questions, context, top_k=args.top_k, progress=tell)
    if args.json:
        print_json(
            {"question": question, "answers": [asdict(one) for one in answers]}
            for question, answers in zip(questions, found, strict=True)
        )
        return 0
    print_table(
        ("answer", "score", "start", "end", "question"),
        [
            (one.text or "(none)", one.score, one.start, one.end, "" if place else question)
            for question, answers in zip(questions, found, strict=True)
            for place, one in enumerate(answers)
        ],
    )
    return 0
