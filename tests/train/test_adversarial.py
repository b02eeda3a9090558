from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import polyhead as ph
from polyhead.errors import ConfigError
from polyhead.nn.head import MaskedLanguageHead
from polyhead.train import adversarial
from polyhead.train.adversarial import divergence, sift
from polyhead.train.config import TrainConfig
from polyhead.train.loop import train_step
from polyhead.train.masked import masked_lm
from polyhead.train.objectives import IGNORE, LanguageBatch, Loss
from polyhead.train.optim import Masters

E, V = 12, 30


class Backbone(nn.Module):
    """BERT's embeddings and a layer that mixes tokens."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(V, E), nn.Embedding(16, E)
        self.embedding_norm = nn.LayerNorm(E, eps=1e-12)
        self.layer = nn.TransformerEncoderLayer(E, 2, 24, dropout, "gelu", batch_first=True)

    def forward(self, input_ids, attention_mask=None):
        places = torch.arange(input_ids.shape[1])
        x = self.words(input_ids) + self.places(places)
        return self.layer(self.embedding_norm(x))


class Model(nn.Module):
    def __init__(self, classes: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(model_type="tiny")
        self.backbone, self.head = Backbone(dropout), nn.Linear(E, classes)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, ids):
        return self.head(self.backbone(ids)[:, 0])

    def hidden(self, ids, head=None):
        return self.backbone(ids)


def classify(model, batch):
    logits = model(batch.input_ids)
    total = F.cross_entropy(logits, batch.labels, reduction="sum")
    return Loss(total, len(logits), {"loss": total.detach()}, (), lambda: logits)


def regress(model, batch):
    found = model(batch.input_ids)
    total = (found[:, 0] - batch.labels).square().sum()
    return Loss(total, len(found), {}, (), lambda: found)


def batch_of(rows: int = 5, classes: int = 3) -> LanguageBatch:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (rows, 9), generator=g)
    return LanguageBatch(ids, torch.randint(classes, (rows,), generator=g))


def by_hand(model, batch, noise, lr):
    """The moved input and the loss's terms, written out for this model alone; no hooks."""
    backbone = model.backbone

    def free_norm(x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-7).sqrt()

    def answer(x):
        return model.head(backbone.layer(backbone.embedding_norm(x))[:, 0])

    ids = batch.input_ids
    x = free_norm(backbone.words(ids) + backbone.places(torch.arange(ids.shape[1])))
    clean = answer(x)
    delta = noise.clone().requires_grad_()
    p = clean.detach().softmax(-1)
    # The gradient of KL(p ‖ q) by q's logits alone.
    found = answer(x.detach() + delta)
    kl = (p * (p.log() - found.log_softmax(-1))).sum()
    (g,) = torch.autograd.grad(kl, delta)
    moved = noise + lr * g / (1e-6 + g.abs().max(-1, keepdim=True).values)
    return clean, answer(x.detach() + moved)


def test_it_is_the_step_and_the_divergence_derived_by_hand(monkeypatch):
    model, batch = Model(), batch_of()
    noise = torch.randn(5, 9, E, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(adversarial.torch, "randn", lambda shape, device: noise.view(shape))
    loss = sift(classify, weight=2.0, lr=0.05, std=0.3)(model, batch)
    noise = (noise * 0.3).clamp(-0.6, 0.6)
    assert noise.abs().max() == pytest.approx(0.6)
    clean, moved = by_hand(model, batch, noise, 0.05)
    p, q = clean.softmax(-1), moved.softmax(-1)
    symmetric = ((p - q) * (p.log() - q.log())).sum(-1)
    assert float(symmetric.mean().detach()) > 1e-4
    nll = F.cross_entropy(clean, batch.labels, reduction="sum")
    torch.testing.assert_close(loss.parts["loss"], nll.detach(), rtol=1e-5, atol=1e-5)
    sifted = 2.0 * len(clean) * symmetric.mean()
    torch.testing.assert_close(loss.parts["sift"], sifted.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.total, nll + sifted, rtol=1e-5, atol=1e-5)
    assert loss.tokens == len(clean)

    # Microsoft's two cross-entropies have the gradient of ours, each with the other side held.
    twice = -(p.detach() * q.log()).sum(-1) - (q.detach() * p.log()).sum(-1)
    names, parameters = zip(*model.named_parameters(), strict=True)
    theirs = torch.autograd.grad(nll + 2.0 * len(clean) * twice.mean(), parameters)
    ours = torch.autograd.grad(loss.total, parameters)
    for name, one, other in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=name)


