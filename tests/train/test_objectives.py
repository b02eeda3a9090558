import pytest
import torch
import torch.nn.functional as F
from torch import nn

from polyhead.nn.head import LanguageHead
from polyhead.train import objectives
from polyhead.train.config import TrainConfig
from polyhead.train.loop import train_step
from polyhead.train.objectives import (
    LanguageBatch,
    causal_lm,
    head_cross_entropy,
    smoothed_cross_entropy,
)
from polyhead.train.optim import Masters

from .conftest import tiny


@pytest.mark.parametrize("chunk", [1, 100, 1 << 30])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_chunks_give_the_loss_and_gradients_of_the_whole(
    chunk, bias, scale, smoothing, monkeypatch
):
    monkeypatch.setattr(objectives, "CHUNK_LOGITS", chunk)
    torch.manual_seed(0)
    head = LanguageHead(8, 13, bias=bias, scale=scale).double()
    hidden = torch.randn(2, 11, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(13, (2, 11))
    labels[0, 3:9] = labels[1, 0] = -100
    tensors = [hidden, *head.parameters()]

    def gradients(loss):
        return torch.autograd.grad(3 * loss, tensors)

    found, nll = smoothed_cross_entropy(head, hidden, labels, smoothing)
    rows = head(hidden).flatten(0, 1), labels.flatten()
    wanted = F.cross_entropy(*rows, reduction="sum", label_smoothing=smoothing)
    plain = F.cross_entropy(*rows, reduction="sum").detach()
    torch.testing.assert_close(nll.double(), plain, rtol=1e-6, atol=1e-5)
    assert not nll.requires_grad
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-5)
    for ours, theirs in zip(gradients(found), gradients(wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(smoothed_cross_entropy(head, hidden, labels, smoothing)[0], found)
        assert torch.equal(head_cross_entropy(head, hidden, labels), nll)


def test_large_logits_are_never_held_whole(monkeypatch):
    monkeypatch.setattr(objectives, "CHUNK_LOGITS", 4000)
    largest = []
    linear = F.linear

    def spy(*args):
        out = linear(*args)
        largest.append(out.numel())
        return out

    monkeypatch.setattr(objectives.F, "linear", spy)
    head = LanguageHead(4, 1000)
    head_cross_entropy(head, torch.randn(1, 64, 4), torch.zeros(1, 64, dtype=torch.int64))
    assert len(largest) == 16
    assert max(largest) == 4000


def batch_of(rows: int, seed: int = 0) -> LanguageBatch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, (rows, 13), generator=generator)
    labels = ids[:, 1:].clone()
    for row in range(rows):
        labels[row, 12 - row :] = -100  # ragged
    labels[0, 2:7] = -100
    return LanguageBatch(ids[:, :-1], labels)


def parts_of(batch: LanguageBatch, size: int) -> list[LanguageBatch]:
    pairs = zip(batch.input_ids.split(size), batch.labels.split(size), strict=True)
    return [LanguageBatch(ids, labels) for ids, labels in pairs]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_accumulated_batches_make_the_step_of_one_batch(size):
    # With a tiny eps, gradients that are nothing but rounding (the keys' biases) would take whole
    # steps of lr in a direction left to chance.
    whole, config = batch_of(8), TrainConfig(eps=1e-4)
    results = []
    for batches in ([whole], parts_of(whole, size)):
        model = tiny(20)
        optimizer = Masters(model, config)
        for _ in range(3):
            sums, norm, tokens = train_step(model, optimizer, causal_lm, batches, 1e-3)
        results.append((sums["loss"] / tokens, norm, tokens, model.state_dict()))
    (loss, norm, tokens, state), (loss2, norm2, tokens2, state2) = results
    assert tokens == tokens2 == whole.tokens()
    assert abs(loss - loss2) < 1e-6
    assert abs(norm - norm2) < 1e-6
    for name in state:
        torch.testing.assert_close(state[name], state2[name], rtol=0, atol=1e-6)


def test_accumulated_gradients_equal_those_of_one_batch():
    whole = batch_of(8)
    gradients = []
    for batches in ([whole], parts_of(whole, 2)):
        model = tiny(20)
        for batch in batches:
            (causal_lm(model, batch).total / whole.tokens()).backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, many in zip(*gradients, strict=True):
        torch.testing.assert_close(one, many, rtol=0, atol=1e-6)


def test_experts_add_their_routers_losses():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            from polyhead.nn.moe import MixtureOfExperts

            self.embedding = nn.Embedding(20, 8)
            self.experts = MixtureOfExperts(8, 16, num_experts=4, top_k=2)
            self.head = LanguageHead(8, 20)
            self.config = None

        def backbone(self, input_ids):
            return self.experts(self.embedding(input_ids))

    torch.manual_seed(0)
    model = Model()
    loss = causal_lm(model, batch_of(4))
    assert set(loss.parts) == {"loss", "balance", "router_z"}
    assert float(loss.total.detach()) == pytest.approx(
        sum(map(float, loss.parts.values())), rel=1e-6
    )
    # Balance is top_k = 2 at best.
    assert float(loss.parts["balance"]) / loss.tokens >= 0.99 * 2 * objectives.BALANCE
    loss.total.backward()
    assert model.experts.router.weight.grad.abs().sum() > 0
    model.eval()
    assert set(causal_lm(model, batch_of(4)).parts) == {"loss"}


def test_a_label_below_nothing_is_refused_in_chunks_too(monkeypatch):
    monkeypatch.setattr("polyhead.train.objectives.CHUNK_LOGITS_CPU", 8)
    head, hidden = torch.nn.Linear(4, 9, bias=False), torch.randn(6, 4)
    with pytest.raises(IndexError, match="label -1 is out of bounds"):
        smoothed_cross_entropy(head, hidden, torch.tensor([1, 2, -1, -100, 3, 4]), 0.0)
