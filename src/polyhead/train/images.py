"""Classes of images: rows of a path or an array, and a label."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyhead.errors import DataError
from polyhead.train.config import TrainConfig
from polyhead.train.data import Examples, Split
from polyhead.train.examples import digest_of
from polyhead.train.records import Table
from polyhead.train.supervised import ClassBatch, labelled


@dataclass(frozen=True)
class ImageCollator:
    """Images opened and made ready as the batch is asked for."""

    processor: Any
    folder: Path
    problem: str
    names: tuple[str, ...]

    def __call__(self, rows: Sequence[tuple[Mapping[str, Any], Tensor]]) -> ClassBatch:
        pixels = self.processor(images_of([row["image"] for row, _ in rows], self.folder))
        labels = torch.stack([label for _, label in rows])
        return ClassBatch({"pixel_values": pixels}, labels, self.problem)


def images_of(values: Sequence[Any], folder: Path) -> list[Any]:
    """Images as a processor takes them; a path that is not absolute is one from the table's."""
    return [folder / value if isinstance(value, str) else value for value in values]


def classified_images(
    table: Table, processor: Any, model: Any, config: TrainConfig, split: Split
) -> Examples | None:
    """Rows of `image` and `label`."""
    folder = Path(table.name).parent
    for row, value in enumerate(table.columns["image"]):
        if isinstance(value, str) and not (folder / value).is_file():
            raise DataError(f"{table.name}: the image of row {row} is not there: {value}")
    made = labelled(table, model.config, config, split)
    if made is None:
        return None
    rows, problem, names = made
    collate = ImageCollator(processor, folder, problem, names)
    return Examples(rows, collate, config.seed, digest_of(table, processor, problem, names, split))
