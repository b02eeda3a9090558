import numpy as np
import pytest
import torch
import torch.nn.functional as F

import polyhead as ph
from polyhead.errors import ConfigError
from polyhead.nn.head import MaskedLanguageHead
from polyhead.text.tokenizer import Tokenizer
from polyhead.train import objectives
from polyhead.train.config import TrainConfig
from polyhead.train.corpus import load_tokens
from polyhead.train.data import Windows
from polyhead.train.masked import (
    Frame,
    Masking,
    drawn,
    hit_rate,
    masked_lm,
    masked_windows,
    span_lengths,
)
from polyhead.train.objectives import IGNORE, LanguageBatch
from polyhead.train.words import words_of

from .conftest import text

LONG = "unbelievably interesting sentences, misunderstandings and 42 well-known counterexamples."


def encoder(vocab_size: int, **fields):
    sizes = {"d_model": 16, "num_layers": 1, "num_heads": 2, "max_seq_len": 64, "d_ff": 32}
    return ph.build(
        "transformer", kind="encoder", seed=0, vocab_size=vocab_size, **{**sizes, **fields}
    )


@pytest.fixture(scope="module")
def bert() -> Tokenizer:
    return Tokenizer.train([text(50), LONG * 3], kind="wordpiece", vocab_size=80)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    special = {"mask": "<mask>", "cls": "<s>", "sep": "</s>"}
    texts = [text(50), LONG * 3, "naïve café"]
    return Tokenizer.train(texts, kind="bpe", vocab_size=300, special_tokens=special)


def row_of(tokenizer: Tokenizer, seed: int = 0, length: int = 400) -> np.ndarray:
    """Words, with special tokens among them."""
    rng = np.random.default_rng(seed)
    ids = tokenizer.encode(
        (text(1, seed) + LONG + "thematflat onsawthat. ") * 5, add_special_tokens=False
    )
    ids = np.array(ids * 3)[:length].astype(np.int64)
    special = sorted(tokenizer.special_ids)
    ids[rng.choice(length, 12, replace=False)] = rng.choice(special, 12)
    return ids


@pytest.mark.parametrize("choice", ["token", "word", "span"])
@pytest.mark.parametrize("length", [30, 400])
@pytest.mark.parametrize("kind", ["bert", "bpe"])
def test_what_is_hidden(choice, length, kind, request):
    tokenizer = request.getfixturevalue(kind)
    masking = Masking.of(tokenizer, choice)
    special = list(tokenizer.special_ids)
    counts = {"chosen": 0, "mask": 0, "same": 0, "other": 0, "ordinary": 0}
    for n in range(200):
        ids = row_of(tokenizer, n % 5, length)
        hidden, labels = masking(ids, drawn(3, n))
        chosen = labels != IGNORE
        ordinary = ~np.isin(ids, special)
        assert not (chosen & ~ordinary).any()
        assert (labels[chosen] == ids[chosen]).all()
        assert (hidden[~chosen] == ids[~chosen]).all()
        budget = round(0.15 * ordinary.sum())
        if choice == "span":
            at, group = masking.choose(ids, drawn(3, n))
            assert set(at.tolist()) == set(np.flatnonzero(chosen).tolist())
            for number in np.unique(group):
                assert (np.diff(at[group == number]) == 1).all(), "a span has no gap"
        if choice == "word":
            assert 1 <= chosen.sum() <= budget
        else:
            assert chosen.sum() == budget
        counts["chosen"] += chosen.sum()
        counts["ordinary"] += ordinary.sum()
        counts["mask"] += (hidden[chosen] == tokenizer.mask_id).sum()
        counts["same"] += (hidden[chosen] == ids[chosen]).sum()
        others = hidden[chosen & (hidden != ids) & (hidden != tokenizer.mask_id)]
        assert not np.isin(others, special).any()
        counts["other"] += len(others)
    assert counts["chosen"] / counts["ordinary"] == pytest.approx(0.15, abs=0.02)
    # At least 200 rows times 4 tokens, in spans of up to some ten: a few standard deviations.
    few = 0.06 if choice == "span" else 0.04
    assert counts["mask"] / counts["chosen"] == pytest.approx(0.8, abs=few)
    assert counts["same"] / counts["chosen"] == pytest.approx(0.1, abs=few)
    assert counts["other"] / counts["chosen"] == pytest.approx(0.1, abs=few)


