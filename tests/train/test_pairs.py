import numpy as np
import pytest
import torch
import torch.nn.functional as F

import polyhead as ph
from polyhead.errors import ConfigError, DataError
from polyhead.text.tokenizer import Tokenizer
from polyhead.train.config import TrainConfig
from polyhead.train.objectives import IGNORE
from polyhead.train.pairs import (
    LEAST,
    nsp,
    nsp_pairs,
    pair_accuracy,
    sop,
    sop_pairs,
)

from .conftest import text

MAKERS = {"nsp": nsp_pairs, "sop": sop_pairs}
DOCUMENTS = [text(lines, seed) for seed, lines in enumerate((4, 9, 2, 1, 12, 3, 7))] + ["a mat"]


@pytest.fixture(scope="module")
def bert() -> Tokenizer:
    return Tokenizer.train([text(50)], kind="wordpiece", vocab_size=60)


def model_of(tokenizer, head="nsp", family="bert"):
    sizes = {"d_model": 16, "num_layers": 1, "num_heads": 2, "max_seq_len": 64, "d_ff": 32}
    options = {"dropout": 0.0, "attention_dropout": 0.0}
    return ph.build(family, head=head, seed=0, vocab_size=tokenizer.vocab_size, **sizes, **options)


def made(kind, tokenizer, tmp_path, head="nsp", documents=DOCUMENTS, split="all", **fields):
    config = TrainConfig(**{"context": 27, "out": str(tmp_path), "seed": 3, **fields})
    family = "albert" if kind == "sop" else "bert"
    model = model_of(tokenizer, kind if head == "nsp" else head, family)
    return MAKERS[kind](documents, tokenizer, model, config, split)


def segments(batch, row, tokenizer):
    """Both segments of a row, checked for how they are framed."""
    size = int(batch.attention_mask[row].sum())
    ids, types = batch.input_ids[row].tolist(), batch.token_type_ids[row].tolist()
    assert ids[0] == tokenizer.cls_id
    assert ids[size - 1] == tokenizer.sep_id
    assert set(ids[size:]) <= {tokenizer.pad_id}
    middle = ids.index(tokenizer.sep_id)
    assert types == [0] * (middle + 1) + [1] * (size - middle - 1) + [0] * (len(ids) - size)
    assert ids[:size].count(tokenizer.sep_id) == 2
    return ids[1:middle], ids[middle + 1 : size - 1]


def found_in(documents, piece):
    """Which documents hold a stretch of tokens."""
    size = len(piece)
    return {
        number
        for number, ids in enumerate(documents)
        if any(ids[at : at + size] == piece for at in range(len(ids) - size + 1))
    }


@pytest.mark.parametrize("kind", ["nsp", "sop"])
def test_labels_say_what_is_there(kind, bert, tmp_path):
    # Words of its own for every document, so that a segment tells whose it is.
    data = made(kind, bert, tmp_path)
    ends = data.tokens.ends
    documents = [part[:-1].tolist() for part in np.split(data.tokens.ids, ends)[:-1]]
    seen = []
    for index in range(60):
        batch = data.batch(index, 5)
        assert batch.input_ids.shape[1] <= 27
        for row in range(5):
            a, b = segments(batch, row, bert)
            label = int(batch.pair_labels[row])
            seen.append(label)
            assert min(len(a), len(b)) >= LEAST // 4
            if label == 0:
                assert found_in(documents, a + b), "what is in order stands so in one document"
            elif kind == "sop":
                assert found_in(documents, b + a)
            else:
                assert found_in(documents, a)
                assert found_in(documents, b)
    assert np.mean(seen) == pytest.approx(0.5, abs=0.12)


def test_a_wrong_second_segment_is_of_another_document(bert, tmp_path):
    data = made("nsp", bert, tmp_path)
    starts = np.concatenate([[0], data.tokens.ends[:-1]])
    assert (data.first >= starts[data.owner]).all()
    assert (data.first + data.size <= data.tokens.ends[data.owner] - 1).all()
    number = {tuple(data._text(i).tolist()): data.owner[i] for i in range(len(data))}
    draw = np.random.default_rng(0)
    for stretch in range(len(data)):
        others = {number[tuple(data._elsewhere(stretch, draw).tolist())] for _ in range(200)}
        assert data.owner[stretch] not in others
        # All of the others have their turn.
        assert others == set(data.owner.tolist()) - {data.owner[stretch]}


