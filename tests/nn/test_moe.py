"""Mixtures of experts against a loop over tokens, and their losses against transformers."""

import pytest
import torch
from tests.nn.parts import randomized
from torch import Tensor, nn
from torch.testing import assert_close

from polyhead.nn.moe import MixtureOfExperts, load_balance_loss, routing, z_loss

TOKENS, E, F, N = 23, 12, 10, 5
CLOSE = dict(atol=1e-5, rtol=0.0)
OPTIONS = {
    "top-2": dict(top_k=2),
    "raw-weights": dict(top_k=3, renormalize=False),
    "top-1-raw": dict(top_k=1, renormalize=False),
    "all": dict(top_k=N),
    "gelu": dict(top_k=2, activation="gelu"),
    "shared": dict(top_k=2, renormalize=False, shared_d_ff=8),
    "shared-gate": dict(top_k=2, renormalize=False, shared_d_ff=8, shared_gate=True),
    "capacity": dict(top_k=2, capacity_factor=0.75),
    "capacity-raw": dict(top_k=3, capacity_factor=0.5, renormalize=False, shared_d_ff=8),
}
by_name = pytest.mark.parametrize("name", OPTIONS)


def one_expert(layer: MixtureOfExperts, expert: int, x: Tensor) -> Tensor:
    experts = layer.experts
    gated = experts.activation(experts.gate[expert] @ x) * (experts.up[expert] @ x)
    return experts.down[expert] @ gated


def by_loop(layer: MixtureOfExperts, x: Tensor, capacity: int | None) -> Tensor:
    """One token and one of its experts at a time."""
    tokens = x.reshape(-1, E)
    shares = (tokens @ layer.router.weight.T).softmax(-1)
    rows: list[dict[int, Tensor]] = []
    for share in shares:
        best = sorted(range(N), key=lambda e: -share[e].item())[: layer.top_k]
        total = sum(share[e] for e in best) if layer.renormalize else 1.0
        rows.append({e: share[e] / total for e in best})
    if capacity is not None:
        for e in range(N):
            mine = sorted((t for t in range(len(rows)) if e in rows[t]), key=lambda t: -rows[t][e])
            for t in mine[capacity:]:
                del rows[t][e]
    out: list[Tensor] = []
    for t, token in enumerate(tokens):
        y = torch.zeros(E)
        for e, share in rows[t].items():
            y = y + share * one_expert(layer, e, token)
        if layer.shared is not None:
            part = layer.shared(token)
            y = y + (layer.shared_gate(token).sigmoid() * part if layer.shared_gate else part)
        out.append(y)
    return torch.stack(out).view_as(x)


@by_name
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_equals_a_loop_over_tokens(name: str, training: bool) -> None:
    options = OPTIONS[name]
    layer = randomized(MixtureOfExperts(E, F, N, **options), 0.5).train(training)
    x = torch.randn(1, TOKENS, E)
    factor = options.get("capacity_factor") if training else None
    # Written out for 23 tokens: 0.75 * 46 / 5 and 0.5 * 69 / 5, rounded up.
    capacity = {None: None, 0.75: 7, 0.5: 7}[factor]
    leaves = list(layer.parameters())
    answers: list[tuple[Tensor, tuple[Tensor, ...]]] = []
    for forward in (layer, lambda x: by_loop(layer, x, capacity)):
        inputs = x.clone().requires_grad_()
        y = forward(inputs)
        answers.append((y.detach(), torch.autograd.grad(y.square().mean(), [inputs, *leaves])))
    assert_close(answers[0][0], answers[1][0], **CLOSE)
    for one, other in zip(answers[0][1], answers[1][1], strict=True):
        assert_close(one, other, **CLOSE)