def test_every_position_and_every_token_has_its_turn(bert):
    masking = Masking.of(bert, mask=0.0, random=1.0)
    ids = np.full(40, bert.vocab["the"])
    seen, drawn_ids = np.zeros(40), set()
    for n in range(400):
        hidden, labels = masking(ids, drawn(0, n))
        seen += labels != IGNORE
        drawn_ids |= set(hidden[labels != IGNORE].tolist())
    # 400 · 6 / 40 = 60 a position, of standard deviation 7.
    assert (np.abs(seen - 60) < 35).all()
    assert drawn_ids == set(range(bert.vocab_size)) - bert.special_ids


def words_by_hand(kind: str, tokens: list[str], special: set[str]) -> list[int]:
    """The number of each token's word."""
    numbers, number = [], -1
    for i, token in enumerate(tokens):
        begins = i == 0 or token in special or tokens[i - 1] in special
        if kind == "bert":
            begins |= not token.startswith("##")
        else:
            begins |= token[0] in "Ġ,.-Ċ" or tokens[i - 1][-1] in ",.-Ċ"
        number += begins
        numbers.append(number)
    return numbers


@pytest.mark.parametrize("kind", ["bert", "bpe"])
def test_words_are_hidden_whole(kind, request):
    tokenizer = request.getfixturevalue(kind)
    masking = Masking.of(tokenizer, "word")
    names = {index: token for token, index in tokenizer.vocab.items()}
    special = {names[i] for i in tokenizer.special_ids}
    split = 0
    for n in range(100):
        ids = row_of(tokenizer, n % 7)
        _, labels = masking(ids, drawn(1, n))
        numbers = np.array(words_by_hand(kind, [names[i] for i in ids.tolist()], special))
        chosen = labels != IGNORE
        for word in np.unique(numbers[chosen]):
            assert chosen[numbers == word].all()
            split += (numbers == word).sum() > 1
    assert split > 100, "no word of several tokens was ever hidden"


def test_the_words_of_every_kind_of_tokenizer():
    cases = {
        "chars": ["the", " cat", ",", " a", "-", "b2", "."],
        "bytes": ["the", " café", ",", " 日本", "!"],
        "bpe": ["the", " café", ",", " a", "-", "b2", "."],
        "wordpiece": ["the", "cat", ",", "a", "-", "b", "."],
        "unigram": ["the", "cat", ",", "a-b."],
    }
    for kind, words in cases.items():
        joined = "".join(words) if kind in ("chars", "bytes", "bpe") else "the cat, a-b."
        tokenizer = Tokenizer.train([joined * 20], kind=kind, min_frequency=1)
        ids = np.array(tokenizer.encode(joined, add_special_tokens=False))
        starts = words_of(tokenizer).starts(ids)
        parts = np.split(ids, np.flatnonzero(starts)[1:])
        found = [tokenizer.decode(part) for part in parts]
        assert [w.strip() for w in found] == [w.strip() for w in words], kind


def test_spans_are_geometric(bert):
    lengths = span_lengths(20_000, 10, drawn(0, 0))
    chance = 0.2 * 0.8 ** np.arange(10)
    mean = (np.arange(1, 11) * chance).sum() / chance.sum()  # 3.797, SpanBERT's 3.8
    assert mean == pytest.approx(3.8, abs=0.01)
    assert lengths.mean() == pytest.approx(mean, abs=0.06)
    counts = np.bincount(lengths, minlength=11)[1:]
    assert (np.abs(counts / 20_000 - chance / chance.sum()) < 0.015).all()
    assert set(span_lengths(500, 1, drawn(0, 0)).tolist()) == {1}
    # In a row: runs as long as that, where single tokens would make runs of 1.2.
    ids = np.full(2000, bert.vocab["the"])
    runs = []
    for n in range(10):
        _, labels = Masking.of(bert, "span")(ids, drawn(5, n))
        edges = np.diff(np.pad((labels != IGNORE).astype(int), 1))
        runs += (np.flatnonzero(edges == -1) - np.flatnonzero(edges == 1)).tolist()
    assert 3.3 < np.mean(runs) < 5.5
    assert Masking.of(bert, "span", max_span=3)(ids, drawn(5, 0))[1].shape == ids.shape


