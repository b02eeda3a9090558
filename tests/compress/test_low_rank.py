"""Two narrow layers in the place of one: the nearest there are, and a model like any other."""

import copy
import json

import pytest
import torch

import polyhead as ph
from polyhead.errors import ConfigError, FileError
from polyhead.models import gguf
from polyhead.nn.low_rank import LowRankLinear

from .families import CASES, WORDS

CLOSE = 2e-5


def difference(a, b):
    return (a - b).abs().max().item()


def narrow(model):
    return {
        name: part
        for name, part in model.backbone.named_modules()
        if isinstance(part, LowRankLinear)
    }


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_every_family_saves_loads_and_merges(tmp_path, name):
    model, given = CASES[name].build(), CASES[name].given()
    before = copy.deepcopy(model.state_dict())
    thin = ph.low_rank(model, rank=4)
    parts, found = narrow(thin), thin(**given)
    assert set(parts) == set(thin.config.ranks)
    assert parts
    assert thin.num_parameters() < model.num_parameters()
    # The same as the old model whose matrices are the products.
    plain = copy.deepcopy(model)
    for key, part in parts.items():
        layer = plain.backbone.get_submodule(key)
        left, values, right = torch.linalg.svd(layer.weight)
        layer.weight.copy_(left[:, :4] @ torch.diag(values[:4]) @ right[:4])
        assert difference(layer.weight, part.weight) <= 1e-5 * values[0]
    expected = plain(**given)
    assert difference(found, expected) <= CLOSE * max(1, expected.abs().max().item())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    thin.save(tmp_path / "thin")
    again = ph.load(tmp_path / "thin", head=thin.head_kind)
    assert again.config == thin.config
    state = again.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in thin.state_dict().items())
    assert difference(again(**given), found) <= CLOSE * max(1, expected.abs().max().item())
    whole = ph.merge_low_rank(again)
    assert not narrow(whole)
    assert whole.num_parameters() == model.num_parameters()
    assert difference(whole(**given), found) <= CLOSE * max(1, expected.abs().max().item())
    whole.save(tmp_path / "whole")
    assert "polyhead_ranks" not in json.loads((tmp_path / "whole" / "config.json").read_text())
    assert difference(ph.load(tmp_path / "whole", head=thin.head_kind)(**given), found) <= 1e-3


def test_what_is_stored_together_with_a_factored_layer_is_kept(tmp_path):
    """GPT-2's files hold q, k and v as one."""
    model = CASES["gpt2"].build()
    thin = ph.low_rank(model, rank=4, targets=("layers.1.attention.k",))
    assert set(narrow(thin)) == {"layers.1.attention.k"}
    thin.save(tmp_path)
    again = ph.load(tmp_path)
    assert torch.equal(again(WORDS), thin(WORDS))
    bare = ph.load(tmp_path, head="none")
    bare.save(tmp_path / "bare")
    assert torch.equal(ph.load(tmp_path / "bare")(WORDS), bare(WORDS))


def test_sizes_are_as_said():
    model = ph.build("llama", **{**CASES["llama"].fields, "d_model": 64, "d_ff": 128}, seed=0)
    kept = narrow(ph.low_rank(model, keep=0.5, targets=("ffn",)))
    for part in kept.values():
        assert part.rank == 64 * 128 // (2 * (64 + 128))
    full = model.backbone.layers[0].ffn.up.weight
    values = torch.linalg.svdvals(full.detach().double()).square()
    for energy in (0.3, 0.6):
        part = narrow(ph.low_rank(model, energy=energy, targets=("layers.0.ffn.up",)))
        (found,) = part.values()
        shares = values.cumsum(0) / values.sum()
        assert shares[found.rank - 1] >= energy > (shares[found.rank - 2] if found.rank > 1 else 0)
    # Where two would be no less than one, one stays.
    most = ph.low_rank(model, rank=33)
    assert set(narrow(most)) == {
        f"layers.{i}.ffn.{n}" for i in (0, 1) for n in ("gate", "up", "down")
    }


