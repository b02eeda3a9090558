import numpy as np
import pytest
import torch
import torch.nn.functional as F

import polyhead as ph
from polyhead.errors import ConfigError
from polyhead.nn.head import Classifier, LanguageHead
from polyhead.text.tokenizer import Tokenizer
from polyhead.train.config import TrainConfig
from polyhead.train.loop import train_step
from polyhead.train.objectives import IGNORE
from polyhead.train.optim import Masters
from polyhead.train.replaced import (
    ReplacedTokenModel,
    detection,
    replaced_token,
    replaced_windows,
    sample,
    with_generator,
)

from .conftest import text

SIZES = {"d_model": 16, "num_layers": 2, "num_heads": 2, "max_seq_len": 64, "d_ff": 32}
PLAIN = {"dropout": 0.0, "attention_dropout": 0.0}


@pytest.fixture(scope="module")
def bert() -> Tokenizer:
    return Tokenizer.train([text(50)], kind="wordpiece", vocab_size=40)


def discriminator(tokenizer, seed=0, **fields):
    """BERT with a class for each token."""
    model = ph.build(
        "bert", head="tag", seed=seed, vocab_size=tokenizer.vocab_size, labels=("replaced",),
        **{**SIZES, **PLAIN, **fields},
    )  # fmt: skip
    assert isinstance(model.head, Classifier)
    return model


def data(tokenizer, tmp_path, context=24):
    config = TrainConfig(context=context, out=str(tmp_path), seed=1)
    return replaced_windows([text(120)], tokenizer, discriminator(tokenizer), config, "train")


def test_gaps_are_mask_tokens_and_draws_are_arithmetic(bert, tmp_path):
    found = data(bert, tmp_path)
    batch = found.batch(2, 8)
    gaps = batch.labels != IGNORE
    assert (batch.input_ids[gaps] == bert.mask_id).all()
    assert (batch.input_ids[~gaps] != bert.mask_id).all()
    assert batch.draws.shape == gaps.shape
    assert 0 <= batch.draws.min() < batch.draws.max() < 1
    halves = [found.batch(i, 4) for i in (4, 5)]
    assert torch.equal(torch.cat([half.draws for half in halves]), batch.draws)
    assert batch.to(torch.device("cpu")).draws is batch.draws
    assert found.digest != found.masked.digest


@pytest.mark.parametrize("chunk", [50, 1 << 24])
def test_samples_follow_the_distribution(chunk, monkeypatch):
    from polyhead.train import replaced

    monkeypatch.setattr(replaced, "CHUNK_LOGITS", chunk)
    torch.manual_seed(0)
    head = LanguageHead(4, 9, bias=True)
    torch.nn.init.normal_(head.weight, std=1.0)
    states = torch.randn(4).expand(8000, 4)
    draws = torch.rand(8000)
    tokens = sample(head, states, draws)
    chance = head(states[:1]).softmax(-1)[0]
    share = torch.bincount(tokens, minlength=9) / 8000
    torch.testing.assert_close(share, chance, rtol=0, atol=0.03)
    edges = chance.cumsum(0)
    for token, draw in zip(tokens[:50].tolist(), draws[:50].tolist(), strict=True):
        assert token == int((edges <= draw).sum())
    assert sample(head, states[:2], torch.tensor([0.0, 0.99999994])).tolist() == [0, 8]
    assert sample(head, states[:0], draws[:0]).tolist() == []


@pytest.mark.parametrize("sharing", ["none", "shared", "disentangled"])
def test_the_loss_is_electra_s(sharing, bert, tmp_path):
    model = with_generator(discriminator(bert), sharing=sharing).train()
    batch = data(bert, tmp_path).batch(0, 48)
    loss = replaced_token(model, batch)
    gaps = batch.labels != IGNORE
    words = model.generator(batch.input_ids)
    masked = F.cross_entropy(words[gaps], batch.labels[gaps])
    edges = words[gaps].softmax(-1).cumsum(-1)
    ids = batch.input_ids.clone()
    ids[gaps] = (edges <= batch.draws[gaps][:, None]).sum(-1)
    replaced = (ids != batch.labels) & gaps
    assert 0 < replaced.sum() < gaps.sum(), "some were guessed right"
    logits = model.discriminator(ids)[..., 0]
    found = F.binary_cross_entropy_with_logits(logits, replaced.float())
    torch.testing.assert_close(loss.total / loss.tokens, masked + 50 * found)
    torch.testing.assert_close(loss.parts["generator"] / loss.tokens, masked.detach())
    torch.testing.assert_close(loss.parts["discriminator"] / loss.tokens, found.detach())
    assert loss.tokens == batch.tokens() == int(gaps.sum())
    two = loss.logits()
    nll = F.cross_entropy(two, replaced.flatten().long())
    torch.testing.assert_close(nll, found)
    figures = detection(model, None, [loss.answers])
    told = logits.flatten() > 0
    assert figures["accuracy"] == pytest.approx(float((told == replaced.flatten()).float().mean()))


