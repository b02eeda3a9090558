"""`polyhead prepare`: texts to memory-mapped tokens, by several processes."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from polyhead.cli.common import note, working
from polyhead.cli.watch import Watch
from polyhead.errors import ConfigError

if TYPE_CHECKING:
    from polyhead.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Args:
    """Tokenise texts once, into shards that `polyhead train` reads from disk without loading them.

    What is stopped (Ctrl-C, a kill, a full disk) goes on with the same command from the shards
    that are there; the result is the same to the last byte, however often and with however many
    workers. The directory holds the tokenizer too: `polyhead train DIR` needs nothing else.

    Examples:
      polyhead prepare books.jsonl --tokenizer smollm2-135m --out tokens/books
      polyhead prepare texts/ --tokenizer bpe --vocab-size 16384 --out tokens/texts --workers 8
      polyhead prepare web.parquet --text content --tokenizer runs/docs --out tokens/web
      polyhead prepare hf:wikitext,wikitext-103-raw-v1 --tokenizer bpe --out tokens/wiki
      polyhead train tokens/books --model smollm2-135m --out runs/books
    """

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """A text; a table with texts (.jsonl, .csv, .tsv, .parquet), gzipped (.gz) or not; a folder of
    these; a dataset saved to disk, or as hf:NAME,CONFIG,SPLIT (hf-stream: keeps no copy); pydocs or
    stdlib."""
    tokenizer: str
    """A model or a directory whose tokenizer to use; or chars, bytes, bpe, wordpiece or unigram: a
    new one, trained on the data."""
    out: Path
    """The directory to write."""
    workers: int | None = None
    """Processes that tokenise; None is one for each core."""
    shard_tokens: int = 1 << 26
    """Tokens that fill a shard."""
    text: str = "text"
    """The column of the texts."""
    columns: str | None = None
    """Names of a headerless table's columns, from left to right, between commas."""
    vocab_size: int | None = None
    """Tokens of a tokenizer that is trained; None is all characters, or 8192."""
    force: bool = False
    """Begin anew where another preparation is."""
    json: bool = False
    """One JSON object: out, tokens, documents, bytes, shards, vocab_size, digest."""


def run(args: Args) -> int:
    """Prepare and say what is there."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # processes are enough
    from polyhead.cli.corpora import corpus
    from polyhead.train.prepare import prepare
    from polyhead.train.sources import Texts

    texts = Texts(corpus(args.data), args.text, args.columns.split(",") if args.columns else ())
    tokenizer = _tokenizer(args, texts)
    workers = (os.cpu_count() or 1) if args.workers is None else args.workers
    try:
        with Watch("tokenising") as watch:

            def tell(done: int, total: int, tokens: int) -> None:
                watch(done, total, f"{tokens:,} tokens")

            found = prepare(
                texts, tokenizer, args.out, workers=workers, shard_tokens=args.shard_tokens,
                force=args.force, progress=tell,
            )  # fmt: skip
    except KeyboardInterrupt:
        note(f"{args.out} is not finished: the same command goes on with it")
        raise
    shards = found.shards or ()
    said: dict[str, Any] = {
        "out": str(args.out), "tokens": found.tokens, "documents": found.documents,
        "bytes": found.text_bytes, "shards": len(shards), "vocab_size": found.plan.vocab_size,
        "digest": found.digest,
    }  # fmt: skip
    if args.json:
        print(json.dumps(said))
        return 0
    print(
        f"{args.out}  {found.tokens:,} tokens of {found.documents:,} documents in {len(shards)} "
        f"{'shard' if len(shards) == 1 else 'shards'}, "
        f"{found.text_bytes / max(1, found.tokens):.2f} bytes a token"
    )
    return 0


def _tokenizer(args: Args, texts: Any) -> "Tokenizer":
    """The tokenizer of a model, or a new one; what is gone on with has its own."""
    from polyhead.adapt.load import tokenizer
    from polyhead.cli.starting import make_tokenizer
    from polyhead.files.hub import resolve
    from polyhead.serve.opening import model_path
    from polyhead.text.tokenizer import Tokenizer
    from polyhead.text.train import KINDS
    from polyhead.train.tokens import is_prepared

    if args.tokenizer not in KINDS:
        if args.vocab_size is not None:
            raise ConfigError(f"--vocab-size is for a new tokenizer; {args.tokenizer} has its own")
        path = Path(args.tokenizer)
        if (path / "tokenizer.json").exists():
            return Tokenizer.load(path)
        with working(f"loading the tokenizer of {args.tokenizer}"):
            return tokenizer(model_path(resolve(args.tokenizer)))
    if is_prepared(args.out) and not args.force:
        note(f"going on with the tokenizer in {args.out}")
        return Tokenizer.load(args.out)
    return make_tokenizer(args.tokenizer, args.vocab_size, texts.documents)
