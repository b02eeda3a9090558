import math

import pytest
import torch

from polyhead.errors import ConfigError, DataError, FileError
from polyhead.models.ngram import NGram

IDS = [1, 2, 3, 1, 2, 4, 1, 2, 3, 0, 1, 2, 3, 3, 4, 0] * 6 + [5, 1, 5, 5, 2, 0, 0, 3, 1, 1, 4]
VOCAB = 7  # id 6 is never seen


def kneser_ney(ids, order, vocab):
    """The textbook's recursion over dictionaries; gives p(token, context)."""
    grams = {k: {} for k in range(1, order + 1)}
    for k in grams:
        for i in range(len(ids) - k + 1):
            gram = tuple(ids[i : i + k])
            grams[k][gram] = grams[k].get(gram, 0) + 1
    counts = {order: grams[order]}
    for k in range(1, order):
        before = dict.fromkeys(grams[k], 0)
        for longer in grams[k + 1]:
            before[longer[1:]] += 1
        counts[k] = {gram: max(1, n) for gram, n in before.items()}

    def discounts(k):
        n = [sum(c == i for c in counts[k].values()) for i in (1, 2, 3, 4)]
        if not all(n):
            return 0.5, 0.75, 0.9
        y = n[0] / (n[0] + 2 * n[1])
        return tuple(min(max(i - (i + 1) * y * n[i] / n[i - 1], 0.05), i) for i in (1, 2, 3))

    taken = {k: discounts(k) for k in counts}

    def p(token, context):
        lower = 1 / vocab if not context else p(token, context[1:])
        k = len(context) + 1
        row = {g[-1]: c for g, c in counts[k].items() if g[:-1] == tuple(context)}
        if not row:
            return lower
        freed = sum(taken[k][min(c, 3) - 1] for c in row.values())
        count = row.get(token, 0)
        kept = max(count - taken[k][min(count, 3) - 1], 0) if count else 0
        return (kept + freed * lower) / sum(row.values())

    return p


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_equals_the_definition(order):
    p = kneser_ney(IDS, order, VOCAB)
    model = NGram(VOCAB, order).fit(IDS)
    text = [1, 2, 3, 1, 6, 1, 2, 4, 0, 5, 5, 5, 3, 3]
    # A context that was not seen is shortened, token by token.
    wanted = [math.log(p(token, text[max(0, t - order + 1) : t])) for t, token in enumerate(text)]
    torch.testing.assert_close(model.log_probs(text), torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("context", [[], [1], [1, 2], [6, 1, 2], [6, 6, 6], IDS])
def test_next_token_is_a_distribution_and_agrees_with_log_probs(context):
    model = NGram(VOCAB, 4).fit(IDS)
    p = model.next_probs(context)
    assert p.sum() == pytest.approx(1)
    assert (p > 0).all()
    for token in range(VOCAB):
        assert model.log_probs([*context, token])[-1].exp() == pytest.approx(float(p[token]))


def test_the_best_order_is_that_of_the_source():
    # A token is decided by the three before it; two say nothing.
    random = torch.Generator().manual_seed(0)
    row = [0, 1, 1]
    for _ in range(4000):
        noise = int(torch.rand((), generator=random) < 0.05)
        row.append((row[-1] ^ row[-2] ^ row[-3] ^ noise) if len(row) % 50 else 1)
    model = NGram.best(row, 2, orders=(1, 2, 3, 4))
    assert model.order == 4
    assert (
        model.bits_per_byte(row, len(row)) < 0.5 < NGram(2, 3).fit(row).bits_per_byte(row, len(row))
    )


def test_longer_contexts_help_on_real_text():
    text = (NGram.__doc__ or "") * 3 + "".join(chr(97 + i % 7) for i in range(300))
    ids = list(text.encode())
    bits = [NGram(256, order).fit(ids).bits_per_byte(ids, len(ids)) for order in (1, 2, 4)]
    assert bits == sorted(bits, reverse=True)


def test_save_and_load(tmp_path):
    model = NGram(VOCAB, 3).fit(IDS)
    model.save(tmp_path)
    loaded = NGram.load(tmp_path)
    assert torch.equal(loaded.log_probs(IDS), model.log_probs(IDS))
    assert loaded.generate([1], 20, seed=1) == model.generate([1], 20, seed=1)
    with pytest.raises(FileError, match="already holds"):
        model.save(tmp_path)
    model.save(tmp_path, force=True)
    with pytest.raises(FileError, match="no n-gram model"):
        NGram.load(tmp_path / "nothing")


def test_a_text_shorter_than_the_order():
    assert NGram(VOCAB, 6).fit([1, 2]).next_probs([1]).argmax() == 2


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: NGram(VOCAB).fit([]), DataError),
        (lambda: NGram(VOCAB).fit([1, 7]), DataError),
        (lambda: NGram(VOCAB).fit(IDS).log_probs([-1]), DataError),
        (lambda: NGram.best([1], VOCAB, held_out=1.0), DataError),
        (lambda: NGram(VOCAB, 0), ConfigError),
    ],
)
def test_what_cannot_be(call, error):
    with pytest.raises(error):
        call()
