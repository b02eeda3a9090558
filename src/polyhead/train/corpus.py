"""Corpora as memory-mapped tokens, made once and kept in a folder named by the hash of the
contents and of the tokenizer, or prepared beforehand."""

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from polyhead.errors import DataError, FileError
from polyhead.train import sources
from polyhead.train.prepared import open_prepared
from polyhead.train.sources import Source, Texts, groups
from polyhead.train.tokens import (
    DOCUMENTS,
    HEADER,
    Encoder,
    Progress,
    Tokens,
    Writer,
    check_ids,
    dtype_for,
    end_id,
    open_folder,
    tokenizer_digest,
)

_FORMAT = 1


@dataclass(frozen=True)
class Header:
    """What `header.json` says of `tokens.bin`. `text_bytes` counts the text in UTF-8."""

    format: int
    dtype: str
    tokens: int
    text_bytes: int
    documents: int
    vocab_size: int
    digest: str


def load_tokens(
    source: Source,
    tokenizer: Any,
    cache: Path,
    *,
    vocab_size: int,
    progress: Progress | None = None,
) -> Tokens:
    """Tokens of a corpus: prepared ones where they lie, else from `cache` if they are there, else
    made and kept there.

    Documents end with the tokenizer's `eos_id`, or else its `sep_id`, where it has one. An empty
    corpus, ids of `vocab_size` or more and tokens of another tokenizer raise DataError.
    """
    texts = Texts.of(source)
    if texts.prepared is not None:
        return open_prepared(texts.prepared, tokenizer, vocab_size)
    digest = texts.digest(f"{_FORMAT} {sources.PIECE} {tokenizer_digest(tokenizer)}")
    folder = Path(cache) / digest[:32]
    # Folders of the first release say nothing of documents; their tokens are the same.
    if not all((folder / name).exists() for name in (HEADER, DOCUMENTS)):
        _write(folder, texts, tokenizer, digest, vocab_size, progress)
    try:
        header = Header(**json.loads((folder / HEADER).read_text()))
        ids, ends = open_folder(folder, header.dtype, header.tokens, header.documents)
        if header.digest != digest:
            raise ValueError(digest)
    except (OSError, ValueError, TypeError):
        raise FileError(
            f"{folder} does not hold the tokens its header speaks of: remove it"
        ) from None
    if header.vocab_size > vocab_size:
        check_ids(ids, vocab_size)
    return Tokens(ids, header.text_bytes, digest, ends)


def _write(
    folder: Path,
    texts: Texts,
    tokenizer: Any,
    digest: str,
    vocab_size: int,
    progress: Progress | None,
) -> None:
    """Tokenise piece by piece."""
    encode = partial(tokenizer.encode_batch, add_special_tokens=False)
    encoder = Encoder(encode, end_id(tokenizer), vocab_size, dtype_for(vocab_size))
    reading = texts.read()
    try:
        with Writer(folder) as writer:
            for pieces in groups(reading):
                writer.add(encoder(pieces))
                if progress:
                    progress(reading.done, reading.total)
            if writer.text_bytes == 0:
                raise DataError(f"the corpus is empty ({texts.name}): give it text to learn from")
            header = Header(
                _FORMAT, encoder.dtype, writer.tokens, writer.text_bytes, len(writer.ends),
                vocab_size, digest,
            )  # fmt: skip
            writer.finish(asdict(header))
    except OSError as error:
        raise FileError(f"cannot keep tokens in {folder}: {error.strerror}") from error
