"""Checkpoint maps: rows read in both directions, and what does not fit is refused."""

import pytest
import torch
from torch import Size, Tensor

from polyhead.errors import FileError
from polyhead.models.keys import Dropped, Rule, Rules, Tied, to_ours, to_theirs

RULES: Rules = (
    Rule("wte.weight", "embedding.weight"),
    Rule("h.{i}.norm", "layers.{i}.norm"),
    Rule(
        "h.{i}.attn.weight",
        ("layers.{i}.q.weight", "layers.{i}.k.weight", "layers.{i}.v.weight"),
        transpose=True,
    ),
    Rule("h.{i}.attn.bias", ("layers.{i}.q.bias", "layers.{i}.k.bias", "layers.{i}.v.bias")),
    Rule("h.{i}.proj", "layers.{i}.out", transpose=True),
    Rule("h.{i}.experts.{e}.w1", "layers.{i}.gate", stack="e"),
    Rule("h.{i}.q_norm", "layers.{i}.q_norm", reshape=True),
    Dropped("h.{i}.attn.mask"),
    Tied("head.weight", "wte.weight"),
)
E, Q, K = 4, 6, 2
N = 11  # more than ten experts: their order is by number, not by spelling


def shapes(layers: int = 2) -> dict[str, Size]:
    sizes: dict[str, tuple[int, ...]] = {"embedding.weight": (7, E)}
    for i in range(layers):
        sizes |= {
            f"layers.{i}.norm": (E,),
            f"layers.{i}.q.weight": (Q, E),
            f"layers.{i}.k.weight": (K, E),
            f"layers.{i}.v.weight": (K, E),
            f"layers.{i}.q.bias": (Q,),
            f"layers.{i}.k.bias": (K,),
            f"layers.{i}.v.bias": (K,),
            f"layers.{i}.out": (E, Q),
            f"layers.{i}.gate": (N, 3, E),
            f"layers.{i}.q_norm": (2, 3),
        }
    return {name: Size(size) for name, size in sizes.items()}


def checkpoint(layers: int = 2) -> dict[str, Tensor]:
    tensors = {"wte.weight": torch.randn(7, E)}
    for i in range(layers):
        tensors |= {
            f"h.{i}.norm": torch.randn(E),
            f"h.{i}.attn.weight": torch.randn(E, Q + 2 * K),
            f"h.{i}.attn.bias": torch.randn(Q + 2 * K),
            f"h.{i}.proj": torch.randn(Q, E),
            f"h.{i}.q_norm": torch.randn(6),
            **{f"h.{i}.experts.{e}.w1": torch.randn(3, E) for e in range(N)},
        }
    return tensors


@pytest.mark.parametrize("layers", [1, 12])
def test_there_and_back_is_bit_identical(layers: int) -> None:
    theirs = checkpoint(layers)
    ours = to_ours(RULES, theirs, shapes(layers))
    assert {name: tensor.shape for name, tensor in ours.items()} == shapes(layers)
    back = to_theirs(RULES, ours)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    assert all(tensor.is_contiguous() for tensor in back.values())
    again = to_ours(RULES, back, shapes(layers))
    assert all(torch.equal(again[name], ours[name]) for name in ours)


def test_each_row_does_what_it_says() -> None:
    theirs = checkpoint()
    ours = to_ours(RULES, theirs, shapes())
    packed = theirs["h.1.attn.weight"]
    assert torch.equal(ours["layers.1.q.weight"], packed[:, :Q].T)
    assert torch.equal(ours["layers.1.k.weight"], packed[:, Q : Q + K].T)
    assert torch.equal(ours["layers.1.v.weight"], packed[:, Q + K :].T)
    assert torch.equal(ours["layers.0.v.bias"], theirs["h.0.attn.bias"][Q + K :])
    assert torch.equal(ours["layers.0.out"], theirs["h.0.proj"].T)
    assert torch.equal(ours["layers.0.gate"][10], theirs["h.0.experts.10.w1"])
    assert torch.equal(ours["layers.0.gate"][2], theirs["h.0.experts.2.w1"])
    assert torch.equal(ours["layers.0.q_norm"].flatten(), theirs["h.0.q_norm"])


def test_what_is_only_renamed_is_not_copied() -> None:
    theirs = checkpoint()
    ours = to_ours(RULES, theirs, shapes())
    for name, from_theirs in (
        ("embedding.weight", "wte.weight"),
        ("layers.0.q.weight", "h.0.attn.weight"),
        ("layers.1.out", "h.1.proj"),
    ):
        assert ours[name].data_ptr() == theirs[from_theirs].data_ptr()


