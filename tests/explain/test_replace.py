"""What layers go on with is replaced: heads knocked out, runs patched together, neurons scaled."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.nn.parts import shaken

import polyhead as ph
from polyhead.explain.replace import scaled, steered, without

SIZES = dict(vocab_size=31, d_model=16, d_ff=24, num_layers=3, num_heads=4)
DECODERS = {
    "llama": dict(num_kv_heads=2, max_seq_len=32),
    "gpt2": dict(max_seq_len=32),
    "mixtral": dict(num_experts=4, top_k=2, num_kv_heads=2, max_seq_len=32),
}
IDS = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(0))
OTHER = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(1))
EVERYTHING = ("weights", "scores", "heads", "attention_out", "ffn_out", "residual", "residual_in")


def made(family: str, **options: Any) -> Any:
    return shaken(
        ph.build(family, seed=0, **{**SIZES, **DECODERS[family], **options}), 0.3, 0
    ).eval()


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("what", EVERYTHING)
@pytest.mark.parametrize("family", DECODERS)
def test_what_was_computed_put_back_changes_nothing(family: str, what: str) -> None:
    model = made(family)
    plain = model(IDS)
    with ph.capture(model, "*", what) as seen:
        model(IDS)
    with ph.replace(model, "*", what, seen):
        torch.testing.assert_close(model(IDS), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("what", ["residual", "residual_in"])
@pytest.mark.parametrize("family", DECODERS)
def test_patching_every_state_gives_the_other_run(family: str, what: str) -> None:
    model = made(family)
    other = model(OTHER)
    with ph.capture(model, "*", what) as seen:
        model(OTHER)
    assert not torch.allclose(model(IDS), other, atol=1e-3)
    with ph.replace(model, "*", what, seen):
        torch.testing.assert_close(model(IDS), other, atol=1e-5, rtol=1e-5)
    last = list(seen)[-1]
    with ph.replace(model, last, what, {last: seen[last]}):
        torch.testing.assert_close(model(IDS), other, atol=1e-5, rtol=1e-5)


def test_one_position_patched_is_that_position_s() -> None:
    model = made("llama")
    with ph.capture(model, "layers.1", "residual") as seen:
        model(OTHER)
    theirs = seen["backbone.layers.1"]

    def patch(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :4], theirs[:, 4:5], x[:, 5:]], 1)

    plain = model(IDS)
    with ph.replace(model, "layers.1", "residual", patch):
        patched = model(IDS)
    assert torch.equal(patched[:, :4], plain[:, :4])
    assert not torch.allclose(patched[:, 4], plain[:, 4], atol=1e-3)


@pytest.mark.parametrize("family", DECODERS)
def test_a_head_knocked_out_writes_nothing(family: str) -> None:
    model, cut = made(family), made(family)
    width = cut.backbone.layers[1].attention.head_dim
    cut.backbone.layers[1].attention.out.weight[:, 2 * width : 3 * width] = 0.0
    cut.backbone.layers[2].attention.out.weight[:, :width] = 0.0
    plain = model(IDS)
    for heads in ([(1, 2), (2, 0)], [("layers.1", 2), (-1, 0)]):
        with ph.knock_out(model, heads):
            torch.testing.assert_close(model(IDS), cut(IDS), atol=1e-5, rtol=1e-5)
    assert torch.equal(model(IDS), plain)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_neuron_scaled_is_one_with_another_weight(family: str) -> None:
    model, other = made(family), made(family)
    other.backbone.layers[1].ffn.down.weight[:, [3, 20]] *= 2.5
    with ph.replace(model, "layers.1", "neurons", scaled([3, 20], 2.5)):
        torch.testing.assert_close(model(IDS), other(IDS), atol=1e-5, rtol=1e-5)
    other.backbone.layers[1].ffn.down.weight[:, [3, 20]] = 0.0
    with ph.replace(model, "layers.1", "neurons", without([3, 20])):
        torch.testing.assert_close(model(IDS), other(IDS), atol=1e-5, rtol=1e-5)


def test_a_vector_steers() -> None:
    model, other = made("gpt2"), made("gpt2")
    vector = torch.randn(16)
    other.backbone.layers[0].ffn.down.bias += 3 * vector
    with ph.replace(model, "layers.0", "residual", steered(vector, 3.0)):
        torch.testing.assert_close(model(IDS), other(IDS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("queries", lambda x: 0 * x),
        ("keys", lambda x: 0 * x),
        ("scores", lambda x: torch.where(x.isfinite(), 0.0, x)),
        ("weights", lambda x: (x > 0) / (x > 0).sum(-1, keepdim=True)),
    ],
)
def test_four_ways_to_look_at_all_alike(what: str, change: Callable[..., torch.Tensor]) -> None:
    model = made("llama")
    with ph.replace(model, "layers.1", what, change), ph.capture(model, "layers.1") as seen:
        model(IDS)
    (weights,) = seen.values()
    expected = torch.ones(9, 9).tril() / torch.arange(1, 10)[:, None]
    torch.testing.assert_close(weights, expected.expand_as(weights), atol=1e-6, rtol=0.0)


def test_routing_can_be_sent_to_one_expert() -> None:
    model = made("mixtral", top_k=1)
    with (
        ph.replace(model, "layers.1", "routing", torch.tensor([0.0, 0.0, 9.0, 0.0])),
        ph.capture(model, "layers.1", "routing") as seen,
        ph.capture(model, "layers.1", "ffn_out") as written,
    ):
        model(IDS)
    assert [x.shape for x in seen.values()] == [(2, 9, 4)]
    with ph.capture(model, "layers.1", ("attention_out", "residual_in")) as before:
        model(IDS)
    block = model.backbone.layers[1]
    (a,), (x,) = (found.values() for found in before.values())
    counts = torch.tensor([0, 0, 18, 0])
    tokens = block.ffn_norm(x + a).flatten(0, 1)
    expected = block.ffn.experts(tokens, counts).view(2, 9, 16)
    torch.testing.assert_close(*written.values(), expected, atol=1e-5, rtol=1e-5)


def test_of_a_layer_that_serves_all_depths_one_run_is_changed() -> None:
    model = shaken(
        ph.build("albert", seed=0, embedding_width=8, **SIZES, max_seq_len=32), 0.3, 0
    ).eval()
    with ph.capture(model, "*", "residual") as seen:
        plain = model(IDS)
    assert list(seen) == [f"backbone.layers.0.0{at}" for at in ("", "@1", "@2")]
    with ph.capture(model, "layers.0.0@1", "residual") as one:
        model(IDS)
    assert list(one) == ["backbone.layers.0.0@1"]
    with ph.replace(model, "layers.0.0@2", "residual", lambda x: 0 * x):
        assert not torch.allclose(model(IDS), plain, atol=1e-3)
        with ph.capture(model, "*", "residual") as again:
            model(IDS)
    assert torch.equal(again["backbone.layers.0.0@1"], seen["backbone.layers.0.0@1"])
    assert again["backbone.layers.0.0@2"].eq(0).all()


REFUSED = {
    "another shape": (
        lambda model: ph.replace(model, "layers.1", "residual", torch.zeros(3)),
        r"residual of backbone\.layers\.1 are \[2, 9, 16\].* is \[3\]",
    ),
    "no such layer": (
        lambda model: ph.replace(model, "layers.9", "residual", torch.zeros(16)),
        r"no block is called 'layers\.9'; residual can be seen of backbone\.layers\.\{0-2\}",
    ),
    "other places": (
        lambda model: ph.replace(model, "layers.1", "heads", {"backbone.layers.2": IDS}),
        "capture and replace the same places",
    ),
    "no such head": (lambda model: ph.knock_out(model, [(1, 4)]), "head 4 of .* which has 4"),
    "no such number": (lambda model: ph.knock_out(model, [(3, 0)]), "layer 3 of 3 attentions"),
    "several": (lambda model: ph.knock_out(model, [("layers", 0)]), "names 3 attentions"),
    "no such neuron": (
        lambda model: ph.replace(model, "layers.1", "neurons", without([24])),
        r"\[24\] of 24",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    change, message = REFUSED[name]
    model = made("llama")
    plain = model(IDS)
    with pytest.raises(ph.ConfigError, match=message), change(model):
        model(IDS)
    assert torch.equal(model(IDS), plain)
