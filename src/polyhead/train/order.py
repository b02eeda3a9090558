"""Orders by arithmetic: what stands for shuffling where any row must be found from its number."""

import numpy as np


def mix(x: np.ndarray | np.uint64) -> np.ndarray:
    """SplitMix64's finaliser: 64 bits in, 64 well mixed bits out."""
    x = np.atleast_1d(np.asarray(x, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def part_seed(seed: int, part: int) -> int:
    """What the part-th batch of a run draws from, whichever process it falls to."""
    return int(mix(np.uint64(part) + mix(np.uint64(seed) + np.uint64(5)))[0])


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """A keyed permutation of range(size) at `index`: a Feistel network, walked until inside."""
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    value = index.copy()
    todo = np.ones(len(index), bool)
    while todo.any():
        left, right = value[todo] >> half, value[todo] & low
        for turn in range(6):
            left, right = (
                right,
                left ^ (mix(right + mix(key[todo] + np.uint64(turn))) & low),
            )
        value[todo] = (left << half) | right
        todo = value >= np.uint64(size)
    return value
