"""`polyhead serve`: models over HTTP, in OpenAI's words."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from polyhead.cli.common import note
from polyhead.errors import ConfigError, FileError
from polyhead.serve.config import ServeConfig, from_environment
from polyhead.serve.opening import Opening

Settings = Annotated[ServeConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class Args:
    """Serve models to any client that speaks OpenAI's HTTP: those that write, and those that read.

    Routes: /v1/models, /v1/chat/completions and /v1/completions (whole or streamed),
    /v1/embeddings, /v1/rerank, /classify, /tag, /fill, /answer, /translate, /tokenize,
    /detokenize, /metrics, /health, /ready. Ctrl-C or SIGTERM finishes what is at work and ends.

    Examples:
      polyhead serve smollm2-135m minilm-l6
      polyhead serve chat=runs/chat base=smollm2-135m --port 8080 --keys keys.txt
      polyhead serve smollm2-135m --max-rows 64 --dry-run
      POLYHEAD_PORT=8080 polyhead serve smollm2-135m --quantize int4 --max-rows 32
    """

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL ...")]
    """Directories, .gguf files, training runs, names (see `polyhead pull`) or owner/name of the
    hub; NAME=MODEL serves one by another name."""
    settings: Settings = field(default_factory=ServeConfig)
    config: Path | None = None
    """A TOML file with any of these settings; flags and the environment (POLYHEAD_PORT ...) win."""
    dry_run: bool = False
    """Print what would be served and the memory that it takes, and end: 1 where it does not fit."""
    json: bool = False
    """With --dry-run: one JSON object."""
    opening: Annotated[Opening, tyro.conf.arg(name="")] = field(default_factory=Opening)


def defaults(argv: Sequence[str]) -> Args:
    """What the file and the environment say."""
    return Args((), settings=ServeConfig.of(_from_file(argv), from_environment()))


def run(args: Args) -> int:
    """Listen until told to end."""
    models = named(args.models)
    if args.dry_run:
        from polyhead.cli.serve_plan import show

        return show(models, args.settings, args.opening, args.json)
    try:
        from polyhead.serve.run import serve
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"serving needs more packages ({error.name}); pip install 'polyhead[serve]'"
        ) from None
    from polyhead.serve.messages import Plan

    engine = {"max_rows": args.settings.max_rows, "cache_tokens": args.settings.cache_tokens}
    serve(args.settings, Plan(models, vars(args.opening), engine, args.settings.probes), note)
    return 0


def named(models: Sequence[str]) -> dict[str, str]:
    """Models by the names they are served by. Errors: ConfigError for none, or one name twice."""
    if not models:
        raise ConfigError("name a model to serve, such as smollm2-135m")
    found: dict[str, str] = {}
    for model in models:
        name, is_named, rest = model.partition("=")
        if not is_named or Path(model).exists():
            name, rest = Path(model).name or model, model
        if not name or not rest:
            raise ConfigError(f"{model!r} names no model; write NAME=MODEL, or MODEL alone")
        if name in found:
            raise ConfigError(f"two models are called {name}; name one by NAME=MODEL")
        found[name] = rest
    return found


def _from_file(argv: Sequence[str]) -> Mapping[str, Any]:
    for number, word in enumerate(argv):
        if word == "--config" and number + 1 < len(argv):
            return _read(Path(argv[number + 1]))
        if word.startswith("--config="):
            return _read(Path(word.partition("=")[2]))
    return {}


def _read(path: Path) -> Mapping[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FileError(f"{path} is not TOML: {error}") from None
