"""`polyhead generate`: prompts in, answers out."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from polyhead.cli.common import read_text
from polyhead.cli.settings import Settings, config_of, named, with_own
from polyhead.errors import DataError
from polyhead.serve.opening import Opening

if TYPE_CHECKING:
    from polyhead.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Files:
    """Many prompts from a file, through one engine."""

    file: str | None = None
    """A prompt a line; or, in a .jsonl file, an object with a prompt or messages, and perhaps a
    system message, tools, and settings of its own (temperature, max_new_tokens, seed, ...); other
    fields come back with the answer. Either may be gzipped; - is standard input."""
    out: Path | None = None
    """A .jsonl file for the answers, each written when it is done, in the end in the order of the
    prompts. The same command goes on where it was stopped. Without it: standard output."""
    rows: int = 32
    """Texts that are written together; fewer need less memory."""
    force: bool = False
    """Begin anew where --out holds the answers of another run."""


@dataclass(frozen=True)
class Args:
    """Write with a model. Prompts are put into its chat template when it has one.

    Examples:
      polyhead generate smollm2-135m "Where is the Eiffel Tower?" --temperature 0
      polyhead generate runs/docs "The with statement" --raw --stream --seed 1
      cat letter.txt | polyhead generate smollm2-135m - --system "Answer this letter." --json
      polyhead generate smollm2-135m --file prompts.jsonl --out answers.jsonl
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Directory, .gguf file, training run, name (see `polyhead pull`) or owner/name of the hub."""
    prompts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="PROMPT ...")]
    """One or more prompts, run as a batch; - reads one from standard input."""
    raw: bool = False
    """Give prompts to the model as they are, without its chat template."""
    system: str | None = None
    """System message for the chat template."""
    stream: bool = False
    """Print the text as it is written."""
    json: bool = False
    """One JSON object a prompt and line: text, finish_reason, token counts, logprobs; several texts
    of a prompt are in texts. With --out one object of the run: prompts, failed, tokens, seconds."""
    files: Annotated[Files, tyro.conf.arg(name="file")] = field(default_factory=Files)
    opening: Annotated[Opening, tyro.conf.arg(name="model")] = field(default_factory=Opening)
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)
    given: tyro.conf.Suppress[tuple[str, ...]] = ()


def defaults(argv: Sequence[str]) -> Args:
    """Remembers which settings the command line names, so that these alone win over the model's."""
    return Args(tyro.MISSING, (), given=named(argv))


def run(args: Args) -> int:
    """Generate and print."""
    config = config_of(args.settings)
    if args.files.file is not None:
        from polyhead.cli.prompt_file import answer_file

        return answer_file(args, config)
    if args.files != Files():
        raise DataError("--out, --rows and --force are for a file of prompts; give --file too")
    if not args.prompts:
        raise DataError(
            "there is no prompt; give one in quotes, - to read standard input, or --file FILE"
        )
    prompts = [_from_stdin() if text == "-" else text for text in args.prompts]
    model, tokenizer = args.opening.open(args.model, writes=True)
    from polyhead.generate.generator import TextGenerator
    from polyhead.tasks.prompt_file.answers import answer_record

    config = with_own(config, args.given, model.generation)
    rows = [_encode(text, tokenizer, args) for text in prompts]
    generator = TextGenerator(model, tokenizer)
    if args.stream and not args.json:
        for row in rows:
            _print_stream(generator.stream(row, config))
        return 0
    for prompt, answers in zip(prompts, generator.generate_all(rows, config), strict=True):
        if args.json:
            several = config.num_return_sequences > 1
            print(json.dumps({"prompt": prompt, **answer_record(answers, tokenizer, several)}))
        else:
            print(*answers, sep="\n")
    return 0


def _encode(text: str, tokenizer: "Tokenizer", args: Args) -> Any:
    """A prompt's ids by the chat template, or the text itself where there is none."""
    from polyhead.generate.prompts import encode_chat

    if args.raw or tokenizer.chat_template is None:
        if args.system is not None:
            raise DataError("a system message needs a chat template, and none is used here")
        return text
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return encode_chat([*system, {"role": "user", "content": text}], tokenizer)


def _from_stdin() -> str:
    text = read_text("-").removesuffix("\n")
    if not text:
        raise DataError("standard input is empty; give it a prompt")
    return text


def _print_stream(stream: Any) -> None:
    for piece in stream:
        sys.stdout.write(piece)
        sys.stdout.flush()
    print(flush=True)
