import pytest
import torch
import torch.nn.functional as F
from torch import nn

from polyhead.errors import ConfigError
from polyhead.train.contrastive import cached, contrastive, recall_figures, repeated
from polyhead.train.loop import Trainer
from polyhead.train.records import read_table
from polyhead.train.registry import OBJECTIVES

from .tables import bert, sentences, settings, wordpiece

KIND = OBJECTIVES["contrastive"]


def rows_of(count, seed=0, negatives=False):
    """A pair is the same words the other way round."""
    rows = [{"text": " ".join(w), "pair": " ".join(w[::-1])} for w in sentences(count, seed)]
    if negatives:
        wrong = [" ".join(w) for w in sentences(count, seed + 100)]
        rows = [{**row, "negative": w} for row, w in zip(rows, wrong, strict=True)]
    return rows


def dataset_of(rows, tokenizer, model, out):
    table = read_table(rows, KIND.columns)
    return KIND.dataset(table, tokenizer, model, settings(out, held_out=0.0), "train")


def vectors_of(model, batch):
    with torch.no_grad():
        return [F.normalize(model(**side), dim=-1) for side in batch.sides]


@pytest.mark.parametrize("negatives", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale", [20.0, 3.0])
def test_the_loss_by_a_loop(tmp_path, negatives, symmetric, scale):
    tokenizer = wordpiece()
    model = bert(tokenizer, "embed").eval()
    rows = rows_of(7, negatives=negatives)
    rows[3] = {**rows[3], "pair": rows[1]["pair"]}  # right for both rows, wrong for neither
    batch = dataset_of(rows, tokenizer, model, tmp_path).batch(0, 7)
    loss = contrastive(model, batch, scale=scale, symmetric=symmetric)
    texts, pairs, *wrong = (side.double() for side in vectors_of(model, batch))
    every = torch.cat([pairs, *wrong])
    ids = [str(side["input_ids"][i].tolist()) for side in batch.sides[1:] for i in range(7)]

    def nll(one, others, own, left_out):
        scores = {j: scale * float(one @ o) for j, o in enumerate(others) if j not in left_out}
        return torch.tensor(list(scores.values())).logsumexp(0) - scores[own]

    twins = [[j for j in range(len(every)) if j != i and ids[j] == ids[i]] for i in range(7)]
    total = sum(nll(texts[i], every, i, twins[i]) for i in range(7))
    if symmetric:
        back = sum(nll(pairs[i], texts, i, [j for j in twins[i] if j < 7]) for i in range(7))
        total = (total + back) / 2
    assert sum(map(len, twins)) == 2
    assert float(loss.total.detach()) == pytest.approx(float(total), rel=1e-5)
    assert loss.tokens == 7


@pytest.mark.parametrize("chunk", [1, 3, 4, 8])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_cached_gradients_are_those_of_the_whole_batch(tmp_path, chunk, dropout):
    tokenizer = wordpiece()
    model = bert(tokenizer, "embed", dropout=dropout, attention_dropout=dropout).train()
    batch = dataset_of(rows_of(8, negatives=True), tokenizer, model, tmp_path).batch(0, 8)
    gradients, losses, after = [], [], []
    for size in (chunk, 0):
        model.zero_grad()
        torch.manual_seed(3)
        if size == 0 and dropout:
            # The whole batch, with each chunk's own dropout: one graph over all chunks.
            loss = _in_one_graph(model, batch, chunk)
        else:
            loss = contrastive(model, batch, chunk=size)
        (loss.total / loss.tokens).backward()
        after.append(torch.rand(1))
        losses.append(loss.total.detach())
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
    assert torch.allclose(*losses)
    assert torch.equal(*after), "the replays drew random numbers of the run"
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 10
    for name, gradient in gradients[1].items():
        assert torch.allclose(gradients[0][name], gradient, atol=1e-6, rtol=1e-4), name


def _in_one_graph(model, batch, chunk):
    class Chunked(nn.Module):
        def forward(self, **side):
            names = list(side)
            parts = zip(*(side[n].split(chunk) for n in names), strict=True)
            return torch.cat([model(**dict(zip(names, part, strict=True))) for part in parts])

    return contrastive(Chunked(), batch)


def test_cached_vectors_hold_no_graph():
    layer = nn.Linear(4, 4)
    made = []

    def encode(part):
        made.append(len(part["x"]))
        return layer(part["x"])

    x = torch.randn(7, 4)
    vectors = cached(encode, {"x": x}, 3)
    assert made == [3, 3, 1]
    assert vectors.grad_fn is None
    vectors.square().sum().backward()
    expected = torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]
    assert torch.allclose(layer.weight.grad, expected, atol=1e-5)


def test_training_in_chunks_takes_the_same_steps(tmp_path):
    tokenizer, weights = wordpiece(), []
    for chunk in (0, 3):
        model = bert(tokenizer, "embed")
        trainer = Trainer(
            model, tokenizer, settings(tmp_path / str(chunk), steps=5), quiet=True,
            objective="contrastive", options={"chunk": chunk},
        )  # fmt: skip
        trainer.fit(rows_of(40))
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], atol=1e-4), name
    with pytest.raises(ConfigError, match="chunk is -1"):
        Trainer(
            model, tokenizer, settings(tmp_path / "wrong"), quiet=True,
            objective="contrastive", options={"chunk": -1},
        ).fit(rows_of(40))  # fmt: skip


def test_pairs_are_found_again(tmp_path):
    tokenizer = wordpiece()
    model = bert(tokenizer, "embed", init_std=0.02, seed=2)
    trainer = Trainer(
        model, tokenizer, settings(tmp_path / "run", steps=40, batch_size=16), quiet=True,
        objective="contrastive",
    )  # fmt: skip
    rows = rows_of(40, seed=9)
    before = trainer.evaluate(rows)
    trainer.fit(rows_of(300))
    after = trainer.evaluate(rows)
    assert after["recall_at_1"] > 0.8
    assert after["loss"] < before["loss"]
    assert after["recall_at_1"] <= after["mrr"] <= after["recall_at_10"]


def test_figures_by_counting():
    draw = torch.Generator().manual_seed(0)
    sides = torch.randn(2, 1500, 3, generator=draw)
    scores = sides[0] @ sides[1].T
    ranks = torch.tensor([int((row > row[i]).sum()) + 1 for i, row in enumerate(scores)])
    parts = [(a, b) for a, b in zip(sides[0].split(400), sides[1].split(400), strict=True)]
    found = recall_figures(None, None, parts)
    assert found["recall_at_1"] == pytest.approx(float((ranks == 1).double().mean()))
    assert found["recall_at_10"] == pytest.approx(float((ranks <= 10).double().mean()))
    assert found["mrr"] == pytest.approx(float((1 / ranks).mean()), rel=1e-5)


def test_what_repeats():
    assert repeated(["a", "b", "a"], ["a", "b", "a", "b"]).tolist() == [
        [False, False, True, False],
        [False, False, False, True],
        [True, False, False, False],
    ]
