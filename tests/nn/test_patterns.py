"""Sparse patterns against their own plain statements."""

import random
from itertools import product

import pytest
import torch
from tests.nn.parts import DEVICE
from torch.nn.attention.flex_attention import create_mask

from polyhead.nn.mask import Mask
from polyhead.nn.patterns import big_bird, prefix, shifted_windows, strided


@pytest.mark.parametrize("stride", [1, 3, 5])
@pytest.mark.parametrize("offset", [0, 4])
def test_strided(stride: int, offset: int) -> None:
    seen = (strided(stride) & Mask(causal=True)).placed(offset).dense(7, 12, DEVICE)[0, 0]
    for i, k in product(range(7), range(12)):
        q = i + offset
        assert bool(seen[i, k]) == (k <= q and (q - k < stride or (q - k) % stride == 0))


def test_prefix() -> None:
    lengths = torch.tensor([0, 2, 5])
    seen = prefix(lengths).dense(6, 6, DEVICE)
    assert torch.equal(
        create_mask(prefix(lengths).mask_mod(), 3, 1, 6, 6, device=DEVICE.type), seen
    )
    for b, q, k in product(range(3), range(6), range(6)):
        assert bool(seen[b, 0, q, k]) == (k <= q or k < int(lengths[b]))


@pytest.mark.parametrize("causal", [False, True])
def test_big_bird(causal: bool) -> None:
    T, window, num_global, num_random = 24, 3, 2, 4
    mask = big_bird(window, num_global, num_random, max_len=T, seed=3)
    seen = (mask & Mask(causal=causal)).dense(T, T, DEVICE)[0, 0]
    random_beyond = 0
    for q, k in product(range(T), range(T)):
        if causal and k > q:
            assert not seen[q, k]
        elif abs(q - k) < window or q < num_global or k < num_global:
            assert seen[q, k]
        else:
            random_beyond += int(seen[q, k])
    assert 0 < random_beyond <= T * num_random
    again = (big_bird(window, num_global, num_random, T, 3) & Mask(causal=causal)).dense(
        T, T, DEVICE
    )
    assert torch.equal(seen, again[0, 0])
    # A part of it is the same part: what a query sees does not depend on who asks with it.
    late = (mask & Mask(causal=causal)).placed(20).dense(4, T, DEVICE)[0, 0]
    assert torch.equal(late, seen[20:])


def test_big_bird_under_vmap() -> None:
    mask = big_bird(2, 1, 2, max_len=10)
    made = create_mask(mask.mask_mod(), 1, 1, 10, 10, device=DEVICE.type)
    assert torch.equal(made, mask.dense(10, 10, DEVICE))


@pytest.mark.parametrize(
    ("height", "width", "window", "shift"), [(8, 8, 4, 2), (6, 9, 3, 1), (4, 8, 4, 2), (4, 4, 2, 0)]
)
def test_shifted_windows(height: int, width: int, window: int, shift: int) -> None:
    """Two places of a window see each other if the roll did not bring them together."""
    seen = shifted_windows(height, width, window, shift).dense(window**2, window**2, DEVICE)[:, 0]
    windows = [(r, c) for r in range(0, height, window) for c in range(0, width, window)]
    assert len(seen) == len(windows)
    cells = list(product(range(window), range(window)))
    for w, (top, left) in enumerate(windows):
        for (i, (r, c)), (j, (s, d)) in product(enumerate(cells), enumerate(cells)):
            # Rolled by -shift, this place holds the pixel that was `shift` further on.
            one, other = (top + r + shift, left + c + shift), (top + s + shift, left + d + shift)
            wrapped = [
                (a >= size) == (b >= size)
                for a, b, size in zip(one, other, (height, width), strict=True)
            ]
            assert bool(seen[w, i, j]) == all(wrapped)


def test_patterns_are_real_while_a_model_is_laid_out() -> None:
    with torch.device("meta"):
        masks = [big_bird(2, 1, 2, max_len=16), strided(3)]
    for mask in masks:
        assert mask.dense(16, 16, DEVICE).any()


def test_a_pattern_is_a_value_among_others() -> None:
    random.seed(0)
    keep = torch.tensor([[random.random() < 0.7 for _ in range(9)] for _ in range(2)])
    joined = (strided(3) | big_bird(1, 1, 1, 9)) & Mask(causal=True, keep=keep)
    one, other = strided(3).dense(9, 9, DEVICE), big_bird(1, 1, 1, 9).dense(9, 9, DEVICE)
    expected = (one | other) & torch.ones(9, 9).bool().tril() & keep[:, None, None]
    assert torch.equal(joined.dense(9, 9, DEVICE), expected)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="stride is 0"):
        strided(0)