def test_capacity_drops_the_lowest_weights_and_no_others() -> None:
    """Every token wants expert 0; it takes the heaviest, the rest get nothing at all."""
    layer = randomized(
        MixtureOfExperts(E, F, N, top_k=1, renormalize=False, capacity_factor=1.0), 0.5
    )
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[0, 0] = 1.0
    x = torch.randn(20, E)
    x[:, 0] = torch.rand(20) + 1.0
    taken = layer.train()(x).ne(0).any(-1)
    assert taken.nonzero().flatten().tolist() == sorted(
        x[:, 0].argsort(descending=True)[:4].tolist()
    )
    assert layer.eval()(x).ne(0).any(-1).all()


def test_experts_that_nobody_chose_cost_nothing_and_break_nothing() -> None:
    layer = randomized(MixtureOfExperts(E, F, N, top_k=1), 0.5)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[3] = 100.0
    x = torch.rand(4, E)
    y = layer(x)
    assert_close(y, torch.stack([one_expert(layer, 3, token) for token in x]), **CLOSE)
    y.sum().backward()
    assert layer.experts.gate.grad is not None
    assert layer.experts.gate.grad[[0, 1, 2, 4]].eq(0).all()
    assert layer.experts.gate.grad.isfinite().all()


def test_a_token_does_not_depend_on_its_company() -> None:
    layer = randomized(MixtureOfExperts(E, F, N, top_k=2), 0.5).eval()
    x = torch.randn(3, 4, E)
    alone = torch.stack([torch.stack([layer(t[None])[0] for t in row]) for row in x])
    assert_close(layer(x), alone, **CLOSE)


def test_bf16_stays_near() -> None:
    layer = randomized(MixtureOfExperts(E, F, N, top_k=N, shared_d_ff=8, shared_gate=True), 0.3)
    x = torch.randn(TOKENS, E)
    exact = layer(x)
    rough = layer.bfloat16()(x.bfloat16())
    assert rough.dtype == torch.bfloat16
    assert_close(rough.float(), exact, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_load_balance_loss_is_transformers(top_k: int, padded: bool) -> None:
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = tuple(torch.randn(2 * 6, N) * 2 for _ in range(3))
    mask = torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]]) if padded else None
    theirs = mixtral.load_balancing_loss_func(logits, N, top_k, mask)
    keep = None if mask is None else mask.bool().flatten()
    assert_close(load_balance_loss(logits, top_k, keep), theirs, **CLOSE)


def test_perfect_balance_is_top_k() -> None:
    logits = torch.eye(N).mul(8.0).repeat(3, 1)
    assert_close(load_balance_loss([logits], 1), torch.tensor(1.0))
    crowded = torch.zeros(6, N)
    crowded[:, 0] = 50.0
    assert_close(load_balance_loss([crowded], 1), torch.tensor(float(N)))


def test_z_loss_is_its_formula() -> None:
    logits = [torch.randn(6, N), torch.randn(6, N)]
    keep = torch.tensor([1, 1, 0, 1, 0, 1]).bool()
    every = [row.exp().sum().log() ** 2 for layer in logits for row in layer]
    kept = [row.exp().sum().log() ** 2 for layer in logits for row in layer[keep]]
    assert_close(z_loss(logits), torch.stack(every).mean())
    assert_close(z_loss(logits, keep), torch.stack(kept).mean())


def test_routing_collects_every_router_in_order_and_leaves_nothing_behind() -> None:
    model = nn.Sequential(*(randomized(MixtureOfExperts(E, F, N, top_k=2), 0.5) for _ in range(3)))
    x = torch.randn(2, 4, E)
    with routing(model) as logits:
        y = model(x)
    assert [tuple(layer.shape) for layer in logits] == [(8, N)] * 3
    assert_close(logits[0], x.flatten(0, 1) @ model[0].router.weight.T, **CLOSE)
    load_balance_loss(logits, 2).backward()
    assert all(layer.router.weight.grad.ne(0).any() for layer in model)
    assert torch.equal(model(x), y)
    assert len(logits) == 3


@pytest.mark.parametrize("top_k", [0, N + 1])
def test_what_cannot_be_is_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k is {top_k}"):
        MixtureOfExperts(E, F, N, top_k)