def test_stretches_cover_the_documents_once(bert, tmp_path):
    data = made("sop", bert, tmp_path)
    covered = np.zeros(len(data.tokens.ids), int)
    for first, size in zip(data.first, data.size, strict=True):
        assert LEAST <= size <= data.room
        covered[first : first + size] += 1
    assert covered.max() == 1
    left = np.flatnonzero(covered == 0)
    # Closing tokens, and ends that are shorter than LEAST.
    assert len(left) < len(DOCUMENTS) * LEAST
    assert set(data.tokens.ends - 1) <= set(left.tolist())


@pytest.mark.parametrize("kind", ["nsp", "sop"])
@pytest.mark.parametrize("head", ["nsp", "pretraining"])
def test_rows_are_arithmetic(kind, head, bert, tmp_path):
    data = made(kind, bert, tmp_path, head)
    whole, halves = data.batch(1, 8), [data.batch(i, 4) for i in (2, 3)]
    for row in range(8):
        size = int(whole.attention_mask[row].sum())
        half = halves[row // 4]
        for name in ("input_ids", "labels", "token_type_ids"):
            ours = getattr(whole, name)[row, :size]
            assert torch.equal(ours, getattr(half, name)[row % 4, :size]), name
        assert whole.pair_labels[row] == half.pair_labels[row % 4]
    epochs = [data.batch(i, len(data)) for i in range(3)]
    assert len({tuple(epoch.pair_labels.tolist()) for epoch in epochs}) == 3
    train, valid = (made(kind, bert, tmp_path, split=s, held_out=0.4) for s in ("train", "valid"))
    assert len(train) > 0 < len(valid)
    assert len({data.digest, train.digest, valid.digest}) == 3


@pytest.mark.parametrize("head", ["nsp", "pretraining"])
def test_the_loss_is_bert_s(head, bert, tmp_path):
    batch = made("nsp", bert, tmp_path, head).batch(0, 6)
    model = model_of(bert, head).eval()
    loss = nsp(model, batch)
    given = {"attention_mask": batch.attention_mask, "token_type_ids": batch.token_type_ids}
    name = "nsp" if head == "pretraining" else None
    logits = model(batch.input_ids, head=name, **given)
    wanted = F.cross_entropy(logits, batch.pair_labels)
    torch.testing.assert_close(loss.logits(), logits)
    right = (logits.argmax(-1) == batch.pair_labels).float().mean()
    rates = pair_accuracy(model, None, [loss.answers] * 2)
    assert rates["accuracy"] == pytest.approx(float(right))
    if head == "nsp":
        assert batch.tokens() == loss.tokens == 6
        assert (batch.labels == IGNORE).all()
        torch.testing.assert_close(loss.total / 6, wanted)
        return
    count = int((batch.labels != IGNORE).sum())
    assert batch.tokens() == loss.tokens == count > 0
    special = torch.tensor(sorted(bert.special_ids))
    assert not torch.isin(batch.labels, special).any()
    words = model(batch.input_ids, head="lm", **given)
    masked = F.cross_entropy(words.flatten(0, 1), batch.labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss.parts["masked"], masked)
    # 15 % of 24 tokens stand for a pair, so that full rows weigh both means alike.
    torch.testing.assert_close(loss.total, masked + 0.15 * 24 * 6 * wanted)
    assert set(loss.parts) == {"loss", "nsp", "masked"}
    assert set(rates) == {"accuracy", "masked_accuracy"}


def test_order_asks_its_own_head(bert, tmp_path):
    batch = made("sop", bert, tmp_path).batch(0, 6)
    model = model_of(bert, "sop", "albert")
    loss = sop(model, batch)
    loss.total.backward()
    assert model.pooler.dense.weight.grad.abs().sum() > 0
    assert model.backbone.token_types.weight.grad.abs().sum() > 0


def test_what_is_missing_is_named(bert, tokenizer, tmp_path):
    with pytest.raises(DataError, match="two documents"):
        made("nsp", bert, tmp_path, documents=[text(40)])
    made("sop", bert, tmp_path, documents=[text(40)]).batch(0, 2)
    with pytest.raises(DataError, match="one document"):
        made("sop", bert, tmp_path, documents=["a cat"] * 40)
    with pytest.raises(ConfigError, match="context is 10"):
        made("sop", bert, tmp_path, context=10)
    with pytest.raises(ConfigError, match="cls and a sep"):
        made("sop", tokenizer, tmp_path)
    config = TrainConfig(context=27, out=str(tmp_path))
    with pytest.raises(ConfigError, match="heads for lm, nsp, and none for sop"):
        sop_pairs(DOCUMENTS, bert, model_of(bert, "pretraining"), config, "all")
