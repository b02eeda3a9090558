"""Reading over a cache equals one forward, whatever the cache, the position and the rows."""

from collections.abc import Callable

import pytest
import torch
from tests.nn.parts import DEVICE, POSITIONS, B, D, E, H, T, randomized
from torch import Tensor
from torch.testing import assert_close

from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.cache import Cache, Caches, CrossCache, GrowingCache, StaticCache
from polyhead.nn.mask import Mask
from polyhead.nn.position import Position
from polyhead.nn.rolling import RollingCache
from polyhead.nn.rotary import Rotary

CLOSE = dict(atol=1e-5, rtol=0.0)
WINDOW = 4
GROUPS = 2
LIKE = torch.zeros(1, device=DEVICE)
CACHES: dict[str, Callable[[int], Cache]] = {
    "growing": lambda rows: GrowingCache(rows, GROUPS, D, LIKE),
    "static": lambda rows: StaticCache(rows, GROUPS, D, T + 3, LIKE),
    "rolling": lambda rows: RollingCache(rows, GROUPS, D, WINDOW, LIKE),
}
MASK = {
    "growing": Mask(causal=True),
    "static": Mask(causal=True),
    "rolling": Mask(causal=True, window=WINDOW),
}
kinds = pytest.mark.parametrize("kind", CACHES)
# Beyond the trained length a dynamic rotary depends on when a token was computed: see its docs.
positions = pytest.mark.parametrize("position", [p for p in POSITIONS if p != "rotary-dynamic"])
LENGTHS = (10, 3, 6)


def layer_of(position: str) -> tuple[MultiHeadAttention, Position | None]:
    layer = randomized(MultiHeadAttention(E, H, num_kv_heads=GROUPS), 0.2).requires_grad_(False)
    return layer, POSITIONS[position]()


def kept(piece: Tensor, counts: tuple[int, ...]) -> Tensor:
    return torch.arange(piece.shape[1]) < torch.tensor(counts)[:, None]


@kinds
@positions
@pytest.mark.parametrize("chunks", [(1,) * T, (4, 1, 1, 4), (7, 2, 1), (2, 6, 2)], ids=str)
def test_chunks_and_steps_equal_one_forward(
    kind: str, position: str, chunks: tuple[int, ...]
) -> None:
    layer, part = layer_of(position)
    x = torch.randn(B, T, E)
    cache = CACHES[kind](B)
    pieces = [
        layer(piece, mask=MASK[kind], position=part, cache=cache) for piece in x.split(chunks, 1)
    ]
    assert_close(torch.cat(pieces, 1), layer(x, mask=MASK[kind], position=part), **CLOSE)
    assert cache.lengths.tolist() == [T] * B


@kinds
@positions
def test_ragged_rows_equal_the_row_alone(kind: str, position: str) -> None:
    """Prompts padded on the right, then steps, then another ragged chunk."""
    layer, part = layer_of(position)
    x, steps, more = torch.randn(B, T, E), torch.randn(B, 2, E), torch.randn(B, 3, E)
    caches = Caches([CACHES[kind](B) if kind != "static" else StaticCache(B, GROUPS, D, 20, LIKE)])
    pieces = [(x, LENGTHS), (steps[:, :1], None), (steps[:, 1:], None), (more, (1, 3, 2))]
    outs: list[Tensor] = []
    for piece, counts in pieces:
        keep = (
            None if counts is None else torch.arange(piece.shape[1]) < torch.tensor(counts)[:, None]
        )
        at = caches.begin(piece.shape[1], keep)
        outs.append(layer(piece, mask=MASK[kind], position=part, at=at, cache=caches[0]))
        caches.end()
    assert caches.lengths.tolist() == [LENGTHS[0] + 3, LENGTHS[1] + 5, LENGTHS[2] + 4]
    for b, length in enumerate(LENGTHS):
        last = (1, 3, 2)[b]
        own = torch.cat([x[b, :length], steps[b], more[b, :last]])[None]
        alone = layer(own, mask=MASK[kind], position=part)[0]
        found = torch.cat([outs[0][b, :length], outs[1][b], outs[2][b], outs[3][b, :last]])
        assert_close(found, alone, **CLOSE)
        assert all(out.isfinite().all() for out in outs)


@kinds
def test_dynamic_rotary_equals_one_forward_up_to_its_length(kind: str) -> None:
    layer, part = layer_of("rotary-dynamic")
    x = torch.randn(B, 6, E)
    cache = CACHES[kind](B)
    pieces = [layer(piece, mask=MASK[kind], position=part, cache=cache) for piece in x.split(2, 1)]
    assert_close(torch.cat(pieces, 1), layer(x, mask=MASK[kind], position=part), **CLOSE)