def test_a_span_has_one_fate(bert):
    masking = Masking.of(bert, "span", mask=0.5, random=0.0)
    ids = np.full(100, bert.vocab["the"])
    for n in range(50):
        at, group = masking.choose(ids, drawn(0, n))
        hidden, _ = masking(ids, drawn(0, n))
        assert len(np.unique(group)) < 0.7 * len(at)
        for number in np.unique(group):
            assert len(set(hidden[at[group == number]].tolist())) == 1


def dataset(tokenizer, tmp_path, context=32, **settings):
    config = TrainConfig(context=context, out=str(tmp_path), held_out=0.2, seed=4)
    model = encoder(tokenizer.vocab_size)
    return [
        masked_windows([text(80), text(60, 1)], tokenizer, model, config, split, **settings)
        for split in ("train", "valid", "all")
    ]


@pytest.mark.parametrize("choice", ["token", "word", "span"])
def test_rows_are_arithmetic(bert, tmp_path, choice):
    train, valid, everything = dataset(bert, tmp_path, choice=choice)
    assert len(everything) >= len(train) > len(valid) > 0
    batch = train.batch(3, 8)
    assert batch.input_ids.shape == batch.labels.shape == (8, 32)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert (batch.input_ids[:, 0] == bert.cls_id).all()
    assert (batch.input_ids[:, -1] == bert.sep_id).all()
    again = train.batch(3, 8)
    assert torch.equal(batch.input_ids, again.input_ids)
    assert torch.equal(batch.labels, again.labels)
    halves = [train.batch(i, 4) for i in (6, 7)]
    assert torch.equal(torch.cat([half.input_ids for half in halves]), batch.input_ids)
    whole = torch.where(batch.labels == IGNORE, batch.input_ids, batch.labels)
    assert torch.equal(whole, torch.from_numpy(train.rows(3, 8)))


def test_each_epoch_has_masks_of_its_own(bert):
    size = 30
    tokens = load_ids(bert)
    from polyhead.train.masked import MaskedWindows

    # A corpus of one window has the same row in every epoch.
    windows = Windows(tokens(size + 1), size, seed=0)
    data = MaskedWindows(windows, Masking.of(bert), Frame.of(bert))
    assert len(data) == 1
    first, second = data.batch(0, 1), data.batch(1, 1)
    whole = [torch.where(b.labels == IGNORE, b.input_ids, b.labels) for b in (first, second)]
    assert torch.equal(*whole)
    assert not torch.equal(first.labels, second.labels)
    other = MaskedWindows(Windows(tokens(size + 1), size, seed=1), data.masking, data.frame)
    assert not torch.equal(first.labels, other.batch(0, 1).labels)


def load_ids(tokenizer):
    from polyhead.train.tokens import Tokens

    ids = np.array(tokenizer.encode(text(20), add_special_tokens=False))
    return lambda count: Tokens(ids[:count], count, "digest")


def test_digests_tell_settings_apart(bert, tmp_path):
    found = [dataset(bert, tmp_path, **s)[0].digest for s in ({}, {"ratio": 0.2}, {"mask": 0.7})]
    found += [dataset(bert, tmp_path, choice=c)[0].digest for c in ("word", "span")]
    assert len(set(found)) == 5


def test_documents_end_with_the_separator_and_are_known(bert, tmp_path):
    texts = [text(3), text(2, 1), "a mat"]
    tokens = load_tokens(texts, bert, tmp_path, vocab_size=bert.vocab_size)
    parts = np.split(tokens.ids, tokens.ends)
    assert len(parts[-1]) == 0
    for part, source in zip(parts, texts, strict=False):
        assert part.tolist() == [*bert.encode(source, add_special_tokens=False), bert.sep_id]
    for held in (2, 10, 40, len(parts[2]), len(parts[2]) + len(parts[1])):
        train, valid = tokens.split(held, bert)
        for side, offset in ((train, 0), (valid, len(train.ids))):
            assert side.ends[-1] == len(side.ids)
            inner = side.ends[:-1] + offset
            assert set(inner.tolist()) <= set(tokens.ends.tolist())
            assert (np.diff(side.ends) > 0).all()
        assert {*train.ends, *(valid.ends + len(train.ids))} >= set(tokens.ends.tolist())


