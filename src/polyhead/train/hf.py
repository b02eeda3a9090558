"""Datasets of the Hugging Face `datasets` library: saved to disk, by name, or at hand."""

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from polyhead.errors import ConfigError, DataError, PolyheadError
from polyhead.files.lines import listed

PREFIXES = ("hf:", "hf-stream:")
_SAVED, _SPLITS = "state.json", "dataset_dict.json"
_BATCH = 256  # rows at once


def is_name(source: Any) -> bool:
    """Whether a source is the name of a dataset: hf:NAME[,CONFIG][,SPLIT], or hf-stream:…"""
    return isinstance(source, str) and source.startswith(PREFIXES)


def is_saved(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder that `save_to_disk` wrote."""
    folder = os.fspath(path)
    has = {name for name in (_SAVED, _SPLITS) if os.path.isfile(os.path.join(folder, name))}
    return _SPLITS in has or (
        _SAVED in has and os.path.isfile(os.path.join(folder, "dataset_info.json"))
    )


def is_dataset(source: Any) -> bool:
    """Whether it is a dataset, or a stream of one."""
    module = sys.modules.get("datasets")  # who has one has imported it
    return module is not None and isinstance(source, module.Dataset | module.IterableDataset)


def is_several(source: Any) -> bool:
    """Whether it is a dictionary of datasets, a split each."""
    return isinstance(source, Mapping) and any(map(is_dataset, source.values()))


def open_saved(path: Path) -> Any:
    """The dataset of a folder. DataError for one of several splits."""
    if (path / _SPLITS).exists():
        splits = sorted(entry.name for entry in path.iterdir() if is_saved(entry))
        raise DataError(f"{path} has the splits {listed(splits)}: name one, as in {path}/train")
    try:
        return _library(str(path)).load_from_disk(str(path))
    except PolyheadError:
        raise
    except Exception as error:  # the library's are of many kinds
        raise DataError(f"{path} cannot be opened ({_first_line(error)}); save it again") from None


def open_named(name: str) -> Any:
    """hf:NAME[,CONFIG][,SPLIT] from the library's cache or the hub; the split is train unless
    named, as in hf:NAME,,test. hf-stream: reads as it comes, and keeps nothing."""
    prefix, _, rest = name.partition(":")
    words = [*rest.split(","), "", ""]
    if not words[0] or len(words) > 5:
        raise ConfigError(f"{name!r} names no dataset: write {prefix}:NAME,CONFIG,SPLIT")
    dataset, config, split = words[:3]
    options = {"split": split or "train", "streaming": prefix == "hf-stream"}
    try:
        return _library(name).load_dataset(dataset, config or None, **options)
    except PolyheadError:
        raise
    except Exception as error:
        raise DataError(
            f"{name} cannot be opened ({_first_line(error)}): check the name, the configuration "
            "and the split"
        ) from None


def length(dataset: Any) -> int:
    """Rows, 0 where nobody knows."""
    return len(dataset) if hasattr(dataset, "__len__") else 0


def name_of(dataset: Any) -> str | None:
    """What errors call a dataset; None for what is none."""
    if not is_dataset(dataset):
        return None
    named = getattr(dataset.info, "dataset_name", None)
    return f"the dataset {named}" if named else "the dataset"


def rows(dataset: Any, column: str) -> Iterator[Mapping[str, Any]]:
    """Rows with a column, or, where it is not there, as they are."""
    plain = dataset.with_format(None)
    if column in (dataset.column_names or ()):
        plain = plain.select_columns([column])
    try:
        for batch in plain.iter(_BATCH):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))
    except PolyheadError:
        raise
    except Exception as error:
        raise DataError(f"{name_of(dataset)} cannot be read ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    return text.rstrip(".")[:160]


def _library(name: str) -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        raise ConfigError(
            f"{name} needs the datasets library: pip install 'polyhead[datasets]'"
        ) from None
    return datasets
