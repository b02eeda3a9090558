"""`polyhead VERB ...`: finds the verb, reads its flags, and turns errors into one line.

Nothing here imports torch: `polyhead --help` and `polyhead VERB --help` answer at once. A verb's
module holds `Args`, a frozen dataclass whose fields are the flags, and `run(args) -> int`, which
imports what the work needs. A verb whose defaults depend on its flags also has `defaults(argv)`.
"""

import contextlib
import inspect
import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

from polyhead.errors import SlowerWarning

VERBS = {
    "train": "train a model on text, or go on training one",
    "prepare": "turn texts into tokens on disk, once, by several processes",
    "ladder": "train models from n-gram to MoE for the same FLOPs, and compare",
    "compare": "set training runs beside each other, as a table and a page",
    "generate": "write with a model: prompts in, answers out",
    "chat": "talk with a model, turn by turn",
    "serve": "answer over HTTP, in OpenAI's words",
    "classify": "say the class of texts, of pairs of texts, or of images",
    "tag": "find names and other tags of words in texts",
    "answer": "find the answers to questions in a text",
    "fill": "say what stands behind a mask in a text",
    "embed": "turn texts into vectors",
    "similar": "rank texts by how alike they are to another",
    "translate": "translate texts, or the lines of a file",
    "summarize": "make texts short",
    "explain": "show what every head looks at, as a page and in words",
    "diff": "show what parts change between two families or checkpoints",
    "eval": "evaluate a model, or compare two, at tasks and files",
    "perplexity": "measure how well a model predicts a text",
    "compress": "keep a model's weights in few bits, and measure what that costs",
    "convert": "rewrite a model as Hugging Face directory or GGUF file",
    "export": "write a model for onnxruntime, or compile it for this machine",
    "pull": "fetch a model by name; without a name, list the names",
    "info": "show a model's parameters, memory, FLOPs and parts",
}

HELP = f"""usage: polyhead VERB [ARGUMENTS] [FLAGS]

Every transformer from one small set of readable parts.

verbs:
{"".join(f"  {verb:<12}{line}" + chr(10) for verb, line in VERBS.items())}
examples:
  polyhead generate smollm2-135m "Where is the Eiffel Tower?" --temperature 0 --max-new-tokens 12
  polyhead chat smollm2-135m
  polyhead train pydocs --model gpt2 --set d_model=128 num_layers=4 --steps 500 --out runs/docs
  polyhead generate runs/docs "The with statement"
  polyhead generate smollm2-135m --file prompts.jsonl --out answers.jsonl
  polyhead similar minilm-l6 "a cat" "a kitten" "a car" "the sea"
  polyhead diff bert deberta-v3
  polyhead convert smollm2-135m smol/ --to hf --verify
  polyhead compress smollm2-135m --to int8 --out smol-int8/
  polyhead info llama --set d_model=2048 d_ff=8192 num_layers=16 num_heads=32 vocab_size=128256

A model is a directory, a .gguf file, a name that `polyhead pull` lists, or owner/name of the hub.
`polyhead VERB --help` shows a verb's flags. Answers go to standard output, everything else to
standard error. --json, where a verb has it, is for scripts; --debug shows an error's traceback.

exit codes:
  0    done
  1    a check failed (convert --verify, export), or some prompts of a file (generate --file) did
  2    something to mend in the flags, the files or the data; one line says what
  70   a fault of polyhead itself
  130  interrupted (Ctrl-C); 143 terminated: a training run has saved a checkpoint before it
"""

_show = warnings.showwarning
BAD_INPUT, FAULT, INTERRUPTED, BROKEN_PIPE = 2, 70, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if words else BAD_INPUT
    if words[0] in ("-V", "--version"):
        from polyhead import __version__

        print(f"polyhead {__version__}")
        return 0
    verb, *rest = words
    if verb not in VERBS:
        return _say(f"{verb!r} is not a verb; the verbs are {', '.join(VERBS)}{_meant(verb)}")
    if not debug:
        warnings.filterwarnings("ignore")
    warnings.filterwarnings("always", category=SlowerWarning)
    warnings.showwarning = _warn
    return _guarded(verb, rest, debug)


def _guarded(verb: str, rest: list[str], debug: bool) -> int:
    """Parse and run a verb; whatever goes wrong becomes a line and a code."""
    try:
        module = import_module(f"polyhead.cli.{verb}")
        args = _parse(module, verb, rest)
        code = module.run(args)
        sys.stdout.flush()
        return code
    except SystemExit as stop:
        # `--help`, and a training run that a signal stopped: its text says where it was saved.
        if stop.args and str(stop) not in ("", str(stop.code)):
            _say(str(stop))
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader has gone; without this, Python complains when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (ValueError, OSError) as error:
        _trace(debug)
        return _say(_line(error))
    except MemoryError:
        _trace(debug)
        return _say("out of memory; use a smaller model, context, batch or dtype")
    except Exception as error:
        _trace(debug)
        hint = "" if debug else "; --debug shows where"
        return _say(f"fault: {type(error).__name__}: {_line(error)}{hint}", FAULT)


def _parse(module: ModuleType, verb: str, rest: list[str]) -> Any:
    """A verb's `Args` by tyro, whose complaints are made one line."""
    import tyro

    given = module.defaults(rest) if hasattr(module, "defaults") else None
    options: dict[str, Any] = {} if given is None else {"default": given}
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                module.Args,
                prog=f"polyhead {verb}",
                description=inspect.cleandoc(module.Args.__doc__),
                args=rest,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
                **options,
            )
    except SystemExit as stop:
        if stop.code:
            words = _first_words(complaint.getvalue())
            raise ValueError(f"{words}; see polyhead {verb} --help") from None
        raise


def _first_words(box: str) -> str:
    """What tyro's box says first, and the flag it thinks was meant."""
    lines = [line.strip("│╭╮╰╯─ \t") for line in box.splitlines()[1:]]
    # Where a terminal has no lines to draw with, they are hyphens.
    is_rule = [bool(line) and not line.strip("-+") for line in lines]
    text: list[str] = []
    for number, line in enumerate(lines):
        if is_rule[number] and not text:
            continue
        if is_rule[number] or not line:
            break
        text.append(line)
    close = re.search(r"Perhaps you meant:.*?(--[\w-]+)", box, re.DOTALL)
    return " ".join(text) + (f"; perhaps you meant {close[1]}" if close else "")


def _line(error: BaseException) -> str:
    """An error's message in one line."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _say(text: str, code: int = BAD_INPUT) -> int:
    print(f"polyhead: {text}", file=sys.stderr)
    return code


def _warn(message: Warning | str, *others: Any, **named: Any) -> None:
    if isinstance(message, SlowerWarning):
        _say(str(message))
    else:
        _show(message, *others, **named)


def _trace(debug: bool) -> None:
    if debug:
        traceback.print_exc()


def _meant(word: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(word, VERBS, 1)
    return f"; perhaps you meant {close[0]}" if close else ""


if __name__ == "__main__":
    sys.exit(main())
