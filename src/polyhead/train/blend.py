"""Several corpora in one run, each as often as its weight says."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyhead.errors import ConfigError
from polyhead.files.toml import read_toml
from polyhead.train import hf
from polyhead.train.config import TrainConfig
from polyhead.train.data import Split, Windows, once, windows
from polyhead.train.objectives import LanguageBatch
from polyhead.train.order import mix, permute
from polyhead.train.records import ExampleColumns
from polyhead.train.sources import COLUMN, Source, Texts
from polyhead.train.tokens import Progress

BLOCK = 1 << 10  # rows in which every corpus has its exact share
_FIELDS: dict[str, Any] = {"data": str, "weight": int | float, "text": str}


@dataclass(frozen=True)
class Corpus:
    """A source of texts, and how much of what is read shall come from it. text: the column of the
    texts, where it is another than the others'."""

    data: Source
    weight: float = 1.0
    text: str | None = None


@dataclass(frozen=True, eq=False)
class Blend:
    """Rows of several corpora by their weights, in an order that is arithmetic on (seed, n).

    Of each `BLOCK` rows every corpus has its share, to the nearest whole row; where they stand is
    drawn anew for each block. A corpus goes round as often as it has to.
    """

    parts: Mapping[str, Windows]
    shares: np.ndarray
    """Rows of a block that each corpus has `[parts]`; BLOCK in all."""
    seed: int

    @property
    def context(self) -> int:
        """Tokens of a row."""
        return next(iter(self.parts.values())).context

    @property
    def digest(self) -> str:
        """Every corpus and its share."""
        pairs = zip(self.parts.items(), self.shares.tolist(), strict=True)
        return " ".join(f"{name} {part.digest} {share}" for (name, part), share in pairs)

    def __len__(self) -> int:
        """Rows until the corpus that lasts longest has been read once."""
        longest = max(
            len(part) / share
            for part, share in zip(self.parts.values(), self.shares.tolist(), strict=True)
        )
        return int(np.ceil(longest * BLOCK))

    def places(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Of rows first … first + count - 1 of the run: which corpus, and which row of it."""
        rows = np.arange(first, first + count)
        which, number = np.empty(count, np.int64), np.empty(count, np.int64)
        owners = np.repeat(np.arange(len(self.shares)), self.shares)
        ranks = np.concatenate([np.arange(share) for share in self.shares])
        for block in np.unique(rows // BLOCK):
            key = mix(np.uint64(block) + mix(np.uint64(self.seed) + np.uint64(4)))
            here = rows // BLOCK == block
            keys = np.broadcast_to(key, int(here.sum()))
            slots = permute((rows[here] % BLOCK).astype(np.uint64), BLOCK, keys).astype(np.int64)
            which[here] = owners[slots]
            number[here] = block * self.shares[owners[slots]] + ranks[slots]
        return which, number

    def batch(self, index: int, batch_size: int) -> LanguageBatch:
        """The index-th batch of the run, int64 [batch_size, context]."""
        which, number = self.places(index * batch_size, batch_size)
        ids = torch.empty(batch_size, self.context, dtype=torch.int64)
        labels = torch.empty_like(ids)
        for place, part in enumerate(self.parts.values()):
            for row in np.flatnonzero(which == place).tolist():
                found = part.batch(int(number[row]), 1)
                ids[row], labels[row] = found.input_ids[0], found.labels[0]
        return LanguageBatch(ids, labels)

    def once(self, batch_size: int, batches: int = 0) -> Iterator[LanguageBatch]:
        """Every window of each corpus once, or the first `batches` batches of each."""
        for part in self.parts.values():
            yield from once(part, batch_size, batches)


def blended(
    source: Mapping[str, Corpus], tokenizer: Any, model: Any, config: TrainConfig, split: Split,
    progress: Progress | None = None,
) -> Blend | None:  # fmt: skip
    """Windows over several corpora; of each the last tokens are held out. ConfigError for weights
    that are not above 0."""
    make = partial(windows, tokenizer=tokenizer, model=model, config=config, split=split)
    weights = np.array([part.weight for part in source.values()], np.float64)
    if not len(weights) or not (weights > 0).all() or not np.isfinite(weights).all():
        raise ConfigError(f"weights are {weights.tolist()}: give each corpus one above 0")
    parts = {name: make(part.data, progress=progress) for name, part in source.items()}
    found = {name: part for name, part in parts.items() if part is not None}
    if not found:
        return None
    kept = weights[[name in found for name in parts]]
    return Blend(found, whole_shares(kept), config.seed)


def whole_shares(weights: np.ndarray) -> np.ndarray:
    """Whole rows of a block for each weight, BLOCK in all and one at least (largest remainders)."""
    exact = weights / weights.sum() * BLOCK
    shares = np.maximum(1, np.floor(exact)).astype(np.int64)
    while (left := BLOCK - shares.sum()) > 0:
        shares[np.argmax(exact - shares)] += 1
    if left < 0:  # what the smallest were given
        shares[np.argmax(shares)] += left
    return shares


def read_blend(path: str | Path) -> dict[str, Corpus]:
    """Corpora of a TOML file: a table [name] each: data (from the file's folder), weight, text.

    Errors: FileError for a file that is none, ConfigError for what its tables lack.
    """
    place = Path(path)
    found = read_toml(place)
    corpora: dict[str, Corpus] = {}
    for name, told in found.items():
        known = isinstance(told, dict) and {"data"} <= told.keys() <= _FIELDS.keys()
        if not known or not all(isinstance(told[key], _FIELDS[key]) for key in told):
            raise ConfigError(
                f"{path}: corpus {name!r} has data, a path, and may have a weight, and the text's "
                "column as text"
            )
        data = told["data"] if hf.is_name(told["data"]) else str(place.parent / told["data"])
        corpora[name] = Corpus(data, float(told.get("weight", 1.0)), told.get("text"))
    if not corpora:
        raise ConfigError(f"{path} names no corpora: give each a table, such as [books]")
    return corpora


def text_windows(
    source: Any, tokenizer: Any, model: Any, config: TrainConfig, split: Split,
    progress: Progress | None = None, by_document: bool = False,
) -> Windows | Blend | None:  # fmt: skip
    """Windows over a corpus, or over several by their weights. by_document: as in `Windows`.

    Errors: ConfigError for documents told apart in several corpora.
    """
    if not is_blend(source):
        return windows(source, tokenizer, model, config, split, progress, by_document)
    if by_document:
        raise ConfigError("by_document is for one corpus: put its texts into one folder")
    return blended(source, tokenizer, model, config, split, progress)


def open_corpora(source: Any, columns: ExampleColumns | None = None) -> Any:
    """A corpus, or each of several, as `Texts`, which are read no oftener than they have to be.

    columns: the role of the text, and the names of headerless files' columns. Errors: ConfigError
    for other roles, DataError for what is no source.
    """
    columns = columns or ExampleColumns({})
    if wrong := [role for role in columns.roles if role != COLUMN]:
        raise ConfigError(f"there is no role {wrong[0]!r}; texts have {COLUMN} alone")
    column = columns.roles.get(COLUMN, COLUMN)
    if not is_blend(source):
        return source if isinstance(source, Texts) else Texts(source, column, columns.names)
    return {
        name: part
        if isinstance(part.data, Texts)
        else replace(part, data=Texts(part.data, part.text or column, columns.names))
        for name, part in source.items()
    }


def texts_of(source: Any) -> Iterator[str]:
    """The documents of a corpus, or of several one after the other."""
    for one in _each(source):
        yield from one.documents()


def prepared_of(source: Any) -> Path | None:
    """The first directory of prepared tokens among the corpora, if any is one."""
    return next((one.prepared for one in _each(source) if one.prepared is not None), None)


def _each(source: Any) -> list[Texts]:
    parts = [part.data for part in source.values()] if is_blend(source) else [source]
    return [Texts.of(part) for part in parts]


def is_blend(source: Any) -> bool:
    """Whether a source is several corpora."""
    return isinstance(source, Mapping) and all(isinstance(v, Corpus) for v in source.values())
