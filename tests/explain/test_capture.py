"""What layers compute, seen from outside."""

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tests.nn.parts import shaken

import polyhead as ph
from polyhead.explain import attention, room
from polyhead.explain.places import KINDS
from polyhead.explain.reduce import Top
from polyhead.nn.attention import MultiHeadAttention

SIZES = dict(vocab_size=31, d_model=16, d_ff=24, num_layers=3, num_heads=4, max_seq_len=32)
SMALL: dict[str, Any] = dict(vocab_size=31, d_model=16, d_ff=24, num_layers=2, num_heads=2)
IDS = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(0))
CLOSE = dict(atol=1e-5, rtol=1e-5)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def model() -> Any:
    return shaken(ph.build("llama", seed=0, num_kv_heads=2, **SIZES), 0.2, 0).eval()


def seq2seq(**options: Any) -> Any:
    sizes = {**SMALL, "kind": "encoder-decoder", "max_seq_len": 32, **options}
    return shaken(ph.build("transformer", seed=0, **sizes), 0.3, 0).eval()


def test_weights_of_the_named_layer_and_no_other(model) -> None:
    plain = model(IDS)
    with ph.capture(model, "layers.1") as seen:
        watched = model(IDS)
    assert list(seen) == ["backbone.layers.1.attention"]
    weights = seen["backbone.layers.1.attention"]
    assert weights.shape == (2, 4, 9, 9)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 9), atol=1e-5)
    assert weights.triu(1).abs().max() == 0
    assert torch.allclose(plain, watched, atol=1e-5)


def test_several_things_at_once(model) -> None:
    with ph.capture(model, "*.layers.[01]*", ("queries", "keys", "neurons")) as seen:
        model(IDS)
    shapes = {what: {tuple(x.shape) for x in found.values()} for what, found in seen.items()}
    assert shapes == {
        "queries": {(2, 4, 9, 4)}, "keys": {(2, 2, 9, 4)}, "neurons": {(2, 9, 24)},
    }  # fmt: skip
    assert list(seen["neurons"]) == ["backbone.layers.0.ffn", "backbone.layers.1.ffn"]


def test_patterns_and_a_function(model) -> None:
    with ph.capture(model, "*.layers.[01].*", reduce=lambda w: w.mean(1)) as seen:
        model(IDS)
    assert sorted(seen) == ["backbone.layers.0.attention", "backbone.layers.1.attention"]
    assert all(w.shape == (2, 9, 9) for w in seen.values())


REDUCED: dict[str, Callable[[torch.Tensor], Any]] = {
    "mean": lambda w: w.mean(1),
    "entropy": lambda w: -(w * w.clamp_min(1e-30).log()).sum(-1),
    "received": lambda w: w.sum(2),
    "top-3": lambda w: w.topk(3).values,
    "top-50": lambda w: w.topk(9).values,
}


@pytest.mark.parametrize("at_once", [1, 160, 2**22])
@pytest.mark.parametrize("how", REDUCED)
def test_reduced_some_queries_at_a_time(model, how: str, at_once: int) -> None:
    keep = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    with ph.capture(model) as whole:
        plain = model(IDS, keep)
    with (
        patch.multiple(attention, _AT_ONCE=at_once, _FEWEST=1),
        ph.capture(model, reduce=how) as seen,
    ):
        looked = model(IDS, keep)
    torch.testing.assert_close(looked, plain, **CLOSE)
    assert list(seen) == list(whole)
    for name, kept in seen.items():
        values = kept.values if isinstance(kept, Top) else kept
        torch.testing.assert_close(values, REDUCED[how](whole[name]), **CLOSE)
        if isinstance(kept, Top):
            torch.testing.assert_close(whole[name].gather(-1, kept.indices), values)


@pytest.mark.parametrize("what", ["weights", "scores"])
def test_whole_ones_are_made_piece_by_piece_all_the_same(model, what: str) -> None:
    with ph.capture(model, what=what) as whole:
        model(IDS)
    with patch.multiple(attention, _AT_ONCE=160, _FEWEST=1), ph.capture(model, what=what) as seen:
        model(IDS)
    for name, weights in whole.items():
        torch.testing.assert_close(seen[name], weights, **CLOSE)
    with (
        patch.multiple(attention, _AT_ONCE=160, _FEWEST=1),
        ph.replace(model, "layers.1", what, {n: 0 * w for n, w in whole.items()}),
        ph.capture(model, "layers.1", what) as seen,
    ):
        model(IDS)
    (weights,) = seen.values()
    assert weights.nan_to_num().eq(0).all()