def test_the_step_goes_uphill(monkeypatch):
    model, batch = Model(), batch_of()
    start = torch.full((5, 9, E), 0.05)
    monkeypatch.setattr(adversarial.Sift, "_start", lambda self, x: start.clone().requires_grad_())
    far = sift(classify, lr=0.1)(model, batch).parts["sift"]
    near = sift(classify, lr=1e-9)(model, batch).parts["sift"]
    assert far > 1.2 * near


def test_weights_are_left_alone_and_get_the_gradient_they_ask_for():
    model, batch = Model(), batch_of()
    model.head.bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    asking = []
    model.head.register_forward_hook(lambda m, i, o: asking.append(m.weight.requires_grad))
    loss = sift(classify)(model, batch)
    assert asking == [True, False, True], "the pass for the move alone keeps no weight's graph"
    assert all(p.grad is None for p in model.parameters()), "the move's gradient leaked"
    assert [p.requires_grad for p in model.head.parameters()] == [True, False]
    assert not model.backbone.embedding_norm._forward_pre_hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    loss.total.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name == "head.bias"), name
    # Moved embeddings are moved from where they stand: only the clean pass trains the words.
    assert model.backbone.words.weight.grad.abs().sum() > 0


def test_the_clean_pass_is_normalised_and_the_norm_behind_takes_it_back():
    model, batch = Model(), batch_of()
    seen = []
    model.backbone.embedding_norm.register_forward_hook(lambda m, i, o: seen.append(i[0].detach()))
    loss = sift(classify)(model, batch)
    clean, first, second = seen
    torch.testing.assert_close(clean.mean(-1), torch.zeros(5, 9), rtol=0, atol=1e-5)
    torch.testing.assert_close(clean.std(-1, unbiased=False), torch.ones(5, 9), rtol=0, atol=1e-4)
    assert (first - clean).abs().max() <= 0.02 + 1e-6
    assert 0 < (first - clean).std() < 0.0101
    steps = (second - first).abs().amax(-1)
    assert (steps < 1.01e-4).all()
    # A whole step for each token, less where the gradient is no longer far above 1e-6.
    assert (steps > 0.5e-4).float().mean() > 0.9
    torch.testing.assert_close(loss.logits(), model(batch.input_ids), rtol=1e-4, atol=1e-4)


def test_in_eval_nothing_changes():
    model, batch = Model(dropout=0.1).eval(), batch_of()
    loss = sift(classify)(model, batch)
    assert set(loss.parts) == {"loss"}
    assert torch.equal(loss.total, classify(model, batch).total)


def test_any_objective(monkeypatch):
    model = Model(classes=1)
    loss = sift(regress, weight=3.0)(model, LanguageBatch(batch_of().input_ids, torch.randn(5)))
    assert set(loss.parts) == {"loss", "sift"}
    assert loss.parts["sift"] > 0
    model = Model()
    model.head = MaskedLanguageHead(E, V)
    ids = batch_of().input_ids
    labels = torch.where(torch.arange(9) % 4 == 1, ids, IGNORE)
    loss = sift(masked_lm)(model, LanguageBatch(ids, labels))
    assert loss.tokens == 10
    assert loss.logits().shape == (10, V)
    assert loss.parts["sift"] > 0


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_real_family(family):
    sizes = {"d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "max_seq_len": 32}
    model = ph.build(family, seed=0, vocab_size=V, dropout=0.0, attention_dropout=0.0, **sizes)
    model.train()
    ids = batch_of().input_ids.clamp(min=2)
    labels = torch.where(torch.arange(9) % 4 == 1, ids, IGNORE)
    batch = LanguageBatch(ids, labels)
    plain, loss = masked_lm(model, batch), sift(masked_lm)(model, batch)
    # The norm without weights before BERT's own one changes nothing but rounding.
    torch.testing.assert_close(loss.parts["loss"], plain.parts["loss"], rtol=1e-3, atol=1e-3)
    assert 0 < float(loss.parts["sift"]) < float(loss.parts["loss"])
    loss.total.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "token_types" not in n)


