"""Comparisons: DPO and its kin, and the model of rewards."""

import pytest
import torch
import torch.nn.functional as F

import polyhead as ph
from polyhead.errors import ConfigError, DataError, FileError
from polyhead.train import checkpoint
from polyhead.train.config import TrainConfig
from polyhead.train.objectives import IGNORE
from polyhead.train.preference import (
    PairBatch,
    compared_answers,
    label_log_probs,
    preference,
    preference_losses,
    row_log_probs,
)
from polyhead.train.ranks import Ranks
from polyhead.train.records import read_table
from polyhead.train.registry import OBJECTIVES, settled

from .test_checkpoint import Stop, assert_same, final_state, stop_at

SIZES = dict(d_model=16, d_ff=24, num_layers=2, num_heads=2, max_seq_len=64)
ROWS = [
    {"prompt": f"the cat {word}", "chosen": "sat on a mat", "rejected": f"was {word}"}
    for word in ("flat", "that", "saw", "and", "on a mat", "it was flat", "sat", "the")
] * 3


def small(tokenizer, seed=0, **more):
    sizes = {**SIZES, **more}
    return ph.build("llama", seed=seed, vocab_size=tokenizer.vocab_size, **sizes)


def batch_of(tokenizer, model, rows=ROWS[:5]):
    table = read_table(rows, OBJECTIVES["dpo"].columns)
    config = TrainConfig(context=64, held_out=0.0)
    found = compared_answers(table, tokenizer, model, config, "all")
    return found, found.batch(0, len(rows))


def test_log_probabilities_are_the_softmaxs(tokenizer, monkeypatch):
    model = small(tokenizer).eval()
    _, batch = batch_of(tokenizer, model)
    logits = model(batch.input_ids, attention_mask=batch.attention_mask)
    labels = batch.labels.clamp_min(0)
    each = logits.float().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    expected = (each * (batch.labels != IGNORE)).sum(1)
    assert torch.allclose(row_log_probs(model, batch), expected, atol=1e-5)
    whole, _ = label_log_probs(model, batch)
    whole.sum().backward()
    grad = model.backbone.embedding.weight.grad.clone()
    model.zero_grad()
    # In parts, whose logits are made again for the gradient.
    monkeypatch.setattr("polyhead.train.preference.CHUNK_LOGITS", 7 * tokenizer.vocab_size)
    parts, _ = label_log_probs(model, batch)
    parts.sum().backward()
    assert torch.allclose(whole, parts, atol=1e-6)
    assert torch.allclose(model.backbone.embedding.weight.grad, grad, atol=1e-5)


def by_hand(log_probs, reference, lengths, variant, beta, smoothing):
    """One pair at a time, from the papers."""
    losses = []
    pairs = len(log_probs) // 2
    for i in range(pairs):
        good, bad = log_probs[i] - reference[i], log_probs[i + pairs] - reference[i + pairs]
        if variant == "ipo":
            h = good / lengths[i] - bad / lengths[i + pairs]
            losses.append((h - 1 / (2 * beta)) ** 2)
            continue
        if variant == "length-normalised":
            good, bad = good / lengths[i], bad / lengths[i + pairs]
        p = torch.sigmoid(beta * (good - bad))
        losses.append(-(1 - smoothing) * p.log() - smoothing * (1 - p).log())
    return torch.stack(losses)


@pytest.mark.parametrize("variant", ["dpo", "ipo", "length-normalised"])
@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.5, 0.2), (2.0, 0.0)])
def test_losses_are_the_papers(variant, beta, smoothing):
    torch.manual_seed(0)
    log_probs, reference = -20 * torch.rand(2, 8).double()
    lengths = torch.randint(1, 30, (8,))
    found, margin = preference_losses(log_probs, reference, lengths, variant, beta, smoothing)
    expected = by_hand(log_probs, reference, lengths, variant, beta, smoothing)
    assert torch.allclose(found, expected)
    assert margin.shape == (4,)


def test_at_the_start_nothing_is_preferred(tokenizer, tmp_path):
    model = small(tokenizer)
    found, _ = batch_of(tokenizer, model)
    found.refer(model, tmp_path, "train", Ranks(), anew=True)
    loss = preference(model.eval(), found.batch(0, 5))
    assert torch.allclose(loss.total / loss.tokens, torch.tensor(2.0).log(), atol=1e-5)
    again, _ = batch_of(tokenizer, model)
    again.refer(small(tokenizer, seed=5), tmp_path, "train", Ranks(), anew=False)
    assert torch.equal(again.batch(0, 5).reference, found.batch(0, 5).reference)
    with pytest.raises(FileError, match="begin anew"):
        again.refer(model, tmp_path / "none", "train", Ranks(), anew=False)