def test_what_repeats_or_holds_nothing_is_read_and_not_written() -> None:
    theirs = checkpoint()
    extra = {"head.weight": theirs["wte.weight"], "h.0.attn.mask": torch.ones(1, 1, 5, 5)}
    ours = to_ours(RULES, {**theirs, **extra}, shapes())
    assert ours.keys() == shapes().keys()
    assert to_theirs(RULES, ours).keys() == theirs.keys()


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in checkpoint().items() if key != name}


BROKEN = [
    (without("h.1.norm"), r"lacks 1 tensor\(s\) .*needs: layers.1.norm; fetch it again"),
    (without("h.0.attn.bias"), r"lacks 3 tensor\(s\).*layers.0.k.bias, layers.0.q.bias"),
    (without("h.0.experts.4.w1"), "h.0.experts.4.w1|layers.0.gate"),
    (without("h.0.experts.10.w1"), "layers.0.gate"),
    (
        without("h.0.experts.4.w1") | {"h.0.experts.11.w1": torch.ones(3, E)},
        "parts of layers.0.gate are numbered 0, 1, 2, 3, 5, .*some are missing",
    ),
    ({}, r"lacks 21 tensor\(s\).* \.\.\.; fetch it again, or take its own"),
    (checkpoint() | {"extra": torch.ones(1)}, r"holds 1 tensor\(s\).*no place for: extra"),
    (checkpoint() | {"h.x.norm": torch.ones(E)}, "no place for: h.x.norm"),
    (checkpoint() | {"h.2.norm": torch.ones(E)}, "no place for: .*2.norm"),
    (checkpoint() | {"h.2.attn.bias": torch.ones(10)}, "h.2.attn.bias"),
    (checkpoint() | {"h.2.q_norm": torch.ones(6)}, "no place for: .*2.q_norm"),
    (checkpoint() | {"h.0.norm": torch.ones(E + 1)}, r"layers.0.norm is \(5,\).*and \(4,\)"),
    (checkpoint() | {"h.0.proj": torch.ones(E, Q)}, r"layers.0.out is \(6, 4\).*and \(4, 6\)"),
    (checkpoint() | {"h.0.attn.bias": torch.ones(9)}, r"attn.bias has 9 rows.*6 \+ 2 \+ 2"),
    (checkpoint() | {"h.0.attn.bias": torch.tensor(1.0)}, "h.0.attn.bias"),
    (checkpoint() | {"h.0.proj": torch.ones(2, 3, 4)}, "layers.0.out|h.0.proj"),
    (checkpoint() | {"h.0.proj": torch.tensor(1.0)}, "layers.0.out"),
    (checkpoint() | {"h.0.q_norm": torch.ones(7)}, "q_norm"),
    (checkpoint() | {"h.0.experts.3.w1": torch.ones(2, E)}, "h.0.experts.3.w1|layers.0.gate"),
    (checkpoint() | {"h.0.experts.11.w1": torch.ones(3, E)}, r"layers.0.gate is \(12, 3, 4\)"),
    (checkpoint() | {"h.00.norm": torch.ones(E)}, "h.00.norm"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("tensors", "words"), BROKEN, ids=[words for _, words in BROKEN])
def test_what_does_not_fit_is_refused_in_one_line(tensors: dict[str, Tensor], words: str) -> None:
    with pytest.raises(FileError, match=words) as caught:
        to_ours(RULES, tensors, shapes())
    assert "\n" not in str(caught.value)


def test_a_tensor_of_ours_that_no_row_writes_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="novelty"):
        to_theirs(RULES, {"novelty": torch.ones(1)})


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_parts_that_follow_one_another_in_every_head(heads: int) -> None:
    """DeBERTa v1's projection: head 0's queries, keys and values, then head 1's."""
    rules = (Rule("in_proj", ("q", "k", "v"), heads=heads),)
    width, model = 2, 5
    theirs = {"in_proj": torch.randn(heads * 3 * width, model)}
    found = to_ours(rules, theirs, dict.fromkeys("qkv", Size((heads * width, model))))
    for head in range(heads):
        for number, name in enumerate("qkv"):
            start = (head * 3 + number) * width
            own = found[name][head * width : (head + 1) * width]
            assert torch.equal(own, theirs["in_proj"][start : start + width])
    assert torch.equal(to_theirs(rules, found)["in_proj"], theirs["in_proj"])
