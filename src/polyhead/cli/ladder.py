"""`polyhead ladder`: language models in the order of their invention, each for the same FLOPs."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from polyhead.cli.common import note
from polyhead.errors import ConfigError, FileError

NGRAM = "ngram"
NAMES = (NGRAM, "bigram", "window-mlp", "lstm", "gpt", "llama", "moe")
STATE, PAGE = "ladder.json", "report.html"
# What a ladder makes in its directory, and what --force takes away.
MADE = (STATE, PAGE, "runs", NGRAM, "tokenizer", "tokens")
UNITS = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}


@dataclass(frozen=True)
class Args:
    """Train language models, from n-gram to experts, on one text for the same FLOPs; compare them.

    The rungs: ngram (interpolated Kneser-Ney, which counts and spends no FLOPs), bigram (neural),
    window-mlp (Bengio et al. 2003), lstm, gpt, llama, moe (Llama with 2 of 8 experts a token). A
    rung's width is chosen so that the budget buys it 20 tokens a weight, or 4 passes over the text
    where those are fewer. The last tenth of the text is held out, and what all are scored on.

    Examples:
      polyhead ladder
      polyhead ladder book.txt --flops 1T --out runs/book
      polyhead ladder stdlib --flops 20T --tokenizer bpe --vocab-size 1024 --context 256
      polyhead ladder --rungs ngram lstm gpt --out runs/three
      polyhead ladder --out runs/ladder --resume
      polyhead compare runs/ladder/runs/*

    --out gets report.html, ladder.json, a run directory for each trained rung under runs/, and the
    n-gram. Ctrl-C saves and exits with 130; --resume goes on.
    """

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")] = "pydocs"
    """A .txt or .jsonl file, a folder of them, pydocs (Python's documentation) or stdlib (the
    standard library's sources)."""
    out: Path = Path("runs/ladder")
    """Directory of the ladder."""
    flops: str = "4T"
    """Forward and backward FLOPs of each trained rung: a number, as 4e12, or with a suffix, as 4T
    (K, M, G, T, P, E)."""
    rungs: tuple[str, ...] = NAMES
    """Which, in this order."""
    context: int = 128
    """Tokens of a text that a model sees at once."""
    batch_size: int = 8
    """Texts a step."""
    tokenizer: Literal["chars", "bytes", "bpe"] = "chars"
    """Trained on the text; chars gets a token for each character of it."""
    vocab_size: int | None = None
    """Tokens of bpe; None is 1024."""
    rates: tuple[str, ...] = ()
    """Learning rates in place of ours, as in gpt=2e-3 lstm=4e-3."""
    prompt: str | None = None
    """What each sample goes on from; None is how the held-out text begins."""
    seed: int = 0
    """Of weights, data order and samples."""
    device: str | None = None
    """Where to train (cpu, cuda, cuda:1); a GPU is taken when there is one."""
    json: bool = False
    """Print ladder.json in place of the table."""
    resume: bool = False
    """Go on with the ladder in --out, with its data and settings."""
    force: bool = False
    """Begin anew where a ladder already is."""


def run(args: Args) -> int:
    """Climb, rung by rung; print the table and write the page."""
    from polyhead.cli.climbing import TOKENIZER, check_plans, count, described, make_course, train
    from polyhead.cli.ladder_view import LadderView, print_table, write_page

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    state, args = _begin(args)
    course = make_course(args, parse_flops(args.flops), rates_of(args))
    check_plans(course)
    _take(args, state, described(course))
    course.tokenizer.save(args.out / TOKENIZER, force=True)
    found: dict[str, Any] = state["rungs"]
    with LadderView(args.rungs, found) as view:
        for name in args.rungs:
            if name not in found:
                climb = count if name == NGRAM else train
                found[name] = climb(name, course, view)
                _write_state(args.out, state)
            view.done(name, found[name])
    write_page(args.out / PAGE, state)
    if args.json:
        print(json.dumps(state))
    else:
        print_table(state)
    note(f"report: {args.out / PAGE}")
    return 0


def parse_flops(text: str) -> float:
    """A number of FLOPs. ConfigError for what is none."""
    unit = UNITS.get(text[-1:].upper(), 1.0)
    try:
        value = float(text[:-1] if unit > 1 else text) * unit
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"--flops {text!r} is no number above 0; write 4e12, or 4T")
    return value


def rates_of(args: Args) -> dict[str, float]:
    """Learning rates that --rates names."""
    found: dict[str, float] = {}
    for word in args.rates:
        name, _, number = word.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            name = ""
        if name not in NAMES[1:] or not found[name] > 0:
            raise ConfigError(f"--rates {word!r}: write a trained rung and a rate, as in gpt=2e-3")
    return found


def _begin(args: Args) -> tuple[dict[str, Any], Args]:
    """Check the flags and the directory; what a ladder that goes on has, and its flags."""
    out = args.out
    there = (out / STATE).exists()
    if not there and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileError(f"{out} holds something that is no ladder's; name another --out")
    if there and not (args.resume or args.force):
        raise FileError(f"{out} already holds a ladder: --resume goes on, --force begins anew")
    state: dict[str, Any] = {"settings": {}, "rungs": {}}
    if there and args.resume:
        state = _read_state(out)
        args = _resumed(args, state["settings"])
    _check(args)
    return state, args


def _take(args: Args, state: dict[str, Any], corpus: dict[str, Any]) -> None:
    """Make the directory the ladder's, now that nothing stands against beginning."""
    if args.resume and state.get("corpus", corpus)["digest"] != corpus["digest"]:
        raise ConfigError(f"{args.data} is not the text that {args.out} was begun with: restore it")
    if not args.resume:
        for name in MADE:
            path = args.out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    state.update(settings=_settings(args), corpus=corpus)
    _write_state(args.out, state)


def _check(args: Args) -> None:
    parse_flops(args.flops)
    if unknown := [name for name in args.rungs if name not in NAMES]:
        raise ConfigError(f"there is no rung {unknown[0]!r}; there are {', '.join(NAMES)}")
    if not args.rungs or len(set(args.rungs)) < len(args.rungs):
        raise ConfigError("--rungs names each rung once, and one at least")
    if args.context < 8 or args.batch_size < 1:
        raise ConfigError(
            f"--context {args.context} must be 8 or more, --batch-size {args.batch_size} 1 or more"
        )
    if args.vocab_size is not None and args.tokenizer != "bpe":
        raise ConfigError(f"--vocab-size is for --tokenizer bpe, not for {args.tokenizer}")
    rates_of(args)


def _settings(args: Args) -> dict[str, Any]:
    """What a ladder keeps to from its beginning on."""
    values = asdict(args)
    for name in ("out", "device", "json", "resume", "force"):
        del values[name]
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def _resumed(args: Args, settings: Mapping[str, Any]) -> Args:
    """The flags with what the ladder in --out was begun with; ConfigError for others given."""
    usual = {item.name: item.default for item in fields(Args)}
    kept = {n: tuple(v) if isinstance(v, list) else v for n, v in settings.items() if n in usual}
    for name, value in kept.items():
        given = getattr(args, name)
        if given not in (usual[name], value):
            raise ConfigError(
                f"{args.out} was begun with {name} = {value!r}, not {given!r}: leave it out, or "
                "name another --out"
            )
    return replace(args, **kept)


def _read_state(out: Path) -> dict[str, Any]:
    try:
        state = json.loads((out / STATE).read_text(encoding="utf-8"))
        return {name: dict(state[name]) for name in ("settings", "corpus", "rungs")}
    except (OSError, ValueError, KeyError, TypeError):
        raise FileError(f"{out / STATE} cannot be read; begin anew with --force") from None


def _write_state(out: Path, state: Mapping[str, Any]) -> None:
    from polyhead.files.disk import atomic_file

    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(out / STATE) as file:
        file.write((json.dumps(state, indent=2) + "\n").encode())
