"""Rounding by what layers read: nearer to the floats' answers than rounding to the nearest."""

from typing import Any

import pytest
import torch
from tests.compress.test_saved import FAMILIES, answer, made
from torch import Tensor, nn

import polyhead as ph
from polyhead.compress import awq
from polyhead.compress.calibrate import Walk
from polyhead.compress.formats import Int4, Int8, Stepped
from polyhead.compress.gptq import rounded
from polyhead.compress.layers import PackedExperts, PackedLayer
from polyhead.compress.steps import Grid, fitted, rounded_inputs
from polyhead.errors import ConfigError
from polyhead.models.model import TaskModel
from polyhead.nn.feedforward import GatedFeedForward
from polyhead.nn.moe import Experts

Inputs = tuple[Tensor, Tensor]


def problem(rows: int = 24, width: int = 96) -> Inputs:
    """A weight, and the mean square of inputs whose columns hang together and differ in size."""
    torch.manual_seed(0)
    x = torch.randn(2000, width) @ torch.randn(width, width) * torch.logspace(-1, 1, width)
    return torch.randn(rows, width), x.mT @ x / len(x)


def lost(found: Tensor, weight: Tensor, squares: Tensor) -> float:
    """The mean square of what the products differ by, as a share."""
    off = found - weight
    return float((off @ squares * off).sum() / (weight @ squares * weight).sum())


@pytest.mark.parametrize("form", [Int4, Int8])
@pytest.mark.parametrize("group", [32, 64])
def test_each_step_loses_less(form: type[Stepped], group: int) -> None:
    weight, squares = problem(width=128)
    grid = Grid(form, group)
    plain = lost(form(weight, group).unpack(), weight, squares)
    chosen = grid.pack([grid.nearest(weight, squares.diagonal())], weight.dtype)
    corrected = grid.pack([rounded(weight, squares, grid)], weight.dtype)
    assert lost(chosen.unpack(), weight, squares) < plain * (0.95 if form is Int4 else 1.001)
    assert lost(corrected.unpack(), weight, squares) < plain * 0.5
    assert corrected.group == group


def test_one_column_after_the_other_is_the_papers_equation() -> None:
    """Equations 2 and 3 of the paper, each by an inverse of its own, of a small matrix."""
    weight, squares = problem(rows=3, width=32)
    (values, steps), order = rounded(weight, squares, Grid(Int4, 32)), squares.diagonal().argsort()
    own = tuple(part.float() for part in steps)
    hessian = squares.double()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(32)
    left, expected = order.flip(0).tolist(), weight.double().clone()
    while left:
        inverse = hessian[left][:, left].inverse()
        column = expected[:, left[0]].clone()
        nearest = Int4.values(Int4.nearest(column.float()[:, None], *own), *own)[:, 0].double()
        error = (column - nearest) / inverse[0, 0]
        expected[:, left] -= error[:, None] * inverse[0]
        expected[:, left[0]] = nearest
        left = left[1:]
    assert torch.allclose(values.double(), expected, atol=1e-4)


def test_what_lies_on_the_grid_stays() -> None:
    _, squares = problem()
    weight = Int4(torch.randn(24, 96)).unpack()
    grid = Grid(Int4, 32)
    for parts in (rounded(weight, squares, grid), grid.nearest(weight, squares.diagonal())):
        assert torch.allclose(grid.pack([parts], weight.dtype).unpack(), weight, atol=2e-3)


def test_columns_that_nothing_reads_are_rounded() -> None:
    weight, squares = problem()
    squares[:40] = squares[:, :40] = 0.0
    values, _ = rounded(weight, squares, Grid(Int4, 32))
    assert values.isfinite().all()
    assert (values - weight)[:, :32].abs().max() < 0.3  # the rest share steps with what is read
    values, _ = rounded(weight, torch.zeros(96, 96), Grid(Int4, 32))
    assert (values - weight).abs().mean() < 0.1


def test_steps_mind_the_columns_that_matter() -> None:
    weight = torch.randn(8, 32)
    weight[:, 0] = 30.0  # an outlier that nobody reads
    importance = torch.ones(32).index_fill_(0, torch.tensor([0]), 0.0)
    found = Int4(weight, steps=fitted(Int4, weight, 32, importance)).unpack()
    plain = Int4(weight).unpack()
    off = [(each - weight)[:, 1:].norm() for each in (found, plain)]
    assert off[0] < 0.9 * off[1]