@kinds
def test_dynamic_rotary_turns_all_keys_alike_beyond_it(kind: str) -> None:
    """The last token over a cache is the last token of one forward: all keys turn anew."""
    layer, part = layer_of("rotary-dynamic")
    x = torch.randn(B, T, E)
    cache = CACHES[kind](B)
    layer(x[:, :-1], mask=MASK[kind], position=part, cache=cache)
    last = layer(x[:, -1:], mask=MASK[kind], position=part, cache=cache)
    assert_close(last, layer(x, mask=MASK[kind], position=part)[:, -1:], **CLOSE)


@kinds
@pytest.mark.parametrize("mask", [None, Mask(), Mask(window=3)], ids=["none", "empty", "window"])
def test_without_order_only_what_is_held_is_seen(kind: str, mask: Mask | None) -> None:
    layer, _ = layer_of("none")
    x = torch.randn(B, 4, E)
    cache = CACHES[kind](B)
    first = layer(x[:, :2], mask=mask, cache=cache)
    assert_close(first, layer(x[:, :2], mask=mask), **CLOSE)
    second = layer(x[:, 2:], mask=mask, cache=cache)
    assert_close(second, layer(x, mask=mask)[:, 2:], **CLOSE)


@kinds
def test_without_order_padding_is_not_seen(kind: str) -> None:
    layer, _ = layer_of("none")
    x, step, counts = torch.randn(B, 3, E), torch.randn(B, 1, E), (3, 1, 2)
    caches = Caches([CACHES[kind](B)])
    at = caches.begin(3, kept(x, counts))
    first = layer(x, mask=Mask(), at=at, cache=caches[0])
    caches.end()
    second = layer(step, mask=Mask(), at=caches.begin(1), cache=caches[0])
    for b, length in enumerate(counts):
        own = torch.cat([x[b, :length], step[b]])[None]
        assert_close(first[b, :length], layer(own[:, :length])[0], **CLOSE)
        assert_close(second[b], layer(own)[0, -1:], **CLOSE)


@pytest.mark.parametrize("kind", ["growing", "static"])
@pytest.mark.parametrize("back", [(4, 4, 4), (0, 2, 9)], ids=str)
def test_truncation_forgets(kind: str, back: tuple[int, ...]) -> None:
    layer, part = layer_of("rotary")
    x, other = torch.randn(B, T, E), torch.randn(B, 3, E)
    caches = Caches([CACHES[kind](B)])

    def read(piece: Tensor) -> Tensor:
        at = caches.begin(piece.shape[1])
        y = layer(piece, mask=MASK[kind], position=part, at=at, cache=caches[0])
        caches.end()
        return y

    read(x)
    caches.truncate(back if kind == "static" else torch.tensor(back))
    assert caches.lengths.tolist() == list(back)
    again = torch.cat([read(other[:, :2]), read(other[:, 2:])], 1)
    for b, length in enumerate(back):
        own = torch.cat([x[b, :length], other[b]])[None]
        assert_close(again[b], layer(own, mask=MASK[kind], position=part)[0, length:], **CLOSE)


def test_a_rolling_cache_goes_back_only_before_it_wraps() -> None:
    layer, part = layer_of("rotary")
    caches = Caches([RollingCache(1, GROUPS, D, WINDOW, LIKE)])
    x = torch.randn(1, 6, E)

    def read(piece: Tensor) -> Tensor:
        at = caches.begin(piece.shape[1])
        y = layer(piece, mask=MASK["rolling"], position=part, at=at, cache=caches[0])
        caches.end()
        return y

    read(x[:, :4])
    caches.truncate([2])
    again = read(x[:, 2:5])
    assert_close(again, layer(x[:, :5], mask=MASK["rolling"], position=part)[:, 2:], **CLOSE)
    caches.truncate([5])  # nothing is taken back
    with pytest.raises(ValueError, match="rolling cache of 4"):
        caches.truncate([4])


def test_layers_of_two_kinds_advance_together() -> None:
    layer, part = layer_of("alibi")
    x = torch.randn(B, T, E)
    caches = Caches([CACHES["rolling"](B), CACHES["growing"](B)])
    masks = [MASK["rolling"], MASK["growing"]]
    whole = x
    for mask in masks:
        whole = layer(whole, mask=mask, position=part)
    pieces: list[Tensor] = []
    for piece in x.split((3, 1, 5, 1), 1):
        at = caches.begin(piece.shape[1])
        for cache, mask in zip(caches, masks, strict=True):
            piece = layer(piece, mask=mask, position=part, at=at, cache=cache)
        caches.end()
        pieces.append(piece)
    assert_close(torch.cat(pieces, 1), whole, **CLOSE)
    assert (len(caches), caches[0].lengths is caches[1].lengths) == (2, True)


