"""Texts to shards of tokens by several processes, again and again until it is done.

One process reads; it deals the text out in groups of pieces, in order, and writes what comes back
in the same order. A shard is closed by the group that fills it, so shards depend on the texts, the
tokenizer and `shard_tokens` alone. What a shard was made from is known by its number of groups and
their hash: going on is to read past them.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from polyhead.errors import ConfigError, DataError, FileError
from polyhead.files.disk import locked
from polyhead.train import sources
from polyhead.train.prepared import FORMAT, Plan, Prepared, Shard, read_prepared, shard_path
from polyhead.train.sources import Reading, Source, Texts, groups
from polyhead.train.tokens import (
    DOCUMENTS,
    HEADER,
    TOKENS,
    Encoded,
    Encoder,
    Piece,
    Writer,
    dtype_for,
    end_id,
    is_prepared,
    tokenizer_digest,
)

SHARD_TOKENS = 1 << 26
_AHEAD = 3  # groups in the works for each process

Told = Callable[[int, int, int], None]
"""Called with (what is read, all there is or 0, tokens so far)."""


@dataclass(frozen=True)
class Group:
    """Pieces that are tokenised at once. texts: the SHA-256 of all text to their end; done: how far
    that is, as `Reading` counts."""

    pieces: list[Piece]
    texts: str
    done: int


def prepare(
    source: Source,
    tokenizer: Any,
    out: str | os.PathLike[str],
    *,
    workers: int = 1,
    shard_tokens: int = SHARD_TOKENS,
    force: bool = False,
    progress: Told | None = None,
) -> Prepared:
    """Tokens of a corpus as shards in `out`, with the tokenizer; `Trainer.fit` takes the directory.

    workers: processes that tokenise; 1 is this one. shard_tokens: how many fill a shard. A
    directory that is unfinished is gone on with; `force` begins one anew.
    Raises ConfigError for settings that cannot be or are not those of `out`, DataError for texts
    that cannot be read, are none, or are not those of `out`, FileError for a disk that is full.
    """
    if workers < 1 or shard_tokens < 1:
        raise ConfigError(f"workers and shard_tokens are {workers} and {shard_tokens}: 1 at least")
    texts, folder = Texts.of(source), Path(out)
    texts.check()  # before anything is made
    size = tokenizer.vocab_size
    known = tokenizer_digest(tokenizer)
    plan = Plan(FORMAT, known, size, dtype_for(size), shard_tokens, sources.PIECE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, "being prepared"):
            _claim(folder, plan, tokenizer, force)
            return _fill(folder, texts, tokenizer, plan, workers, progress)
    except BrokenProcessPool:
        raise FileError(
            f"a process that tokenised for {folder} has ended: go on with fewer workers if memory "
            "was short; a script of yours starts under if __name__ == '__main__'"
        ) from None
    except OSError as error:
        raise FileError(
            f"{folder} cannot be written ({error.strerror or error}): make room; the same command "
            "goes on from the shards that are there"
        ) from None


def _claim(folder: Path, plan: Plan, tokenizer: Any, force: bool) -> None:
    """Begin, or go on with, a directory; one that holds anything else is left alone."""
    if is_prepared(folder):
        if force:
            for path in folder.glob("shard-*"):
                shutil.rmtree(path)
            Prepared(plan).save(folder)
        elif (found := read_prepared(folder).plan) != plan:
            apart = [n for n, v in asdict(plan).items() if v != getattr(found, n)]
            raise ConfigError(
                f"{folder} was begun with another {' and '.join(apart)}: use the same, another "
                "--out, or --force to begin anew"
            )
    elif any(folder.glob("[!.]*")):
        raise FileError(f"{folder} holds other files: name a directory that is empty or not there")
    for path in [*folder.glob(".tmp-*"), *folder.glob(".*.tmp")]:  # what a killed process left
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not is_prepared(folder):
        Prepared(plan).save(folder)
    if read_prepared(folder).shards is None:
        tokenizer.save(folder, force=True)


def _fill(
    folder: Path,
    texts: Texts,
    tokenizer: Any,
    plan: Plan,
    workers: int,
    progress: Told | None,
) -> Prepared:
    """Pass by what is done, and make the other shards."""
    reading = texts.read()
    dealt = _dealt(reading)
    shards: list[Shard] = []
    before = 0

    def tell(group: Group, tokens: int) -> None:
        if progress:
            progress(group.done, reading.total, before + tokens)

    for shard in _done(folder, plan):
        _pass_by(folder, shard, dealt, tell)
        shards.append(shard)
        before += shard.tokens
    if shards and shards[-1].tokens < plan.shard_tokens and next(dealt, None) is not None:
        raise _changed(folder)
    with _encoded(dealt, tokenizer, plan, workers) as encoded:
        while (made := _shard(shard_path(folder, len(shards)), encoded, plan, tell)) is not None:
            shards.append(made)
            before += made.tokens
    if not any(shard.text_bytes for shard in shards):
        raise DataError(f"the corpus is empty ({texts.name}): give it text to learn from")
    found = Prepared(plan, tuple(shards))
    found.save(folder)
    return found


def _shard(
    path: Path,
    encoded: Iterator[tuple[Group, Encoded]],
    plan: Plan,
    tell: Callable[[Group, int], None],
) -> Shard | None:
    """The next shard, None where nothing is left for one."""
    if (following := next(encoded, None)) is None:
        return None
    with Writer(path) as writer:
        count, texts = 0, ""
        while following is not None:
            group, found = following
            writer.add(found)
            tell(group, writer.tokens)
            count, texts = count + 1, group.texts
            following = next(encoded, None) if writer.tokens < plan.shard_tokens else None
        shard = Shard(
            writer.tokens, writer.text_bytes, len(writer.ends), count, texts, *writer.digests()
        )
        writer.finish(asdict(shard))
        return shard


def _done(folder: Path, plan: Plan) -> Iterator[Shard]:
    """The shards that are there and whole, from the first to one before the first that is not."""
    number = 0
    while True:
        path = shard_path(folder, number)
        try:
            shard = Shard(**json.loads((path / HEADER).read_text(encoding="utf-8")))
            sums = (_sha256(path / TOKENS), _sha256(path / DOCUMENTS))
        except (OSError, ValueError, TypeError):
            return
        if sums != (shard.tokens_sha256, shard.documents_sha256):
            return
        yield shard
        if shard.tokens < plan.shard_tokens:
            return
        number += 1


def _pass_by(
    folder: Path, shard: Shard, dealt: Iterator[Group], tell: Callable[[Group, int], None]
) -> None:
    """Read what a shard was made from; DataError where that is not what it was."""
    texts = ""
    for group in islice(dealt, shard.groups):
        texts = group.texts
        tell(group, shard.tokens)
    if texts != shard.texts:
        raise _changed(folder)


def _changed(folder: Path) -> DataError:
    return DataError(
        f"the texts are not those that {folder} was begun with: use the same, another --out, or "
        "--force to begin anew"
    )


def _dealt(reading: Reading) -> Iterator[Group]:
    digest = hashlib.sha256()
    for pieces in groups(reading):
        for text, is_last in pieces:
            try:
                raw = text.encode()
            except UnicodeEncodeError as error:
                shown = text[max(0, error.start - 20) : error.start]
                raise DataError(
                    f"half a surrogate pair stands after {shown!r}: decode the texts with "
                    "errors='replace' first"
                ) from None
            digest.update(f"{len(raw)} {is_last} ".encode() + raw)
        yield Group(pieces, digest.hexdigest(), reading.done)


@contextlib.contextmanager
def _encoded(
    dealt: Iterator[Group], tokenizer: Any, plan: Plan, workers: int
) -> Generator[Iterator[tuple[Group, Encoded]]]:
    """Groups and what they become, in their order."""
    settings = (end_id(tokenizer), plan.vocab_size, plan.dtype)
    if workers == 1:
        encode = partial(tokenizer.encode_batch, add_special_tokens=False)
        encoder = Encoder(encode, *settings)
        yield ((group, encoder(group.pieces)) for group in dealt)
        return
    begin = partial(_begin, tokenizer.backend.to_str(), settings)
    # Forked processes would hang on the locks of threads that were not forked with them.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=begin)
    try:
        yield _in_order(dealt, pool, workers * _AHEAD)
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    dealt: Iterator[Group], pool: ProcessPoolExecutor, ahead: int
) -> Iterator[tuple[Group, Encoded]]:
    waiting: deque[tuple[Group, Future[Encoded]]] = deque()
    for group in dealt:
        waiting.append((group, pool.submit(_encode, group.pieces)))
        if len(waiting) >= ahead:
            group, future = waiting.popleft()
            yield group, future.result()
    for group, future in waiting:
        yield group, future.result()


_encoder: Encoder | None = None  # of a process that `_begin` began


def _begin(tokenizer: str, settings: tuple[int | None, int, str]) -> None:
    """Make this process one that tokenises, for as long as the one that reads lives."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that reads ends us
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are enough
    backend = Backend.from_str(tokenizer)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        found = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    _encoder = Encoder(encode, *settings)


def _encode(pieces: list[Piece]) -> Encoded:
    assert _encoder is not None
    return _encoder(pieces)


def _leave_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