def batches(model: TaskModel) -> list[Any]:
    torch.manual_seed(1)
    kind = getattr(model.config, "kind", "decoder")
    if kind == "vision":
        return [{"pixel_values": torch.randn(4, 3, 32, 32)} for _ in range(3)]
    found = [torch.randint(5, 70, (4, 24)) for _ in range(3)]
    if kind == "encoder-decoder":
        return [{"input_ids": ids, "decoder_input_ids": ids.flip(1)} for ids in found]
    return found


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("name", [*FAMILIES])
def test_every_family(name: str, method: str) -> None:
    """All is packed, the old model is as it was, and answers are nearer than by rounding."""
    model = made(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    told: list[tuple[int, int]] = []
    given = batches(model)
    found = ph.quantize(
        model, "int4", method=method, calibration=given, embeddings="none",
        progress=lambda *at: told.append(at),
    )  # fmt: skip
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert not any(type(part) in (nn.Linear, Experts) for part in found.backbone.modules())
    assert not any("forward" in vars(part) for part in found.modules())
    tuned = len(given) if method == "gptq" and name not in ("lstm", "bigram") else 0
    blocks = len(told) - tuned
    assert told == [(at + 1, total) for total in (blocks, tuned) for at in range(total)]
    plain = ph.quantize(model, "int4", embeddings="none")
    whole, near, far = (read(each, given) for each in (model, found, plain))
    share = 1.0 if method == "gptq" else 1.1
    if name in ("lstm", "bigram"):  # which have nothing to gather inputs of
        return
    assert (near - whole).norm() < share * (far - whole).norm()
    assert not torch.equal(near, far)


def read(model: TaskModel, given: list[Any]) -> Tensor:
    """What a model's backbone answers to batches."""
    with torch.inference_mode():
        one = [model.hidden(each) if isinstance(each, Tensor) else model.hidden(**each)
               for each in given]  # fmt: skip
    return torch.cat([each.flatten() for each in one])


def test_inputs_are_those_of_the_layers_before_in_few_bits() -> None:
    """The second block reads what the first answers in four bits, though that ran only once."""
    model = made("llama")
    given = batches(model)
    found = ph.quantize(model, "int4", method="gptq", calibration=given, embeddings="none")
    walk = Walk(model, given, [part for part in model.modules() if isinstance(part, nn.Linear)])
    second: Any = found.backbone.layers[1]  # pyright: ignore[reportIndexIssue]
    seen: list[Tensor] = []
    hook = second.attention.q.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    read(found, given)
    hook.remove()
    x = torch.cat([each.flatten(0, 1) for each in seen])
    unit = walk.units[1]
    (floats,) = walk.gather(unit, unit.groups[:1])
    model.backbone.layers[0] = found.backbone.layers[0]  # pyright: ignore[reportIndexIssue]
    (packed,) = walk.gather(unit, unit.groups[:1])
    assert torch.allclose(packed.squares, x.mT @ x / len(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(floats.squares, packed.squares, rtol=1e-4, atol=1e-5)
    assert torch.allclose(packed.sizes, x.abs().mean(0), rtol=1e-4)


def test_experts_read_their_own_tokens() -> None:
    model = made("mixtral")
    ids = batches(model)[0]
    experts = next(part for part in model.modules() if isinstance(part, Experts))
    walk = Walk(model, [ids, ids], [experts])
    (unit,) = walk.units
    seen: list[tuple[Tensor, Tensor]] = []
    hook = experts.register_forward_pre_hook(lambda m, args: seen.append(args))
    read(model, [ids])
    hook.remove()
    wide, narrow = walk.gather(unit, unit.groups)
    x, counts = seen[0]
    assert torch.equal(wide.count, 2 * counts.float())
    own = x.split(counts.tolist())[2]
    assert torch.allclose(wide.squares[2], own.mT @ own / len(own), rtol=1e-3, atol=1e-5)
    own = own.clone()
    gated = experts.activation(own @ experts.gate[2].T) * (own @ experts.up[2].T)
    expected = gated.mT @ gated / len(own)
    assert torch.allclose(narrow.squares[2], expected, rtol=1e-3, atol=1e-6)


def test_an_expert_that_no_token_goes_to_is_rounded() -> None:
    model = made("mixtral")
    for part in model.modules():
        if type(part).__name__ == "Router":
            nn.init.zeros_(part.weight)  # pyright: ignore[reportArgumentType]
    given = [torch.full((1, 2), 7)]
    for method in ("gptq", "awq"):
        found = ph.quantize(model, "int4", method=method, calibration=given)
        assert any(isinstance(part, PackedExperts) for part in found.modules())
        assert answer(found).isfinite().all()


def test_a_scale_goes_into_the_norm_before() -> None:
    """Columns that read much are scaled, and the norm, values and up are divided."""
    torch.manual_seed(0)
    model = made("llama")
    block: Any = model.backbone.layers[0]  # pyright: ignore[reportIndexIssue]
    loud = torch.ones(64).index_fill_(0, torch.tensor([3, 17]), 30.0)
    with torch.no_grad():
        block.attention_norm.weight *= loud
    found = ph.quantize(model, "int4", method="awq", calibration=batches(model))
    scaled: Any = found.backbone.layers[0]  # pyright: ignore[reportIndexIssue]
    share = block.attention_norm.weight / scaled.attention_norm.weight
    assert share[[3, 17]].min() > 1.5 * share.median()
    # The rest of the block knows nothing of it.
    gained = scaled.attention.q.weight / block.attention.q.weight
    assert torch.allclose(gained.median(0).values, share, rtol=0.1)


def test_what_is_read_becomes_even() -> None:
    """Weights that lose nothing are scaled for what they read, which does beside loud columns."""
    torch.manual_seed(0)
    model = made("llama")
    with torch.no_grad():
        for part in model.backbone.modules():
            if type(part) is nn.Linear:
                part.weight.copy_(Int8(part.weight).unpack())
        for block in model.backbone.layers:  # pyright: ignore
            for norm in (block.attention_norm, block.ffn_norm):
                norm.weight[::9] *= 40.0
    given = batches(model)
    whole = read(model, given)
    lost: dict[str, float] = {}
    for method in ("nearest", "awq"):
        few = ph.quantize(model, "int8", method=method, calibration=given, embeddings="none")
        for part in few.modules():
            if isinstance(part, PackedLayer):
                part.register_forward_pre_hook(lambda layer, args: rounded_inputs(args[0], Int8))
        lost[method] = float((read(few, given) - whole).norm())
    assert lost["awq"] < 0.7 * lost["nearest"]


def test_what_others_read_is_not_scaled() -> None:
    """In a post-norm block the residual reads the norm as well: only what lies within may."""
    model = made("bert")
    layers = [part for part in model.backbone.modules() if type(part) is nn.Linear]
    walk = Walk(model, batches(model), layers)
    unit = walk.units[0]
    folds = list(awq._folds(unit))
    taken = {
        type(fold.writer).__name__: awq._applied(walk, unit, fold, _scale(fold)) for fold in folds
    }
    assert taken == {"LayerNorm": False, "Linear": True}


def _scale(fold: awq.Fold) -> Tensor:
    width: Any = fold.readers.layers[0]
    return torch.linspace(0.5, 2.0, width.weight.shape[1])


def test_a_gated_layer_is_scaled_within() -> None:
    model = made("llama")
    layers = [part for part in model.backbone.modules() if type(part) is nn.Linear]
    walk = Walk(model, batches(model), layers)
    writers = [fold.writer for fold in awq._folds(walk.units[0])]
    gated = next(part for part in model.modules() if isinstance(part, GatedFeedForward))
    assert gated.up in writers
    assert len(writers) == 4


def test_layers_that_are_not_reached_are_rounded() -> None:
    model = made("bert-bare")
    assert model.pooler is not None
    found = ph.quantize(model, "int4", method="gptq", calibration=batches(model))
    assert sum(isinstance(part, PackedLayer) for part in found.backbone.modules()) == 13


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (dict(form="int4", method="rtn"), "method is 'rtn': choose one of nearest, gptq, awq"),
        (dict(form="int4", group=48), "group is 48: choose one of 32, 64, 128"),
        (dict(form="nf4", group=64), "'nf4' has no even steps in groups: use int4 or int8"),
        (dict(form="nf4", method="gptq"), "'nf4' has no even steps"),
        (dict(form="int4", method="gptq"), "'gptq' needs calibration"),
        (
            dict(form="int4", group=64),
            r"group 64 does not divide backbone\.layers\.0\.ffn\.down, which is 96 wide: use 32",
        ),
        (
            dict(form="int4", method="awq", calibration=[{"tokens": torch.ones(1, 2)}]),
            "calibration does not fit a llama: .*tokens",
        ),
    ],
)
def test_what_cannot_be_is_refused(named: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ph.quantize(made("llama"), **named)


def test_a_model_that_is_no_number_is_refused() -> None:
    model = made("llama")
    with torch.no_grad():
        model.backbone.norm.weight.fill_(1.0)  # pyright: ignore
        model.backbone.layers[0].ffn.up.weight[0, 0] = torch.nan  # pyright: ignore
    with pytest.raises(ConfigError, match="no finite number"):
        ph.quantize(model, "int4", method="gptq", calibration=batches(model))


def test_a_wider_group_takes_less() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    sizes = [Int4(weight, group).num_bytes() * 8 / weight.numel() for group in (32, 64, 128)]
    assert sizes == [5.0, 4.5, 4.25]
    assert [Int8(weight, group).num_bytes() * 8 / weight.numel() for group in (64, 128)] == [
        8.25,
        8.125,
    ]