def test_a_memory_is_projected_once() -> None:
    layer = randomized(MultiHeadAttention(E, H, kv_dim=12), 0.2).requires_grad_(False)
    x, memory = torch.randn(B, 5, E), torch.randn(B, 7, 12)
    mask = Mask(keep=torch.arange(7) < torch.tensor([[7], [2], [4]]))
    whole = layer(x, memory, mask)
    calls: list[int] = []
    layer.k.register_forward_hook(lambda *_: calls.append(1))
    cache = CrossCache()
    steps = [layer(x[:, t : t + 1], memory, mask, cache=cache) for t in range(4)]
    steps.append(layer(x[:, 4:], mask=mask, cache=cache))  # the memory is held
    assert_close(torch.cat(steps, 1), whole, **CLOSE)
    assert len(calls) == 1


def test_what_cannot_be_is_refused() -> None:
    caches = Caches([StaticCache(2, GROUPS, D, 4, LIKE)])
    with pytest.raises(ValueError, match="5 tokens do not fit a static cache of 4"):
        caches.begin(5)
    with pytest.raises(ValueError, match="pad on the right"):
        caches.begin(2, torch.tensor([[False, True], [True, True]]))
    caches.begin(3)
    caches.end()
    with pytest.raises(ValueError, match=r"rows of \[3, 3\] tokens to \[4, 1\]"):
        caches.truncate([4, 1])


@pytest.mark.parametrize("kind", ["growing", "static", "rolling"])
def test_a_call_by_itself_may_name_its_positions(kind: str) -> None:
    attention = MultiHeadAttention(16, 4, num_kv_heads=2)
    x = torch.randn(2, 9, 16)
    like = torch.empty(0)
    caches = {
        "growing": GrowingCache(2, 2, 4, like),
        "static": StaticCache(2, 2, 4, 12, like),
        "rolling": RollingCache(2, 2, 4, 5, like),
    }
    mask = Mask(causal=True, window=5 if kind == "rolling" else None)
    rotary = Rotary(4)
    whole = attention(x, mask=mask, position=rotary)
    pieces = [
        attention(
            x[:, a:b], mask=mask, position=rotary, at=torch.arange(a, b)[None], cache=caches[kind]
        )
        for a, b in ((0, 4), (4, 8), (8, 9))
    ]
    assert (torch.cat(pieces, 1) - whole).abs().max() <= 1e-5
    assert caches[kind].lengths.tolist() == [9, 9]
    with pytest.raises(ValueError, match="go on"):
        attention(x[:, :1], mask=mask, at=torch.tensor([[3]]), cache=caches[kind])
    assert caches[kind].lengths.tolist() == [9, 9]


@kinds
@positions
def test_rows_that_are_selected_go_on_as_they_were(kind: str, position: str) -> None:
    attention, at = layer_of(position)
    x, rows = torch.randn(3, T, E), [2, 0, 2, 1, 1]
    caches = Caches([CACHES[kind](3)])
    keep = torch.arange(8) < torch.tensor([[8], [3], [6]])
    places = caches.begin(8, keep)
    attention(x[:, :8], mask=MASK[kind], position=at, at=places, cache=caches[0])
    caches.end()
    caches.select(rows)
    assert caches.lengths.tolist() == [6, 8, 6, 3, 3]
    step = torch.randn(5, 1, E)
    selected = attention(step, mask=MASK[kind], position=at, cache=caches[0])
    for row, source in enumerate(rows):
        alone = Caches([CACHES[kind](1)])
        held = int(keep[source].sum())
        attention(x[source : source + 1, :held], mask=MASK[kind], position=at, cache=alone[0])
        expected = attention(step[row : row + 1], mask=MASK[kind], position=at, cache=alone[0])
        assert_close(selected[row : row + 1], expected, **CLOSE)


def test_beams_share_the_memory_of_their_text() -> None:
    attention, _ = layer_of("none")
    memory, x = torch.randn(3, 7, E), torch.randn(3, 1, E)
    seen = Mask(keep=torch.arange(7) < torch.tensor([[7], [2], [5]]))
    cache = CrossCache()
    attention(x, memory, seen, cache=cache)
    step = torch.randn(6, 1, E)
    shared = attention(step, memory, seen, cache=cache)
    for row in range(6):
        source = slice(row // 2, row // 2 + 1)
        alone = Mask(keep=seen.keep[source])  # pyright: ignore[reportOptionalSubscript]
        assert_close(shared[row : row + 1], attention(step[row : row + 1], memory[source], alone))
