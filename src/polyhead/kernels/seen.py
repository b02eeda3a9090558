"""What a model was when it was looked at, so that whoever relies on it learns of any change."""

from operator import is_
from typing import Any

import torch
from torch import nn

from polyhead.nn.position import T5Bias


class Seen:
    """Parts, what they are set to, where weights lie, what was written there, and threads.

    Not seen: what changes within an attribute that is no tensor, and writes through `.data`.
    """

    def __init__(self, *models: nn.Module) -> None:
        self._things: list[Any] = []
        self._places: list[Any] = [torch.get_num_threads()]
        self._writes: list[int] = []
        parts = [*models]
        for part in parts:
            parts += [each for each in part._modules.values() if each is not None]
            # Whether it learns changes nothing that is relied on.
            self._things += {**vars(part), "training": None}.values()
            for x in (*part._parameters.values(), *part._buffers.values()):
                self._things.append(x)
                if x is not None and not x.is_mkldnn:
                    self._places.append(x.data_ptr())
                    self._writes.append(0 if x.is_inference() else x._version)
            if isinstance(part, T5Bias):  # of which tables are made
                self._places += part.table.weight.flatten().tolist()
        self._things += parts

    def is_where(self, other: "Seen | None") -> bool:
        """Whether all lies where it lay; what is written there may be new."""
        return (
            other is not None
            and self._places == other._places
            and len(self._things) == len(other._things)
            and all(map(is_, self._things, other._things))
        )

    def is_what(self, other: "Seen | None") -> bool:
        """Whether nothing is new."""
        return self.is_where(other) and other is not None and self._writes == other._writes
