"""`polyhead generate`: prompts in, answers out."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from polyhead.cli.opening import Opening, given_fields, read_text
from polyhead.errors import DataError
from polyhead.generate.config import GenerationConfig

if TYPE_CHECKING:
    from polyhead.generate.result import Generation
    from polyhead.text.tokenizer import Tokenizer

# Left to the checkpoint's generation_config.json where the command line says nothing.
_SETTINGS = [item.name for item in fields(GenerationConfig)]


@dataclass(frozen=True)
class Args:
    """Write with a model. Prompts are put into its chat template when it has one.

    Examples:
      polyhead generate smollm2-135m "Where is the Eiffel Tower?" --temperature 0
      polyhead generate runs/docs "The with statement" --raw --stream --seed 1
      cat letter.txt | polyhead generate smollm2-135m - --system "Answer this letter." --json
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
    """One JSON object a prompt and line: text, finish_reason, token counts, logprobs."""
    opening: Annotated[Opening, tyro.conf.arg(name="")] = field(default_factory=Opening)
    config: Annotated[GenerationConfig, tyro.conf.arg(name="")] = field(
        default_factory=GenerationConfig
    )
    given: tyro.conf.Suppress[tuple[str, ...]] = ()


def defaults(argv: Sequence[str]) -> Args:
    """Remembers which settings the command line names, so that these alone win over the model's."""
    given = tuple(sorted(given_fields(argv, _SETTINGS)))
    return Args(tyro.MISSING, tyro.MISSING, given=given)


def run(args: Args) -> int:
    """Generate and print."""
    if not args.prompts:
        raise DataError("there is no prompt; give one in quotes, or - to read standard input")
    prompts = [_from_stdin() if text == "-" else text for text in args.prompts]
    model, tokenizer = args.opening.open(args.model)
    from polyhead.generate.generator import TextGenerator

    config = settings(args.config, args.given, model.generation)
    rows = [_encode(text, tokenizer, args) for text in prompts]
    generator = TextGenerator(model, tokenizer)
    if args.stream and not args.json:
        for row in rows:
            _print_stream(generator.stream(row, config))
        return 0
    for prompt, answer in zip(prompts, generator.generate(rows, config), strict=True):
        print(json.dumps(record(prompt, answer, tokenizer)) if args.json else str(answer))
    return 0


def settings(
    config: GenerationConfig, given: Sequence[str], own: Mapping[str, Any]
) -> GenerationConfig:
    """The flags that were given, else what the checkpoint recommends, else the defaults."""
    if not own:
        return config
    flags = {name: value for name, value in asdict(config).items() if name in given}
    if "do_sample" in own:
        return GenerationConfig.from_hf(own, **flags)
    # Without do_sample, transformers would be greedy; the file says nothing about it, so neither
    # do we: only where the text ends is taken from it.
    ends = {} if own.get("eos_token_id") is None else {"stop_token_ids": own["eos_token_id"]}
    return GenerationConfig(**(ends | flags))


def record(prompt: str, answer: "Generation", tokenizer: "Tokenizer") -> dict[str, Any]:
    """What --json says of an answer."""
    found: dict[str, Any] = {
        "prompt": prompt,
        "text": str(answer),
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "tokens": len(answer.token_ids),
    }
    if answer.logprobs is not None:
        found["logprobs"] = [
            {
                "token": tokenizer.decode([row.token_id], skip_special_tokens=False),
                "logprob": row.logprob,
                "top": [[tokenizer.decode([i], skip_special_tokens=False), p] for i, p in row.top],
            }
            for row in answer.logprobs
        ]
    return found


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
