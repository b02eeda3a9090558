"""The sizes that images are resized to, each rule a small class."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polyhead.errors import ConfigError


@dataclass(frozen=True)
class Exactly:
    """Height and width, whatever the image's shape."""

    height: int
    width: int

    def of(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of an image after resizing."""
        return self.height, self.width

    def to_hf(self) -> dict[str, int]:
        """As `preprocessor_config.json` has it."""
        return {"height": self.height, "width": self.width}


@dataclass(frozen=True)
class ShortestEdge:
    """The shorter side gets this length, and the shape stays."""

    edge: int

    def of(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of an image after resizing."""
        if width <= height:
            return int(self.edge * height / width), self.edge
        return self.edge, int(self.edge * width / height)

    def to_hf(self) -> dict[str, int]:
        """As `preprocessor_config.json` has it."""
        return {"shortest_edge": self.edge}


Size = Exactly | ShortestEdge


def read_size(value: Any, is_square: bool, name: str) -> Size:
    """A size as files of all ages have it: a number, height and width, or a mapping.

    is_square: whether a number is both sides or the shorter one. Raises ConfigError.
    """
    if isinstance(value, Mapping):
        said = {key: edge for key, edge in value.items() if edge is not None}
        if said.keys() == {"height", "width"}:
            return Exactly(_edge(said["height"], name), _edge(said["width"], name))
        if said.keys() == {"shortest_edge"}:
            return ShortestEdge(_edge(said["shortest_edge"], name))
    elif isinstance(value, list | tuple) and len(value) == 2:
        return Exactly(_edge(value[0], name), _edge(value[1], name))
    elif isinstance(value, int):
        edge = _edge(value, name)
        return Exactly(edge, edge) if is_square else ShortestEdge(edge)
    raise ConfigError(f"{name} is {value!r}; it must be height and width, or the shortest_edge")


def _edge(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 2**14:
        raise ConfigError(f"{name} says {value!r}; a side must be from 1 to {2**14} pixels")
    return value