SETTINGS = dict(batch_size=4, context=40, warmup=2, lr=5e-3, validate_batches=0, log_every=1)


def fit(model, tokenizer, out, *, resume=False, callbacks=(), **more):
    options = {name: more.pop(name) for name in ("variant", "smoothing") if name in more}
    config = TrainConfig(out=str(out), **{**SETTINGS, "steps": 12, **more})
    trainer = ph.Trainer(
        model, tokenizer, config, objective="dpo", options=options, callbacks=callbacks, quiet=True
    )
    return trainer.fit(ROWS, ROWS[:8], resume=resume)


@pytest.mark.parametrize("variant", ["dpo", "ipo", "length-normalised"])
@pytest.mark.parametrize("lora", [False, True])
def test_the_better_answer_gains(tokenizer, tmp_path, variant, lora):
    model = small(tokenizer)
    if lora:
        ph.add_adapter(model, ph.LoraConfig(targets="all-linear"))
    found = fit(model, tokenizer, tmp_path, steps=25, lr=2e-2, variant=variant)
    assert found["valid_accuracy"] == 1.0
    assert found["valid_margin"] > (0.5 if variant == "dpo" else 0.1)  # the others': a token
    assert found["best"]


def test_a_run_that_goes_on_remembers_the_reference(tokenizer, tmp_path):
    settings = {"checkpoint_every": 3}
    fit(small(tokenizer), tokenizer, tmp_path / "whole", **settings)
    with pytest.raises(Stop):
        fit(small(tokenizer), tokenizer, tmp_path / "cut", callbacks=[stop_at(7)], **settings)
    model = ph.load(checkpoint.latest(tmp_path / "cut"))
    fit(model, tokenizer, tmp_path / "cut", resume=True, **settings)
    whole, cut = final_state(tmp_path / "whole"), final_state(tmp_path / "cut")
    whole[1]["rng"], cut[1]["rng"] = None, None
    assert_same(whole, cut)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_model_of_rewards_learns_to_tell(tokenizer, tmp_path, family):
    words = tokenizer
    if family == "bert":
        words = ph.Tokenizer.train([str(ROWS)], kind="wordpiece", vocab_size=80)
    model = ph.build(
        family, head="classify", labels=["reward"], problem="regression", seed=0,
        vocab_size=words.vocab_size, **SIZES,
    )  # fmt: skip
    config = TrainConfig(out=str(tmp_path), steps=25, **{**SETTINGS, "lr": 2e-2})
    trainer = ph.Trainer(model, words, config, objective="reward", quiet=True)
    found = trainer.fit(ROWS, ROWS[:8])
    assert found["valid_accuracy"] == 1.0


def test_rewards_are_bradley_and_terrys(tokenizer):
    from polyhead.train.preference import RewardBatch, reward

    model = ph.build("llama", head="classify", labels=["reward"], seed=0, problem="regression",
                     vocab_size=tokenizer.vocab_size, **SIZES).eval()  # fmt: skip
    ids = torch.randint(3, tokenizer.vocab_size, (4, 6))
    loss = reward(model, RewardBatch(ids, torch.ones_like(ids)))
    scores = model(ids)[:, 0]
    assert torch.allclose(loss.total, -F.logsigmoid(scores[:2] - scores[2:]).sum(), atol=1e-6)
    assert loss.tokens == 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": None}, "row 0: rejected is None"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "row 0: rejected is ''"),
        ({"prompt": "a", "chosen": "b"}, "no column 'rejected'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "same answer twice"),
        ({"prompt": "cat " * 80, "chosen": "b", "rejected": "c"}, "begins after context"),
    ],
)
def test_a_row_without_two_answers_is_refused(tokenizer, tmp_path, row, said):
    model = small(tokenizer)
    with pytest.raises(DataError, match=said):
        batch_of(tokenizer, model, [row])


def test_without_a_run_there_is_no_reference(tokenizer, tmp_path):
    config = TrainConfig(out=str(tmp_path), **SETTINGS)
    trainer = ph.Trainer(small(tokenizer), tokenizer, config, objective="dpo", quiet=True)
    with pytest.raises(ConfigError, match="only fit can ask"):
        trainer.evaluate(ROWS[:4])


def test_pairs_count_once():
    batch = PairBatch(torch.ones(6, 4).long(), torch.ones(6, 4).long())
    assert batch.tokens() == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"variant": "dop"}, "variant is 'dop': choose one of dpo, ipo, length-normalised"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"beta": -1.0, "variant": "ipo"}, "beta is -1.0"),
        ({"smoothing": 0.5}, "smoothing is 0.5"),
        ({"smoothing": 0.1, "variant": "ipo"}, "ipo takes every judgement"),
    ],
)
def test_options_that_make_no_loss_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        settled(OBJECTIVES["dpo"], options)
