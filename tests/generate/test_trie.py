import random

import pytest
import torch

from polyhead.errors import DataError
from polyhead.generate.sampling.forced_words import Progress, allot
from polyhead.generate.sampling.trie import Trie


@pytest.mark.parametrize("seed", range(6))
def test_a_trie_allows_what_some_run_goes_on_with(seed):
    rng = random.Random(seed)
    size = rng.choice([2, 9, 40])
    runs = {
        tuple(rng.randrange(size) for _ in range(rng.randint(1, 6)))
        for _ in range(rng.choice([1, 7, 300]))
    }
    trie = Trie(runs)
    assert len(trie) == len(runs)
    assert trie.max_token == max(token for run in runs for token in run)
    prefixes = [run[:n] for run in runs for n in range(len(run) + 1)]
    prefixes += [(size,), (0, size)]
    for prefix in rng.sample(prefixes, min(len(prefixes), 60)):
        node = 0
        for token in prefix:
            node = trie.step(node, token)
        follows = {run[len(prefix)] for run in runs if run[: len(prefix)] == prefix < run}
        ends = {size + 1} if prefix in runs or not follows else set()
        mask = trie.allowed([node, 0], [[size + 1], []], size + 2)
        assert set(mask[0].nonzero()[:, 0].tolist()) == follows | ends
        assert set(mask[1].nonzero()[:, 0].tolist()) == {run[0] for run in runs}
        assert trie.is_leaf(node) == (not follows)


@pytest.mark.parametrize("runs", [[], [()], [(1, 2), ()]])
def test_a_trie_without_runs_is_refused(runs):
    with pytest.raises(DataError, match="a trie needs runs"):
        Trie(runs)


def test_a_trie_does_not_change():
    trie = Trie([(1, 2)])
    with pytest.raises(ValueError, match="read-only"):
        trie._tokens[0] = 5


@pytest.mark.parametrize(
    ("entries", "text", "remaining", "wanted"),
    [
        ([[(5, 6)]], [], 2, {5}),
        ([[(5, 6)]], [5], 1, {6}),
        ([[(5, 6)]], [5, 7], 2, {5}),
        ([[(5, 6)]], [5, 5], 1, {6}),
        ([[(5, 6)]], [5, 5, 6], 0, set()),
        ([[(1, 1, 2)]], [1, 1, 1], 1, {2}),
        ([[(1, 1, 2)]], [1, 1, 1, 2, 9], 0, set()),
        ([[(5, 6), (5, 8, 9), (4,)]], [5], 1, {6, 8, 4}),
        ([[(5, 6), (5, 8, 9), (4,)]], [5, 8], 1, {5, 9, 4}),
        ([[(5, 6), (5, 8, 9), (4,)]], [5, 4], 0, set()),
        ([[(5, 6)], [(6, 7)]], [5, 6], 1, {7}),
        ([[(5, 6)], [(6, 7)]], [6, 7], 2, {5}),
        ([[(5, 6)], [(6, 7)]], [6, 5, 6, 7], 0, set()),
        ([[(1, 2, 3)], [(2,)]], [1, 2], 1, {3}),
        ([[(5,)], [(5,)]], [5], 0, set()),
        ([[(5,)], [(5, 6)]], [5], 1, {6}),
    ],
)
def test_forced_words_know_how_far_a_text_is(entries, text, remaining, wanted):
    progress = Progress.start(entries)
    for token in text:
        progress = progress.after(token)
    assert (progress.remaining, set(progress.wanted)) == (remaining, wanted)
    assert progress.is_done == (not remaining)


def test_what_is_wanted_always_leads_to_the_end():
    for seed in range(50):
        rng = random.Random(seed)
        sizes = [[rng.randint(1, 4) for _ in range(rng.randint(1, 3))] for _ in range(3)]
        entries = [[tuple(rng.choices(range(4), k=n)) for n in some] for some in sizes]
        progress, text = Progress.start(entries), []
        most = progress.remaining
        while not progress.is_done:
            text.append(min(progress.wanted, key=lambda token: progress.after(token).remaining))
            progress = progress.after(text[-1])
            assert len(text) <= most
        runs = [tuple(text[i : i + n]) for n in range(1, 5) for i in range(len(text))]
        assert all(any(w in runs for w in entry) for entry in entries)


def test_candidates_of_every_bank_go_on():
    scores = [-1.0, -2.0, -3.0, -9.0, -8.0, -20.0]
    banks = [0, 0, 0, 1, 1, 2]
    assert allot(scores, banks, 4) == [5, 4, 0, 3]
    assert allot(scores, banks, 9) == [5, 4, 0, 3, 1, 2]
    assert allot([], [], 2) == []


def test_masks_are_booleans_of_the_head():
    assert Trie([(1,)]).allowed([0], [[]], 4).dtype == torch.bool