def test_no_gradient_crosses_the_sample(bert, tmp_path):
    model = with_generator(discriminator(bert), sharing="none").train()
    batch = data(bert, tmp_path).batch(0, 6)
    loss = replaced_token(model, batch, weight=0.0)
    loss.total.backward()
    assert all(not p.grad.any() for p in model.discriminator.parameters() if p.grad is not None)
    alone = [p.grad.clone() for p in model.generator.parameters() if p.grad is not None]
    model.zero_grad()
    replaced_token(model, batch, weight=50.0).total.backward()
    both = [p.grad for p in model.generator.parameters() if p.grad is not None]
    for one, other in zip(alone, both, strict=True):
        torch.testing.assert_close(one, other)


def test_embeddings_are_shared_as_told(bert, tmp_path):
    batch = data(bert, tmp_path).batch(0, 6)
    gradients = {}
    for sharing in ("none", "shared", "disentangled"):
        model = with_generator(discriminator(bert), sharing=sharing).train()
        replaced_token(model, batch).total.backward()
        gradients[sharing] = model
    ours, theirs = (m.backbone.embedding for m in (model.discriminator, model.generator))
    assert ours.weight.grad is None
    assert not ours.weight.requires_grad
    none, shared = gradients["none"], gradients["shared"]
    table = shared.discriminator.backbone.embedding.weight
    assert table is shared.generator.backbone.embedding.weight
    assert table is shared.generator.head.decoder.weight
    of_generator, of_discriminator = theirs.weight.grad, model.difference.grad
    # One table has the sum of both gradients, two parts have one each, and the models are equal.
    torch.testing.assert_close(table.grad, of_generator + of_discriminator)
    alone = none.discriminator.backbone.embedding.weight
    assert alone.grad.shape == of_discriminator.shape
    assert not torch.equal(none.generator.backbone.embedding.weight, alone)


def test_the_disentangled_table_is_the_generator_s_plus_a_difference(bert, tmp_path):
    model = with_generator(discriminator(bert)).train()
    assert not model.difference.any(), "it starts at the generator's"
    batch = data(bert, tmp_path).batch(0, 6)
    optimizer = Masters(model, TrainConfig())
    for _ in range(3):
        train_step(model, optimizer, replaced_token, [batch], 1e-2)
    assert model.difference.abs().sum() > 0
    expected = (model.generator.backbone.embedding.weight + model.difference).detach()
    model.eval()
    answer = model(batch.input_ids)
    model.save(tmp_path / "kept")
    kept = ph.load(tmp_path / "kept")
    assert torch.equal(kept.backbone.embedding.weight, expected)
    torch.testing.assert_close(kept(batch.input_ids)[..., 0], answer)
    generator = ph.load(tmp_path / "kept" / "generator")
    torch.testing.assert_close(generator(batch.input_ids), model.generator(batch.input_ids))
    # Two models that were trained apart keep what each was.
    again = ReplacedTokenModel(kept, generator)
    torch.testing.assert_close(again(batch.input_ids), answer)


def test_the_generator_is_smaller(bert):
    model = with_generator(discriminator(bert, num_layers=4))
    assert model.generator.config.num_layers == 2
    assert model.generator.head_kind == "lm"
    assert with_generator(discriminator(bert), num_layers=1).generator.config.num_layers == 1
    assert model.config.num_layers == 4
    assert model.hf_config()["num_hidden_layers"] == 4
    assert model.num_parameters() == sum(p.numel() for p in set(model.parameters()))


@pytest.mark.parametrize("sharing", ["none", "shared", "disentangled"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_it_learns(sharing, kind, bert, tmp_path):
    model = with_generator(discriminator(bert), sharing=sharing).train()
    found = data(bert, tmp_path)
    optimizer = Masters(model, TrainConfig(dtype=kind))
    losses = []
    for step in range(25):
        sums, _, tokens = train_step(model, optimizer, replaced_token, [found.batch(step, 8)], 3e-3)
        losses.append(sums["generator"] / tokens)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3


def test_detection_counts():
    rng = np.random.default_rng(0)
    told, there = rng.random(300) < 0.3, rng.random(300) < 0.2
    pieces = [(torch.tensor(told[i::3]), torch.tensor(there[i::3])) for i in range(3)]
    figures = detection(None, None, pieces)
    right = sum(a and b for a, b in zip(told, there, strict=True))
    precision, recall = right / sum(told), right / sum(there)
    assert figures["precision"] == pytest.approx(precision)
    assert figures["recall"] == pytest.approx(recall)
    assert figures["f1"] == pytest.approx(2 / (1 / precision + 1 / recall))
    assert figures["accuracy"] == pytest.approx((told == there).mean())
    nothing = torch.zeros(4, dtype=torch.bool)
    assert detection(None, None, [(nothing, nothing)])["f1"] == 0.0


def test_what_does_not_fit_says_so(bert):
    with pytest.raises(ConfigError, match="sharing is 'all'"):
        with_generator(discriminator(bert), sharing="all")
    narrow = ph.build("bert", seed=0, vocab_size=bert.vocab_size, **{**SIZES, "d_model": 8})
    with pytest.raises(ConfigError, match="cannot be shared"):
        ReplacedTokenModel(discriminator(bert), narrow)
    ReplacedTokenModel(discriminator(bert), narrow, "none")