def test_folders_of_old_are_made_again(bert, tmp_path):
    tokens = load_tokens([text(3)], bert, tmp_path, vocab_size=bert.vocab_size)
    next(tmp_path.glob("*/documents.bin")).unlink()
    again = load_tokens([text(3)], bert, tmp_path, vocab_size=bert.vocab_size)
    assert again.digest == tokens.digest
    assert again.ends.tolist() == tokens.ends.tolist() == [len(tokens.ids)]


@pytest.mark.parametrize("chunk", [50, 1 << 24])
@pytest.mark.parametrize("head", ["plain", "bert"])
def test_the_loss_is_that_of_all_positions(bert, tmp_path, chunk, head, monkeypatch):
    monkeypatch.setattr(objectives, "CHUNK_LOGITS", chunk)
    model = encoder(bert.vocab_size, tie_embeddings=False)
    if head == "bert":
        torch.manual_seed(0)
        model.head = MaskedLanguageHead(16, bert.vocab_size)
        torch.nn.init.normal_(model.head.decoder.bias)
    batch = dataset(bert, tmp_path)[0].batch(0, 4)
    logits = model(batch.input_ids)
    wanted = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
    loss = masked_lm(model, batch)
    torch.testing.assert_close(loss.total, wanted)
    assert loss.tokens == batch.tokens() == int((batch.labels != IGNORE).sum())
    torch.testing.assert_close(loss.logits(), logits[batch.labels != IGNORE])
    wanted.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss.total.backward()
    for ours, theirs in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(ours.grad, theirs, rtol=1e-4, atol=1e-5)
    model.eval()
    rate = hit_rate(model, None, [masked_lm(model, batch).answers] * 2)
    with torch.no_grad():
        found = model(batch.input_ids).argmax(-1)[batch.labels != IGNORE]
    right = (found == batch.labels[batch.labels != IGNORE]).float().mean()
    assert rate["accuracy"] == pytest.approx(float(right))


def test_the_head_sees_the_hidden_positions_alone(bert, tmp_path):
    model = encoder(bert.vocab_size)
    model.head = MaskedLanguageHead(16, bert.vocab_size)
    shapes = []
    model.head.dense.register_forward_hook(lambda m, i, o: shapes.append(o.shape[0]))
    batch = dataset(bert, tmp_path)[0].batch(0, 4)
    masked_lm(model, batch)
    assert shapes == [batch.tokens()]
    assert shapes[0] < 0.2 * batch.input_ids.numel()


def test_a_batch_without_a_mask_costs_nothing(bert):
    ids = torch.full((2, 5), bert.sep_id)
    batch = LanguageBatch(ids, torch.full_like(ids, IGNORE))
    model = encoder(bert.vocab_size).eval()
    loss = masked_lm(model, batch)
    assert (float(loss.total.detach()), loss.tokens) == (0.0, 0)
    assert hit_rate(model, None, [loss.answers]) == {"accuracy": 0.0}
    hidden, labels = Masking.of(bert)(ids[0].numpy(), drawn(0, 0))
    assert (labels == IGNORE).all()
    assert (hidden == ids[0].numpy()).all()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"choice": "words"}, "token, word, span"),
        ({"ratio": 0.0}, "ratio is 0.0"),
        ({"mask": 0.95}, "0.95 and 0.1"),
        ({"max_span": 0}, "max_span is 0"),
    ],
)
def test_bad_settings(bert, tokenizer, settings, says):
    with pytest.raises(ConfigError, match=says):
        Masking.of(bert, **settings)
    with pytest.raises(ConfigError, match="no mask token"):
        Masking.of(tokenizer)
