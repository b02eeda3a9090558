"""Every lowering of a mask says what the predicate says, and the predicate what the words say."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from tests.nn.parts import DEVICE
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from polyhead.nn.mask import EVERYTHING, Mask, as_mask

B, H, T = 3, 2, 9
KEEP = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [0] * 2 + [1] * 7], device=DEVICE).bool()
SEGMENTS = torch.tensor([[0] * 3 + [1] * 6, [0] * 9, [0, 0, 1, 1, 1, 2, 2, 0, 0]], device=DEVICE)


def by_head(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q + k + h) % 3 != 0


def near(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q - k).abs() < 4


# Each statement says in plain Python whether q may see k.
Statement = Callable[[int, int, int, int], bool]
MASKS: dict[str, tuple[Mask, Statement]] = {
    "everything": (Mask(), lambda b, h, q, k: True),
    "causal": (Mask(causal=True), lambda b, h, q, k: k <= q),
    "window": (Mask(window=3), lambda b, h, q, k: abs(q - k) < 3),
    "causal-window": (Mask(causal=True, window=3), lambda b, h, q, k: q - 3 < k <= q),
    "itself": (Mask(causal=True, window=1), lambda b, h, q, k: q == k),
    "keep": (Mask(keep=KEEP), lambda b, h, q, k: bool(KEEP[b, k])),
    "causal-keep": (Mask(causal=True, keep=KEEP), lambda b, h, q, k: k <= q and bool(KEEP[b, k])),
    "segments": (
        Mask(segments=SEGMENTS),
        lambda b, h, q, k: bool(SEGMENTS[b, q] == SEGMENTS[b, k]),
    ),
    "one-row-of-segments": (
        Mask(segments=SEGMENTS[:1], keep=KEEP),
        lambda b, h, q, k: bool(SEGMENTS[0, q] == SEGMENTS[0, k]) and bool(KEEP[b, k]),
    ),
    "allow-by-head": (Mask(allow=(by_head,), heads=H), lambda b, h, q, k: (q + k + h) % 3 != 0),
    "all-at-once": (
        Mask(causal=True, window=4, keep=KEEP, segments=SEGMENTS, allow=(by_head,), heads=H),
        lambda b, h, q, k: (
            q - 4 < k <= q
            and bool(KEEP[b, k])
            and bool(SEGMENTS[b, q] == SEGMENTS[b, k])
            and (q + k + h) % 3 != 0
        ),
    ),
    "and": (
        Mask(causal=True, segments=SEGMENTS, window=5)
        & Mask(window=3, keep=KEEP, segments=SEGMENTS.flip(0), allow=(near,)),
        lambda b, h, q, k: (
            q - 3 < k <= q
            and bool(KEEP[b, k])
            and bool(SEGMENTS[b, q] == SEGMENTS[b, k])
            and bool(SEGMENTS[2 - b, q] == SEGMENTS[2 - b, k])
        ),
    ),
    "and-both-keep": (
        Mask(keep=KEEP) & Mask(keep=KEEP.flip(1)),
        lambda b, h, q, k: bool(KEEP[b, k]) and bool(KEEP[b, 8 - k]),
    ),
    "or": (
        Mask(causal=True) | Mask(allow=(near,)),
        lambda b, h, q, k: k <= q or abs(q - k) < 4,
    ),
    "or-keep": (
        Mask(causal=True) | Mask(keep=KEEP),
        lambda b, h, q, k: k <= q or bool(KEEP[b, k]),
    ),
    "or-keep-and": (
        (Mask(causal=True) | Mask(keep=KEEP)) & Mask(window=4),
        lambda b, h, q, k: (k <= q or bool(KEEP[b, k])) and abs(q - k) < 4,
    ),
    "or-and": (
        (Mask(window=2) | Mask(allow=(by_head,), heads=H)) & Mask(causal=True, keep=KEEP),
        lambda b, h, q, k: (abs(q - k) < 2 or (q + k + h) % 3 != 0) and k <= q and bool(KEEP[b, k]),
    ),
}
by_name = pytest.mark.parametrize("name", MASKS)


def brute(statement: Statement, num_queries: int, num_keys: int, offset: int = 0) -> Tensor:
    seen = torch.zeros(B, H, num_queries, num_keys, dtype=torch.bool)
    for b, h, q, k in product(range(B), range(H), range(num_queries), range(num_keys)):
        seen[b, h, q, k] = statement(b, h, q + offset, k)
    return seen


def spread(x: Tensor) -> Tensor:
    return x.expand(B, H, *x.shape[2:])


@by_name
def test_dense_is_the_statement(name: str) -> None:
    mask, statement = MASKS[name]
    assert torch.equal(spread(mask.dense(T, T, DEVICE)), brute(statement, T, T))


@by_name
def test_the_lowest_form_is_the_statement(name: str) -> None:
    mask, statement = MASKS[name]
    seen = mask.lower(T, T, DEVICE).boolean(T, T, DEVICE)
    seen = torch.ones(1, 1, T, T, dtype=torch.bool) if seen is None else seen
    assert torch.equal(spread(seen), brute(statement, T, T))


@by_name
def test_mask_mod_is_what_flex_attention_reads(name: str) -> None:
    mask, statement = MASKS[name]
    made = create_mask(mask.mask_mod(), B, H, T, T, device=DEVICE.type)
    assert torch.equal(made, brute(statement, T, T))


@pytest.mark.parametrize("name", ["causal", "window", "causal-window", "or", "allow-by-head"])
@pytest.mark.parametrize("offset", [0, 1, 5])
def test_an_offset_moves_the_queries(name: str, offset: int) -> None:
    mask, statement = MASKS[name]
    num_queries = T - offset
    expected = brute(statement, num_queries, T, offset)
    rows = torch.full((B,), offset)
    for placed in (mask.placed(offset), mask.placed(rows)):
        assert torch.equal(spread(placed.dense(num_queries, T, DEVICE)), expected)
        seen = placed.lower(num_queries, T, DEVICE).boolean(num_queries, T, DEVICE)
        seen = torch.ones(1, 1, num_queries, T).bool() if seen is None else seen
        assert torch.equal(spread(seen), expected)


def test_each_row_has_its_own_offset() -> None:
    offset = torch.tensor([0, 4, 7])
    seen = Mask(causal=True, window=3).placed(offset).dense(2, T, DEVICE)
    for b, q, k in product(range(3), range(2), range(T)):
        at = q + int(offset[b])
        assert bool(seen[b, 0, q, k]) == (at - 3 < k <= at)


@pytest.mark.parametrize("rows", [1, 3])
def test_key_slots_have_positions_of_their_own(rows: int) -> None:
    keys = torch.tensor([[4, 5, 2, 3], [-1, 1, 0, -1], [8, 5, 6, 7]])[:rows]
    offset = torch.tensor([5, 1, 8])
    seen = Mask(causal=True, window=3).placed(offset, keys).dense(2, 4, DEVICE)
    assert seen.shape == (3, 1, 2, 4)
    for b, q, k in product(range(3), range(2), range(4)):
        at, key = q + int(offset[b]), int(keys[b % rows, k])
        assert bool(seen[b, 0, q, k]) == (key >= 0 and at - 3 < key <= at)


@pytest.mark.parametrize(
    ("mask", "queries", "keys", "form"),
    [
        (Mask(), 5, 5, "everything"),
        (Mask(), 2, 7, "everything"),
        (Mask(causal=True), 5, 5, "causal"),
        (Mask(causal=True), 1, 1, "everything"),
        (Mask(causal=True), 2, 5, "dense"),  # the flag would align these at the top left
        (Mask(causal=True), 5, 2, "dense"),
        (Mask(causal=True, offset=6), 1, 7, "everything"),  # one token against all it may see
        (Mask(causal=True, offset=6), 2, 8, "dense"),
        (Mask(causal=True, offset=6), 1, 9, "dense"),
        (Mask(causal=True, window=5), 5, 5, "causal"),
        (Mask(causal=True, window=4), 5, 5, "dense"),
        (Mask(causal=True, window=7, offset=6), 1, 7, "everything"),
        (Mask(causal=True, window=6, offset=6), 1, 7, "dense"),
        (Mask(window=5), 5, 5, "everything"),
        (Mask(window=5), 3, 6, "dense"),
        (Mask(causal=True, keep=KEEP), 9, 9, "dense"),
        (Mask(causal=True, offset=torch.tensor([6], device=DEVICE)), 1, 7, "dense"),
    ],
    ids=str,
)
def test_the_cheapest_form_is_chosen(mask: Mask, queries: int, keys: int, form: str) -> None:
    lowered = mask.lower(queries, keys, DEVICE)
    if form == "everything":
        assert lowered is EVERYTHING
    assert lowered.is_causal == (form == "causal")
    assert (lowered.dense is not None) == (form == "dense")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["causal-keep", "all-at-once"])
def test_flex_attention_runs_it(name: str) -> None:
    mask, statement = MASKS[name]
    q, k, v = torch.randn(3, B, H, T, 16).unbind()
    block = create_block_mask(mask.mask_mod(), B, H, T, T, device=DEVICE.type)
    with_flex = flex_attention(q, k, v, block_mask=block, scale=0.25)
    scores = (q @ k.mT * 0.25).masked_fill(~brute(statement, T, T), float("-inf"))
    torch.testing.assert_close(with_flex, scores.softmax(-1).nan_to_num() @ v)


@pytest.mark.parametrize(
    ("mask", "ends"),
    [
        (Mask(), [0, 9]),
        (Mask(causal=True), [0, 9]),
        (Mask(keep=KEEP), [0, 9, 13, 20]),
        (Mask(segments=SEGMENTS), [0, 3, 9, 18, 20, 23, 25, 27]),
    ],
    ids=["plain", "causal", "keep", "segments"],
)
def test_cu_seqlens(mask: Mask, ends: list[int]) -> None:
    found = mask.cu_seqlens(T)
    assert found.dtype == torch.int32
    assert found.tolist() == ends


@pytest.mark.parametrize(
    "mask",
    [
        Mask(allow=(near,)),
        Mask(offset=3),
        Mask(keep=KEEP, segments=SEGMENTS),
        Mask(keys=torch.zeros(1, 3, dtype=torch.long)),
    ],
    ids=["allow", "offset", "keep-and-segments", "keys"],
)
def test_what_is_no_set_of_runs_says_so(mask: Mask) -> None:
    with pytest.raises(ValueError, match="dense"):
        mask.cu_seqlens(T)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="window is 0"):
        Mask(window=0)
    with pytest.raises(ValueError, match="before they are placed"):
        Mask(offset=2) | Mask(causal=True)
    with pytest.raises(ValueError, match="different offsets"):
        Mask(offset=2) & Mask(offset=3)
    with pytest.raises(ValueError, match=r"attention_mask is \[2, 1, 3\]"):
        as_mask(torch.ones(2, 1, 3), torch.Size([2, 3]))


def test_a_placed_mask_joins_with_one_that_is_not() -> None:
    keys = torch.tensor([[2, 3, 1]])
    joined = Mask(window=2).placed(3, keys) & Mask(causal=True)
    assert (joined.offset, joined.keys is keys) == (3, True)
    assert joined.dense(1, 3, DEVICE).flatten().tolist() == [True, True, False]


def test_users_masks() -> None:
    assert as_mask(None, torch.Size([2, 3])).is_order_alone
    mask = Mask(causal=True)
    assert as_mask(mask, torch.Size([2, 3])) is mask
    assert (
        as_mask(torch.ones(2, 3), torch.Size([2, 3])).keep is None
    )  # hides nothing: the fast path stays
    kept = as_mask(torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.Size([2, 3])).keep
    assert kept is not None
    assert kept.tolist() == [[True, True, False], [True, True, True]]
