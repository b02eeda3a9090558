"""A prefix tree of token runs, one of which a text is to be (De Cao et al. 2021).

Nodes are numbered level by level, so that the children of a node stand side by side, by token.
"""

from collections.abc import Iterable, Sequence
from hashlib import sha256
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from polyhead.errors import DataError


class Trie:
    """Immutable; a node takes 13 bytes. Node 0 is the root.

    Errors: DataError where there is no run, or one without tokens.
    """

    def __init__(self, runs: Iterable[Sequence[int]]) -> None:
        unique = sorted({tuple(run) for run in runs})
        if not unique or not unique[0]:
            raise DataError("a trie needs runs of tokens, none of them empty")
        lengths = np.fromiter(map(len, unique), np.int64, len(unique))
        table = np.full((len(unique), int(lengths.max())), -1, np.int64)
        inside = np.arange(table.shape[1]) < lengths[:, None]
        table[inside] = np.fromiter(chain.from_iterable(unique), np.int64, int(lengths.sum()))
        # In order, a prefix is new where it differs from the one above.
        changed = np.ones_like(inside)
        changed[1:] = np.maximum.accumulate(table[1:] != table[:-1], axis=1)
        is_new = changed & inside
        number = np.cumsum(is_new.T.ravel()).reshape(is_new.T.shape).T
        parent = np.concatenate([np.zeros_like(number[:, :1]), number[:, :-1]], axis=1)
        count = int(number[-1, -1]) + 1
        self._tokens = np.concatenate([[-1], table.T[is_new.T]]).astype(np.int32)
        children = np.bincount(parent.T[is_new.T], minlength=count)
        self._first = np.concatenate([[1], 1 + np.cumsum(children)])
        self._ends = np.zeros(count, bool)
        self._ends[number[np.arange(len(unique)), lengths - 1]] = True
        for array in (self._tokens, self._first, self._ends):
            array.setflags(write=False)

    @property
    def max_token(self) -> int:
        """The largest id in it."""
        return int(self._tokens.max())

    @property
    def digest(self) -> str:
        """What tells it from others."""
        arrays = (self._tokens, self._first, self._ends)
        return sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()

    def __len__(self) -> int:
        return int(self._ends.sum())

    def step(self, node: int, token: int) -> int:
        """The node after one more token; -1 where no run goes on so, and after -1."""
        if node < 0:
            return -1
        first, last = self._first[node], self._first[node + 1]
        found = first + int(np.searchsorted(self._tokens[first:last], token))
        return int(found) if found < last and self._tokens[found] == token else -1

    def is_leaf(self, node: int) -> bool:
        """Whether nothing can follow; so after -1 too."""
        return node < 0 or bool(self._first[node] == self._first[node + 1])

    def allowed(
        self, nodes: Sequence[int], ends: Sequence[Sequence[int]], vocab_size: int
    ) -> Tensor:
        """Which tokens may follow each node, `[nodes, V]`: `ends` too, where a run is complete."""
        some = np.array([max(node, 0) for node in nodes])
        first = self._first[some]
        counts = np.where(np.array(nodes) < 0, 0, self._first[some + 1] - first)
        rows = np.repeat(np.arange(len(some)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        mask = np.zeros((len(some), vocab_size), bool)
        mask[rows, self._tokens[np.repeat(first, counts) + within]] = True
        for row, node in enumerate(nodes):
            if node < 0 or self._ends[node]:
                mask[row, list(ends[row])] = True
        return torch.from_numpy(mask)
