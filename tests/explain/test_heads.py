"""What kind of head each is: measured on weights whose kind is known."""

from collections.abc import Callable

import pytest
import torch
from tests.explain.models import IDS, inputs_of, made
from torch import Tensor

import polyhead as ph
from polyhead.explain.heads import MEASURES, head_scores, repeated

TOKENS = 13
TWICE = repeated(torch.arange(3, 31), 6, 2, seed=1, begin=0)


def at(index: Callable[[int], int]) -> Tensor:
    """Weights by which token `q` looks at one token alone."""
    weights = torch.zeros(TOKENS, TOKENS)
    for q in range(TOKENS):
        weights[q, max(0, index(q))] = 1.0
    return weights


KINDS: dict[str, tuple[Tensor, dict[str, float]]] = {
    "previous": (at(lambda q: q - 1), {"previous": 1, "positional": 1, "itself": 0, "entropy": 0}),
    "itself": (at(lambda q: q), {"itself": 1, "distance": 0, "previous": 0, "sink": 0}),
    "first": (at(lambda q: 0), {"sink": 1, "distance": 6, "induction": 0}),
    "induction": (at(lambda q: q - 5 if q > 6 else 0), {"induction": 1, "duplicate": 0}),
    "duplicate": (at(lambda q: q - 6 if q > 6 else 0), {"duplicate": 1, "induction": 0}),
    "all alike": (
        torch.ones(TOKENS, TOKENS).tril() / torch.arange(1, TOKENS + 1)[:, None],
        {"entropy": sum(torch.arange(1, TOKENS + 1).log().tolist()) / TOKENS, "distance": 3},
    ),
    "marks": (at(lambda q: q // 4 * 4), {"delimiter": 1}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str) -> None:
    model = made("llama")
    weights, expected = KINDS[kind]
    marks = torch.zeros_like(TWICE, dtype=torch.bool)
    marks[:, ::4] = True
    with ph.replace(model, "layers.1", "weights", weights):
        scores = head_scores(model, TWICE, marks)
    for measure, value in expected.items():
        table = scores.table(measure)
        assert table.shape == (3, 4)
        torch.testing.assert_close(table[1], torch.full((4,), float(value)), atol=1e-4, rtol=1e-4)
    if kind == "induction":
        best = scores.best("induction", 4)
        assert {(head.layer, head.name) for head in best} == {(1, "backbone.layers.1.attention")}
        assert scores.best("induction", least=0.99) == best


def test_repeated_texts_say_everything_twice() -> None:
    assert TWICE.shape == (2, TOKENS)
    assert TWICE[:, 0].eq(0).all()
    assert torch.equal(TWICE[:, 1:7], TWICE[:, 7:])
    assert torch.equal(TWICE, repeated(torch.arange(3, 31), 6, 2, seed=1, begin=0))
    assert not torch.equal(TWICE, repeated(torch.arange(3, 31), 6, 2, seed=2, begin=0))


@pytest.mark.parametrize("name", ["llama", "bert", "albert"])
def test_padding_counts_for_nothing(name: str) -> None:
    model = made(name)
    keep = torch.tensor([[0] * 9, [1] * 5 + [0] * 4])
    keep[0, 0] = 1  # a text of one token: nothing but itself to look at
    both = head_scores(model, {"input_ids": IDS, "attention_mask": keep})
    alone = head_scores(model, IDS[1:, :5])
    for measure in set(MEASURES) - {"entropy", "distance"}:
        torch.testing.assert_close(both.table(measure), alone.table(measure), atol=1e-5, rtol=1e-4)


def test_cross_attention_has_no_such_kinds() -> None:
    scores = head_scores(made("t5"), inputs_of("t5"))
    assert all(".encoder." in name for name in scores["sink"])


def test_images_have_no_tokens() -> None:
    with pytest.raises(ph.ConfigError, match="this needs texts"):
        head_scores(made("vit"), {"pixel_values": inputs_of("vit")})


def test_padding_on_the_left_changes_no_measure() -> None:
    model, alone = made("llama"), IDS[:1]
    pad = torch.zeros(1, 3, dtype=torch.long)
    inputs = {
        "input_ids": torch.cat([pad, alone], 1),
        "attention_mask": torch.cat([pad, torch.ones_like(alone)], 1),
    }
    ours, theirs = head_scores(model, inputs), head_scores(model, alone)
    for measure in MEASURES:
        torch.testing.assert_close(ours.table(measure), theirs.table(measure), atol=1e-5, rtol=0)


def test_attention_that_is_not_of_the_text_is_left_out() -> None:
    model = made("t5")
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)}
    names = list(head_scores(model, inputs)["sink"])
    assert names
    assert all(".encoder." in name for name in names)
