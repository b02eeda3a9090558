"""Every transform beside transformers' own, or beside a plain second derivation."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from polyhead.generate.sampling import bans, filters, guidance, mirostat, penalties

hf = pytest.importorskip("transformers.generation.logits_process")
SHAPES = [(1, 40, 12, 0), (4, 97, 30, 1), (7, 600, 5, 2)]
INF = math.inf


def some(shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """Logits `[N, V]`, of which some are removed, and tokens `[N, L]` that come again."""
    rows, vocab, length, seed = shape
    torch.manual_seed(seed)
    logits = torch.randn(rows, vocab) * 3
    logits = logits.masked_fill(torch.rand(rows, vocab) < 0.1 * seed, -INF)
    return logits, torch.randint(6, (rows, length))


def ragged(tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Rows cut to different lengths, with -1 before them, and each as it is alone."""
    lengths = [max(tokens.shape[1] - 3 * row, 2) for row in range(len(tokens))]
    padded = tokens.clone()
    for row, length in enumerate(lengths):
        padded[row, : tokens.shape[1] - length] = -1
    return padded, [tokens[row : row + 1, -length:] for row, length in enumerate(lengths)]


def check(got: Tensor, logits: Tensor, tokens: list[Tensor], processors: list) -> None:
    for row, processor in enumerate(processors):
        expected = processor(tokens[row], logits[row : row + 1].clone())
        torch.testing.assert_close(got[row : row + 1], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("ours", "theirs", "values"),
    [
        (filters.keep_typical, hf.TypicalLogitsWarper, (0.2, 0.9, 0.5, 0.99, 0.01, 0.7, 0.3)),
        (filters.keep_epsilon, hf.EpsilonLogitsWarper, (1e-3, 0.3, 0.02, 0.9, 1e-6, 0.1, 0.05)),
        (filters.keep_eta, hf.EtaLogitsWarper, (1e-3, 0.3, 0.02, 0.9, 1e-6, 0.1, 0.05)),
    ],
    ids=["typical", "epsilon", "eta"],
)
def test_filters_equal_transformers(shape, ours, theirs, values):
    logits, tokens = some(shape)
    values = values[: len(logits)]
    processors = [theirs(value) for value in values]
    check(ours(logits, torch.tensor(values)), logits, list(tokens[:, None]), processors)


def test_filters_that_are_off_keep_all():
    logits, _ = some(SHAPES[1])
    off = torch.zeros(len(logits))
    assert torch.equal(filters.keep_typical(logits, off + 1), logits)
    assert torch.equal(filters.keep_epsilon(logits, off), logits)
    assert torch.equal(filters.keep_eta(logits, off), logits)


@pytest.mark.parametrize("shape", SHAPES)
def test_penalties_of_ragged_rows_equal_transformers(shape):
    logits, tokens = some(shape)
    padded, alone = ragged(tokens)
    values = [1.3, 0.7, 2.0, 1.0, 5.0, 1.1, 0.5][: len(logits)]
    got = penalties.penalize_repetition(logits, padded, torch.tensor(values))
    check(got, logits, alone, [hf.RepetitionPenaltyLogitsProcessor(value) for value in values])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_repeated_ngrams_are_banned_as_in_transformers(shape, size):
    logits, tokens = some(shape)
    padded, alone = ragged(tokens)
    got = bans.ban_repeated_ngrams(logits, padded, size)
    check(got, logits, alone, [hf.NoRepeatNGramLogitsProcessor(size)] * len(logits))


@pytest.mark.parametrize("shape", SHAPES)
def test_biases_of_runs_equal_transformers(shape):
    logits, tokens = some(shape)
    padded, alone = ragged(tokens)
    torch.manual_seed(3)
    runs = {tuple(torch.randint(6, (size,)).tolist()): float(size) for size in (1, 2, 2, 2, 3, 3)}
    runs |= {(*alone[0][0, -2:].tolist(), 5): -INF, (9,): 0.5}
    width = max(map(len, runs)) - 1
    starts = torch.tensor([[-1] * (width - len(r) + 1) + list(r[:-1]) for r in runs])
    last = torch.tensor([r[-1] for r in runs])
    got = bans.bias_runs(logits, padded, starts, last, torch.tensor(list(runs.values())))
    check(got, logits, alone, [hf.SequenceBiasLogitsProcessor(runs)] * len(logits))


def test_ends_are_favored_as_in_transformers():
    logits, tokens = some(SHAPES[1])
    ends, length = [3, 8], tokens.shape[1]
    for start in (-5, -1, 0, 4):
        processor = hf.ExponentialDecayLengthPenalty((start, 1.07), ends, length - 3)
        entries = torch.tensor([(row, end, 3 - start) for row in range(4) for end in ends])
        factor = torch.full((len(entries),), 1.07)
        got = penalties.favor_ends(logits, *entries.unbind(1), factor)
        check(got, logits, list(tokens[:, None]), [processor] * 4)


def test_what_a_prefix_allows_is_as_in_transformers():
    logits, tokens = some(SHAPES[1])
    allowed = torch.rand_like(logits) < 0.2
    allowed[0] &= logits[0] == -INF  # nothing else is left: then it comes all the same
    processor = hf.PrefixConstrainedLogitsProcessor(
        lambda row, _: allowed[row].nonzero()[:, 0].tolist(), 1
    )
    assert torch.equal(bans.keep_allowed(logits, allowed), processor(tokens, logits))