@torch.no_grad()
def test_moments_keep_the_answers_to_what_is_read():
    model = CASES["llama"].build()
    moments = ph.second_moments(model, WORDS)
    layer = model.backbone.layers[0].attention.q
    seen = model.backbone.layers[0].attention_norm(model.backbone.embedding(WORDS)).flatten(0, 1)
    assert difference(moments["layers.0.attention.q"], seen.T @ seen / len(seen)) < 1e-5
    plain, weighted = (
        narrow(ph.low_rank(model, rank=8, moments=given))["layers.0.attention.q"]
        for given in (None, moments)
    )
    by_weights = (plain(seen) - layer(seen)).norm()
    by_answers = (weighted(seen) - layer(seen)).norm()
    assert by_answers < 0.8 * by_weights
    assert (plain.weight - layer.weight).norm() < (weighted.weight - layer.weight).norm()
    # Of all matrices of this rank there is none whose answers are nearer: the tail of X Wᵀ.
    tail = torch.linalg.svdvals(layer(seen))[8:].norm()
    assert by_answers <= tail * 1.05 + 1e-4


def test_a_thin_model_learns_is_pruned_and_kept_in_few_bits(tmp_path):
    thin = ph.low_rank(CASES["llama"].build(), keep=0.5)
    thin(WORDS).square().mean().backward()
    assert all(part.first.weight.grad.abs().sum() > 0 for part in narrow(thin).values())
    assert ph.sparsity(ph.prune(thin, 0.5)).share == pytest.approx(0.5, abs=0.01)
    few = ph.quantize(thin, "int8")
    assert difference(few(WORDS), thin(WORDS)) < 0.5
    few.save(tmp_path)
    assert difference(ph.load(tmp_path)(WORDS), few(WORDS)) < 1e-4
    caches = thin.backbone.make_caches(2)
    first = thin.head(thin.backbone(WORDS[:, :4], caches=caches))
    assert difference(first, thin(WORDS[:, :4])) < 1e-4


def broken(tmp_path, ranks):
    ph.low_rank(CASES["llama"].build(), rank=4).save(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**data, "polyhead_ranks": ranks}))
    return ph.load(tmp_path)


def in_gguf(model, tmp_path):
    gguf.write(tmp_path / "thin.gguf", model.hf_config(), model.hf_tensors())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda m, p: ph.low_rank(m), "by one of rank, keep and energy"),
        (lambda m, p: ph.low_rank(m, rank=4, keep=0.5), "by one of rank, keep and energy"),
        (lambda m, p: ph.low_rank(m, rank=0), "rank is 0"),
        (lambda m, p: ph.low_rank(m, keep=1.0), "keep is 1.0: a share between 0 and 1"),
        (lambda m, p: ph.low_rank(m, rank=1000), "no layer would be smaller"),
        (lambda m, p: ph.low_rank(m, rank=4, targets=("nose",)), "targets names 'nose'"),
        (lambda m, p: ph.low_rank(m, rank=4, targets=("embedding",)), "no linear layers to factor"),
        (lambda m, p: ph.low_rank(ph.quantize(m), rank=4), "in few bits is not factored"),
        (lambda m, p: ph.low_rank(ph.low_rank(m, rank=4), rank=2), "of low rank already"),
        (lambda m, p: ph.low_rank(m, rank=4, moments={}), "moments do not speak of layers.0"),
        (lambda m, p: ph.second_moments(m, []), "of no batch"),
        (lambda m, p: ph.merge_low_rank(m), "no layers of low rank"),
        (lambda m, p: ph.shrink(ph.low_rank(m, rank=4), heads=0.3), "of low rank is not made"),
        (lambda m, p: broken(p, {"layers.0.nose": 3}), "ranks names 'layers.0.nose'"),
        (lambda m, p: broken(p, {"layers.0.ffn.up": 99}), "the rank of layers.0.ffn.up is 99"),
        (lambda m, p: broken(p, {"layers.0.ffn.up": 4}), "the checkpoint holds"),
        (lambda m, p: broken(p, 7), "ranks is 7"),
        (lambda m, p: in_gguf(ph.low_rank(m, rank=4), p), "GGUF has no layers of low rank"),
        (lambda m, p: ph.add_adapter(ph.low_rank(m, rank=4)), "no linear layer of llama is called"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(tmp_path, make, said):
    with pytest.raises((ConfigError, FileError), match=said) as error:
        make(CASES["llama"].build(), tmp_path)
    assert "\n" not in str(error.value)