def test_two_passes_of_one_objective_move_apart():
    def both(model, batch):
        one, two = model(batch.input_ids), model(batch.input_ids.flip(0))
        logits = torch.cat([one, two])
        return Loss(logits.logsumexp(-1).sum(), len(logits), {}, (), lambda: logits)

    model, batch = Model(), batch_of()
    seen = []
    model.backbone.embedding_norm.register_forward_hook(lambda m, i, o: seen.append(i[0].detach()))
    sift(both)(model, batch)
    assert len(seen) == 6
    assert (seen[2] - seen[0]).abs().max() <= 0.0201
    assert (seen[3] - seen[1]).abs().max() <= 0.0201


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_training_with_it_brings_the_answers_together(kind):
    def distance(objective):
        model, batch = Model(), batch_of(16)
        optimizer = Masters(model, TrainConfig(dtype=kind))
        torch.manual_seed(0)
        for _ in range(30):
            train_step(model, optimizer, objective, [batch], 1e-2)
        probe = sift(classify, weight=1.0, std=0.2)(model, batch)
        return float(probe.parts["sift"]) / probe.tokens, float(probe.parts["loss"])

    (plain, loss), (sifted, loss2) = distance(classify), distance(sift(classify, std=0.2))
    assert sifted < 0.7 * plain
    assert max(loss, loss2) < 8


def test_it_draws_like_dropout_from_the_state_that_checkpoints_keep():
    model, batch = Model(dropout=0.2), batch_of()
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        found.append(sift(classify)(model, batch).total)
    assert torch.equal(*found)


def test_gradients_that_are_not_finite_move_nothing():
    found = adversarial.Sift(classify, 1.0, 1e-4, 1e-2)
    move = torch.ones(1, 2, 3)
    assert torch.equal(found._step(move, torch.full((1, 2, 3), float("nan"))), move)
    assert torch.equal(found._step(move, torch.zeros(1, 2, 3)), move)


def test_the_divergence_of_equals_is_zero():
    logits = torch.randn(4, 7, 5)
    assert divergence(logits, logits + 3.0).shape == (28,)
    torch.testing.assert_close(divergence(logits, logits + 3.0), torch.zeros(28), atol=1e-6, rtol=0)


def test_what_is_ruled_out_gives_no_nan():
    clean, moved = (torch.randn(3, 4).requires_grad_() for _ in range(2))
    away = torch.tensor([False, True, False, True])
    found = divergence(*(x.masked_fill(away, float("-inf")) for x in (moved, clean)))
    torch.testing.assert_close(found, divergence(moved[:, ~away], clean[:, ~away]))
    for gradient in torch.autograd.grad(found.sum(), [moved, clean]):
        assert gradient.isfinite().all()
        assert not gradient[:, away].any()


def test_what_cannot_be_sifted_says_so():
    model, batch = Model(), batch_of()
    with pytest.raises(ConfigError, match="no logits"):
        sift(lambda m, b: Loss(m(b.input_ids).sum(), 1))(model, batch)
    model.backbone.embedding_norm = nn.Identity()
    with pytest.raises(ConfigError, match="tiny has none"):
        sift(classify)(model, batch)
    for name in ("weight", "lr", "std"):
        with pytest.raises(ConfigError, match=f"sift's {name} is 0"):
            sift(classify, **{name: 0})