def test_long_weights_are_never_whole(model) -> None:
    sizes: list[int] = []
    reduce = attention._Stage.weights

    def note(probe: Any, weights: torch.Tensor) -> torch.Tensor:
        sizes.append(weights.shape[2])
        return reduce(probe, weights)

    ids = torch.randint(0, 31, (1, 32))
    with (
        patch.multiple(attention, _AT_ONCE=4 * 32 * 5, _FEWEST=1),
        patch.object(attention._Stage, "weights", note),
        ph.capture(model, "layers.0", reduce="entropy") as seen,
    ):
        model(ids)
    assert sizes == [5] * 6 + [2]
    assert [x.shape for x in seen.values()] == [(1, 4, 32)]


def test_nothing_stays_behind_even_after_an_error(model) -> None:
    with pytest.raises(RuntimeError), ph.capture(model, "*", tuple(KINDS)[:10]):
        raise RuntimeError
    for part in model.modules():
        assert not {**part._forward_hooks, **part._forward_pre_hooks}
        assert not isinstance(part, MultiHeadAttention) or not part.probes


def test_captures_within_each_other(model) -> None:
    with ph.capture(model, "layers.0") as outer:
        with ph.capture(model, "layers.0", "weights", reduce="mean") as inner:
            model(IDS)
        model(IDS[:, :4])
    (weights,), (mean,) = outer.values(), inner.values()
    assert (weights.shape, mean.shape) == ((2, 4, 4, 4), (2, 9, 9))


def test_what_is_kept_for_gradients(model) -> None:
    with torch.enable_grad(), ph.capture(model, "layers.0", graph=True) as seen:
        loss = model(IDS).square().sum()
        (weights,) = seen.values()
        (gradient,) = torch.autograd.grad(loss, weights)
    assert gradient.abs().max() > 0


def test_each_step_of_a_generation(model) -> None:
    tokenizer = None
    prompt = IDS[0, :5].tolist()
    config = ph.GenerationConfig(max_new_tokens=6, temperature=0)
    plain = ph.TextGenerator(model, tokenizer).generate([prompt], config)[0].token_ids
    with ph.capture_steps(model, "layers.1", ("weights", "residual")) as steps:
        written = ph.TextGenerator(model, tokenizer).generate([prompt], config)[0].token_ids
    assert written == plain
    with ph.capture(model, "layers.1") as whole:
        model(torch.tensor([[*prompt, *written]]))
    (weights,) = whole.values()
    assert len(steps) == 6
    begin = 0
    for step in steps:
        ((seen,), (state,)) = (found.values() for found in step.values())
        end = begin + seen.shape[2]
        assert (state.shape, seen.shape[3]) == ((1, end - begin, 16), end)
        torch.testing.assert_close(seen[0], weights[0, :, begin:end, :end], **CLOSE)
        begin = end
    assert begin == 10


def test_each_step_of_a_translation() -> None:
    model = seq2seq()
    memory, caches = model.backbone.encode(IDS), model.backbone.make_caches(2)
    targets = IDS[:, :4]
    with ph.capture(model, "cross") as whole:
        model(IDS, targets)
    with ph.capture_steps(model, "cross") as steps:
        for at in range(4):
            model.backbone.decode(targets[:, at : at + 1], memory, caches=caches)
    assert len(steps) == 4
    for name, weights in whole.items():
        assert name.endswith("cross")
        together = torch.cat([step[name] for step in steps], 2)
        torch.testing.assert_close(together, weights, **CLOSE)


