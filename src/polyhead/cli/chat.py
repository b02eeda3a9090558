"""`polyhead chat`: a conversation on the terminal, or one message a line from standard input."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import tyro

from polyhead.cli.common import decoded, note
from polyhead.cli.settings import Settings, config_of, named, with_own
from polyhead.errors import ConfigError, PolyheadError
from polyhead.serve.opening import Opening

if TYPE_CHECKING:
    from polyhead.generate.chat import Chat

COMMANDS = """/reset          forget the conversation
/system TEXT    set the system message and start anew; without TEXT, none
/help           this
/quit           leave (or Ctrl-D)
Ctrl-C breaks off an answer."""


@dataclass(frozen=True)
class Args:
    """Talk with a model. What was said before stays in its cache, so a turn costs only what is new.

    Examples:
      polyhead chat smollm2-135m
      polyhead chat smollm2-135m --system "You are a pirate." --temperature 0.7 --top-p 0.9
      echo "Where is the Eiffel Tower?" | polyhead chat smollm2-135m --temperature 0

    Commands in the conversation: /reset, /system TEXT, /help, /quit. Where standard input is no
    terminal, each line is a message and each answer ends with a line break.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Directory, .gguf file, name (see `polyhead pull`) or owner/name of the hub."""
    system: str | None = None
    """System message."""
    opening: Annotated[Opening, tyro.conf.arg(name="model")] = field(default_factory=Opening)
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)
    given: tyro.conf.Suppress[tuple[str, ...]] = ()


def defaults(argv: Sequence[str]) -> Args:
    """As for `generate`."""
    return Args(tyro.MISSING, given=named(argv))


def run(args: Args) -> int:
    """Answer until the input ends."""
    model, tokenizer = args.opening.open(args.model, writes=True)
    from polyhead.generate.chat import Chat
    from polyhead.generate.generator import TextGenerator

    if tokenizer.chat_template is None:
        raise ConfigError(
            f"{args.model} has no chat template, so it was not taught to answer; "
            "use polyhead generate"
        )
    config = with_own(config_of(args.settings), args.given, model.generation)
    chat = Chat(TextGenerator(model, tokenizer), config, args.system)
    live = sys.stdin.isatty() and sys.stdout.isatty()
    if live:
        note(f"{args.model}: {model.num_parameters() / 1e6:.0f} M parameters. /help for commands")
    for message in _messages(live):
        if message.startswith("/"):
            if not _command(chat, message):
                break
        else:
            _answer(chat, message, live)
    return 0


def _messages(live: bool) -> Iterator[str]:
    """The lines that are not empty; with history and editing on a terminal."""
    if live:
        with contextlib.suppress(ImportError):  # not on every platform
            import readline  # noqa: F401
    while True:
        try:
            line = input("> ") if live else decoded(sys.stdin.buffer.readline(), "-")
        except EOFError:
            print()
            return
        if not live and not line:
            return
        if line.strip():
            yield line.strip()


def _command(chat: "Chat", message: str) -> bool:
    """Do what a /command says; False to leave."""
    command, _, rest = message.partition(" ")
    if command in ("/quit", "/exit"):
        return False
    if command == "/reset":
        chat.reset()
        note("forgotten")
    elif command == "/system":
        chat.system = rest.strip() or None
        chat.reset()
        note("system message set; starting anew")
    elif command == "/help":
        note(COMMANDS)
    else:
        note(f"{command} is no command; /help lists them")
    return True


def _answer(chat: "Chat", message: str, live: bool) -> None:
    """Print the answer as it comes. On a terminal, Ctrl-C and errors end the turn alone."""
    try:
        with contextlib.closing(chat.say(message)) as pieces:
            for piece in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
    except KeyboardInterrupt:
        if not live:
            raise
        note(" (broken off)")
    except PolyheadError as error:
        if not live:
            raise
        note(f"polyhead: {error}")
    print(flush=True)