def test_forced_tokens_are_the_only_ones():
    logits, _ = some(SHAPES[1])
    got = bans.force(logits, torch.tensor([1, 3]), torch.tensor([5, 96]))
    assert torch.equal(got[[0, 2]], logits[[0, 2]])
    assert got[1].isfinite().nonzero().tolist() == [[5]]
    assert (got[1, 5], got[3, 96]) == (0, 0)


@pytest.mark.parametrize("scale", [1.0, 1.5, 4.0, 0.3])
def test_guidance_equals_transformers(scale):
    logits, tokens = some(SHAPES[1])
    away = torch.randn(4, 97)

    def model(*_, **__):
        return type("Out", (dict,), {"logits": away[:, None]})()

    theirs = hf.UnbatchedClassifierFreeGuidanceLogitsProcessor(scale, model)
    got = guidance.guide(logits, away, torch.full((4,), scale))
    torch.testing.assert_close(got, theirs(tokens, logits), rtol=1e-5, atol=1e-5)


def dry(row: list[int], breaks: set[int], multiplier: float, base: float, allowed: int) -> dict:
    """The loss of each token, by the words of its inventor: look for every end of a run."""
    losses: dict[int, float] = {}
    for place in range(len(row) - 1):
        size = 0
        while (
            size <= place and row[place - size] == row[-1 - size] and row[-1 - size] not in breaks
        ):
            size += 1
        token = row[place + 1]
        if size >= max(allowed, 1) and token not in breaks:
            loss = multiplier * base ** (size - allowed)
            losses[token] = max(losses.get(token, 0.0), loss)
    return losses


@pytest.mark.parametrize("alphabet", [1, 2, 4, 9])
@pytest.mark.parametrize("length", [2, 9, 80, 200])
def test_runs_are_penalized_as_told(alphabet, length):
    torch.manual_seed(alphabet * length)
    logits = torch.randn(5, 12)
    tokens = torch.randint(alphabet, (5, length))
    padded, alone = ragged(tokens)
    breaks = {3, 8}
    values = [(0.8, 1.75, 2), (1.0, 1.1, 1), (0.5, 1.0, 4), (2.0, 1.2, 3), (0.0, 2.0, 1)]
    multiplier, base, allowed = map(torch.tensor, zip(*values, strict=True))
    is_break = torch.isin(padded, torch.tensor(sorted(breaks)))
    got = penalties.penalize_runs(logits, padded, is_break, multiplier, base, allowed)
    for row, (m, b, a) in enumerate(values):
        expected = logits[row].clone()
        for token, loss in dry(alone[row][0].tolist(), breaks, m, b, a).items():
            expected[token] -= loss
        most = torch.tensor(-1e30)  # what float32 holds is not more by much
        torch.testing.assert_close(got[row].max(most), expected.max(most), rtol=1e-5, atol=1e-4)


def test_a_run_of_any_length_leaves_numbers():
    tokens = torch.zeros(1, 3000, dtype=torch.long)
    one = torch.ones(1)
    got = penalties.penalize_runs(
        torch.zeros(1, 4), tokens, tokens > 0, one, one * 1.75, one.long() * 2
    )
    assert got[0, 0] < -1e30
    assert not got.isnan().any()


def plain_mirostat_2(probabilities: list[float], mu: float) -> set[int]:
    """Tokens of at most mu bits, and the best one."""
    best = max(range(len(probabilities)), key=probabilities.__getitem__)
    return {best} | {i for i, p in enumerate(probabilities) if p > 0 and -math.log2(p) <= mu}


def plain_mirostat_1(probabilities: list[float], mu: float) -> int:
    """k of the paper's algorithm 1."""
    ranked = sorted(probabilities, reverse=True)[:100]
    pairs = list(itertools.pairwise(ranked))
    t = [math.log((i + 2) / (i + 1)) for i in range(len(pairs))]
    b = [math.log(high / low) for high, low in pairs]
    s = sum(x * y for x, y in zip(t, b, strict=True)) / sum(x * x for x in t)
    epsilon, n = s - 1, len(probabilities)
    k = (epsilon * 2**mu / (1 - n**-epsilon)) ** (1 / s)
    return int(min(max(k, 1), n))


@pytest.mark.parametrize("vocab", [60, 500])
def test_mirostat_keeps_what_the_paper_keeps(vocab):
    torch.manual_seed(vocab)
    logits = torch.randn(6, vocab).double() * torch.tensor([0.5, 1, 2, 3, 4, 5.0])[:, None]
    mu = torch.tensor([0.0, 3.0, 5.0, 9.0, 2.0, 14.0]).double()
    second, first = mirostat.keep_unsurprising(logits, mu), mirostat.keep_zipf(logits, mu)
    for row, likely in enumerate(logits.softmax(1).tolist()):
        kept = set(second[row].isfinite().nonzero()[:, 0].tolist())
        assert kept == plain_mirostat_2(likely, float(mu[row]))
        assert first[row].isfinite().sum() == plain_mirostat_1(likely, float(mu[row]))


def test_mirostat_holds_the_surprise_of_a_text():
    torch.manual_seed(0)
    mu, tau, eta = torch.tensor([6.0]), 3.0, 0.1
    seen = []
    for _ in range(400):
        kept = mirostat.keep_unsurprising(torch.randn(1, 300) * 2, mu)
        ids = kept.softmax(1).multinomial(1)[:, 0]
        bits = mirostat.surprise(kept, ids)
        mu = mirostat.follow(mu, bits, tau, eta)
        seen.append(float(bits))
    assert abs(sum(seen[100:]) / 300 - 3.0) < 0.15
