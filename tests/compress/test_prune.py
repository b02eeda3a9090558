"""Zeros where magnitudes are least: exactly as many as asked, in the matrices asked for."""

import pytest
import torch
from torch.nn.utils import prune as torchs

import polyhead as ph
from polyhead.compress.prune import prunable
from polyhead.errors import ConfigError

from .test_quantize import answer, made

LANGUAGE = ["llama", "llama-tied", "gpt2", "mixtral", "bert", "albert", "deberta-v2", "t5"]
VISION = {
    "vit": dict(image_size=16, patch_size=4, d_model=32, d_ff=48, num_layers=2, num_heads=2),
    "swin": dict(depths=(1, 1), num_heads=(2, 4), d_model=16, image_size=16, patch_size=2,
                 window=4),
}  # fmt: skip


def model_of(name):
    return ph.build(name, seed=0, **VISION[name]).eval() if name in VISION else made(name)


@pytest.mark.parametrize("by", ["layer", "global", "2:4"])
@pytest.mark.parametrize("name", [*LANGUAGE, *VISION])
def test_a_pruned_copy_has_the_zeros_asked_for_and_saves_as_a_model(tmp_path, name, by):
    model = model_of(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    thin = ph.prune(model, 0.5, by=by)
    found = ph.sparsity(thin)
    assert found.share == pytest.approx(0.5, abs=1e-4)
    if by != "global":
        assert all(share == pytest.approx(0.5, abs=1e-3) for share in found.matrices.values())
    chosen = set(prunable(model))
    assert not any(
        word in key for key in chosen for word in ("embedding", "norm", "head", "router")
    )
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
        pruned = thin.state_dict()[key]
        stays = pruned != 0 if key in chosen else torch.ones_like(pruned, dtype=torch.bool)
        assert torch.equal(pruned[stays], value[stays])
    thin.save(tmp_path)
    again = ph.load(tmp_path, head=thin.head_kind)
    assert ph.sparsity(again) == found
    given = () if name in VISION else (answer(thin), answer(again))
    assert not given or torch.equal(*given)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.71])
def test_the_masks_are_torchs(share):
    model = made("llama")
    layers = [(part, "weight") for part in model.modules() if type(part) is torch.nn.Linear]
    inside = prunable(model)
    assert len(layers) == len(inside)
    thin, wide = ph.prune(model, share), ph.prune(model, share, by="global")
    for (name, weight), (part, _) in zip(inside.items(), layers, strict=True):
        assert weight is part.weight
        mask = torchs.L1Unstructured(share).compute_mask(weight, torch.ones_like(weight))
        assert torch.equal(thin.get_parameter(name), weight * mask)
    torchs.global_unstructured(layers, torchs.L1Unstructured, amount=share)
    for name, (part, _) in zip(inside, layers, strict=True):
        assert torch.equal(wide.get_parameter(name), part.weight)


def test_each_expert_loses_its_share():
    model = made("mixtral")
    with torch.no_grad():
        model.backbone.layers[0].ffn.experts.up[0] *= 100
    thin = ph.prune(model, 0.25)
    experts = thin.backbone.layers[0].ffn.experts
    for weight in (experts.gate, experts.up, experts.down):
        zeros = (weight == 0).flatten(1).float().mean(1)
        assert torch.equal(zeros, torch.full((4,), 0.25))
    by_all = ph.prune(model, 0.25, by="global").backbone.layers[0].ffn.experts.up
    assert (by_all[0] == 0).sum() < (by_all[1] == 0).sum() / 10


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_two_of_every_four_stay_and_they_are_the_larger(name):
    model = made(name)
    thin = ph.prune(model, by="2:4")
    for key, weight in prunable(model).items():
        fours = weight.abs().unflatten(-1, (-1, 4))
        left = thin.get_parameter(key).unflatten(-1, (-1, 4)) != 0
        assert (left.sum(-1) == 2).all()
        assert (fours.where(left, torch.inf).amin(-1) >= fours.where(~left, 0).amax(-1)).all()


def test_targets_are_parts_of_names():
    model = made("llama")
    thin = ph.prune(model, 0.5, targets=("ffn", "embedding"))
    found = ph.sparsity(thin, ("",)).matrices
    assert {name for name, share in found.items() if share} == {
        name for name in found if "ffn" in name or "embedding" in name
    }
    assert ph.sparsity(thin, ("attention",)).zeros == 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda m: ph.prune(m, 1.0), "sparsity is 1.0: a share from 0 to below 1"),
        (lambda m: ph.prune(m, float("nan")), "sparsity is nan"),
        (lambda m: ph.prune(m, 0.3, by="2:4"), "by 2:4 it is 0.5"),
        (lambda m: ph.prune(m, by="rows"), "pruning is by 'rows': choose one of layer, global"),
        (lambda m: ph.prune(m, targets=("nose",)), "targets names 'nose'"),
        (lambda m: ph.prune(ph.quantize(m)), "in few bits is not pruned"),
        (lambda m: (ph.add_adapter(m), ph.prune(m)), "with adapters is not pruned"),
        (lambda m: ph.prune(made("odd"), by="2:4"), "50 columns, which 2:4 cannot divide"),
        (lambda m: ph.prune(ph.build("bigram", vocab_size=9)), "no matrices in blocks"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(ConfigError, match=said) as error:
        make(made("llama"))
    assert "\n" not in str(error.value)
