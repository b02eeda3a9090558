"""Models that learn in the few bits they will be kept in: rounded as `quantize` rounds."""

import copy

import pytest
import torch

import polyhead as ph
from polyhead.compress.formats import FORMATS
from polyhead.errors import ConfigError

from .families import CASES, WORDS

CLOSE = 1e-5


def difference(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", FORMATS)
@torch.no_grad()
def test_a_rounded_model_answers_as_the_quantized_one(name, form):
    model, given = CASES[name].build(), CASES[name].given()
    before, kinds = model(**given), [type(part) for part in model.modules()]
    state = copy.deepcopy(model.state_dict())
    with ph.rounded(model, form):
        found = model(**given)
        inside = model.state_dict()
    expected = ph.quantize(model, form)(**given)
    assert difference(found, expected) <= CLOSE * max(1, expected.abs().max().item())
    assert difference(found, before) > 1e-6
    assert torch.equal(model(**given), before)
    assert [type(part) for part in model.modules()] == kinds
    assert all(torch.equal(value, inside[key]) for key, value in state.items())


@torch.no_grad()
def test_the_tables_and_heads_get_what_they_are_told():
    for name in ("gpt2", "llama", "t5"):
        model, given = CASES[name].build(), CASES[name].given()
        for embeddings in ("none", "int8", "nf4"):
            with ph.rounded(model, "int4", embeddings=embeddings):
                found = model(**given)
            expected = ph.quantize(model, "int4", embeddings=embeddings)(**given)
            assert difference(found, expected) <= CLOSE * max(1, expected.abs().max().item())


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_gradients_are_those_at_the_rounded_weights(name):
    model = CASES[name].build()
    plain = copy.deepcopy(model)
    rounded = ph.quantize(model, "int4").state_dict()
    plain.load_state_dict(rounded)
    plain(WORDS).square().sum().backward()
    with ph.rounded(model, "int4"):
        model(WORDS).square().sum().backward()
    expected = dict(plain.named_parameters())
    for key, weight in model.named_parameters():
        scale = max(1.0, expected[key].grad.abs().max().item())
        assert difference(weight.grad, expected[key].grad) <= 1e-4 * scale


def test_weights_learn_beneath_their_rounding():
    model = CASES["llama"].build()
    weight = model.backbone.layers[0].ffn.up.weight
    before = weight.detach().clone()
    with ph.rounded(model, "int4"):
        rounded = model.backbone.layers[0].ffn.up.weight.detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        model(WORDS).square().mean().backward()
        optimizer.step()
        moved = model.backbone.layers[0].ffn.up.weight
    assert not torch.equal(weight, before)
    assert len(rounded[0].unique()) <= 16
    assert (moved == rounded).float().mean() > 0.9  # so small a step crosses few roundings


def adapted(model):
    ph.add_adapter(model)
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda m: (m, "int5"), "form is 'int5': choose one of nf4"),
        (lambda m: (ph.quantize(m), "int4"), "in few bits is not rounded"),
        (lambda m: (adapted(m), "int4"), "with adapters is not rounded"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(ConfigError, match=said), ph.rounded(*make(CASES["llama"].build())):
        pass