def test_rows_that_share_a_memory_have_weights_of_their_own() -> None:
    model = seq2seq()
    layer = model.backbone.decoder.layers[0].cross
    x, memory = torch.randn(6, 1, 16), torch.randn(2, 7, 16)
    mask = ph.Mask(keep=torch.arange(7) < torch.tensor([[7], [4]]))
    from polyhead.nn.cache import CrossCache

    cache = CrossCache()
    layer(x[:2], memory, mask, cache=cache)
    plain = layer(x, memory, mask, cache=cache)
    with ph.capture(layer, "", "weights") as seen:
        looked = layer(x, memory, mask, cache=cache)
    torch.testing.assert_close(looked, plain, **CLOSE)
    (weights,) = seen.values()
    assert weights.shape == (6, 2, 1, 7)
    assert weights[3:, :, :, 4:].eq(0).all()
    assert weights[:3, :, :, 4:].gt(0).all()


def test_a_later_step_changes_nothing_that_was_kept(model) -> None:
    caches = model.backbone.make_caches(2, 16)
    with ph.capture_steps(model, "layers.0", ("keys", "values")) as steps:
        model(IDS, caches=caches)
        model(IDS[:, :1], caches=caches)
    before, after = (step["keys"]["backbone.layers.0.attention"] for step in steps)
    assert before[:, :, 9].eq(0).all()
    assert after[:, :, 9].ne(0).any()


@pytest.mark.parametrize("bits", [None, "int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_packed_models_are_seen_alike(family: str, bits: str | None) -> None:
    sizes = {**SIZES, "d_model": 64, "d_ff": 96}
    plain = shaken(ph.build(family, seed=0, **sizes), 0.05, 0).eval()
    model = plain if bits is None else ph.quantize(plain, bits)
    packed, near = ph.pack(model), dict(atol=2e-2 if bits else 1e-4, rtol=1e-2)
    whats = ("weights", "heads", "neurons", "residual", "attention_out", "values")
    with ph.capture(packed, what=whats) as seen:
        looked = packed(IDS)
    with ph.capture(model, what=whats) as expected:
        model(IDS)
    for what in whats:
        for name, x in expected[what].items():
            torch.testing.assert_close(seen[what][name], x, **near)
    torch.testing.assert_close(packed(IDS), looked, **near)


def test_weights_that_do_not_fit_are_refused_before_they_are_made(model) -> None:
    wide = ph.build("llama", seed=0, **{**SIZES, "max_seq_len": 9000}).eval()
    ids = torch.zeros(1, 8192, dtype=torch.long)
    with (
        patch.object(room, "_of_machine", lambda: 2**29),
        pytest.raises(
            ph.ConfigError, match=r"weights of one layer .* 1\.0 GiB and 512\.0 MiB .*top-5"
        ),
        ph.capture(wide, "layers.2"),
    ):
        wide(ids)


def test_what_is_kept_of_many_layers_must_fit(model) -> None:
    with (
        patch.object(room, "_of_machine", lambda: 2**12),
        patch("polyhead.explain.capture._LITTLE", 0),
        pytest.raises(ph.ConfigError, match=r"keeping the weights of 3 places .* 5\.1 KiB"),
        ph.capture(model),
    ):
        model(IDS)


REFUSED: dict[str, tuple[str, Any, str]] = {
    "layer": ("layers.7", "weights", r"no attention is called 'layers\.7'; weights can be seen of "
              r"backbone\.layers\.\{0-2\}\.attention"),
    "cross": ("cross", "weights", "no attention is called 'cross'"),
    "place": ("embedding", "weights", r"backbone\.embedding \(TokenEmbedding\) has no attention"),
    "what": ("*", "attentions", "what is 'attentions'; choose of weights, scores"),
    "nothing": ("*", (), "what is empty"),
    "experts": ("*", "routing", "this model has no mixture of experts, so no routing can be seen"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(model, name: str) -> None:
    where, what, message = REFUSED[name]
    with pytest.raises(ph.ConfigError, match=message), ph.capture(model, where, what):
        model(IDS)


@pytest.mark.parametrize("how", ["median", "top-", "top-0", "top-x"])
def test_unknown_reductions(model, how: str) -> None:
    with (
        pytest.raises(ph.ConfigError, match=r"reduce is|keeps nothing"),
        ph.capture(model, reduce=how),
    ):
        pass


def test_a_model_without_attention_says_so() -> None:
    model = ph.build("lstm", vocab_size=31, d_model=16, num_layers=1)
    with pytest.raises(ph.ConfigError, match="has no attention"), ph.capture(model):
        pass
