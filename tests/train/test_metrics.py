import builtins
import string

import numpy as np
import pytest
import sacrebleu
import scipy.stats
import sklearn.metrics

from polyhead.errors import ConfigError, DataError
from polyhead.train import metrics

SEEDS = range(5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_classes_against_scikit_learn(seed, classes):
    draw = np.random.default_rng(seed)
    # One class is never there nor answered: sklearn leaves it out as well.
    predicted, labels = draw.integers(classes, size=(2, 20))
    assert metrics.accuracy(predicted, labels) == pytest.approx(
        sklearn.metrics.accuracy_score(labels, predicted)
    )
    expected = sklearn.metrics.f1_score(labels, predicted, average="macro", zero_division=0)
    assert metrics.macro_f1(predicted, labels, classes + 1) == pytest.approx(expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_several_labels_against_scikit_learn(seed):
    predicted, labels = np.random.default_rng(seed).integers(2, size=(2, 30, 4))
    assert metrics.accuracy(predicted, labels) == pytest.approx(
        sklearn.metrics.accuracy_score(labels, predicted)
    )
    assert metrics.macro_f1(predicted, labels, 4) == pytest.approx(
        sklearn.metrics.f1_score(labels, predicted, average="macro", zero_division=0)
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_correlations_against_scipy(seed):
    draw = np.random.default_rng(seed)
    x, y = draw.normal(size=(2, 25)).round(1)  # with ties
    assert metrics.pearson(x, y) == pytest.approx(scipy.stats.pearsonr(x, y).statistic)
    assert metrics.spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert metrics.pearson(x, np.ones(25)) == metrics.spearman(np.ones(25), y) == 0.0


# What conlleval and seqeval's default mode count, by their own documentation.
ENTITIES = [
    ("B-PER I-PER O B-LOC", [("PER", 0, 1), ("LOC", 3, 3)]),
    ("B-PER B-PER", [("PER", 0, 0), ("PER", 1, 1)]),
    ("I-PER I-PER", [("PER", 0, 1)]),
    ("I-PER I-LOC", [("PER", 0, 0), ("LOC", 1, 1)]),
    ("B-PER I-LOC I-LOC", [("PER", 0, 0), ("LOC", 1, 2)]),
    ("O O", []),
    ("B-A I-A E-A O S-B S-B", [("A", 0, 2), ("B", 4, 4), ("B", 5, 5)]),
    ("E-A I-A", [("A", 0, 0), ("A", 1, 1)]),
    ("B-PER O I-PER", [("PER", 0, 0), ("PER", 2, 2)]),
]


@pytest.mark.parametrize(("tags", "expected"), ENTITIES)
def test_entities(tags, expected):
    assert metrics.entities(tags.split()) == expected


def test_entity_f1_counts_whole_entities():
    true = [["O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    mine = [["B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    assert metrics.entity_f1(mine, true) == pytest.approx(0.5)  # seqeval's README
    assert metrics.entity_f1(true, true) == 1.0
    assert metrics.entity_f1([["O"]], [["O"]]) == 0.0


@pytest.mark.parametrize("seed", SEEDS)
def test_token_f1_against_scikit_learn(seed):
    draw = np.random.default_rng(seed)
    names = np.array(["O", "A", "B"])
    mine, true = names[draw.integers(3, size=(2, 6, 9))]
    expected = sklearn.metrics.f1_score(
        true.ravel(), mine.ravel(), labels=["A", "B"], average="micro", zero_division=0
    )
    assert metrics.token_f1(mine.tolist(), true.tolist()) == pytest.approx(expected)


# Worked out by hand from the rules of SQuAD's evaluation script.
ANSWERS = [
    ("The Cat.", ["cat"], 1.0, 1.0),
    ("a big cat", ["the cat", "dog"], 0.0, 2 / 3),
    ("cat cat", ["cat"], 0.0, 2 / 3),
    ("(in) 1,066", ["in 1066"], 1.0, 1.0),
    ("", [], 1.0, 1.0),
    ("", ["cat"], 0.0, 0.0),
    ("cat", [], 0.0, 0.0),
    ("the", [""], 1.0, 1.0),
    ("an-other naïve theory", ["another naïve  theory"], 1.0, 1.0),
    ("one two three", ["three two four"], 0.0, 2 / 3),
]


@pytest.mark.parametrize(("mine", "right", "exact", "f1"), ANSWERS)
def test_answers_as_squad_counts_them(mine, right, exact, f1):
    assert metrics.exact_match([mine], [right]) == exact
    assert metrics.answer_f1([mine], [right]) == pytest.approx(f1)
    assert metrics.answer_f1([mine, "x"], [right, ["x"]]) == pytest.approx((f1 + 1) / 2)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_recall_by_counting(k):
    scores = np.random.default_rng(k).normal(size=(12, 10))
    right = np.random.default_rng(1).integers(10, size=12)
    hits = [
        r in sorted(range(10), key=lambda c: -row[c])[:k]
        for row, r in zip(scores, right, strict=True)
    ]
    assert metrics.recall_at(scores, right, k) == pytest.approx(np.mean(hits))
    assert metrics.recall_at(np.zeros((4, 11)), [0, 1, 2, 3], k) == 0.0


def sentences(seed: int) -> tuple[list[str], list[str]]:
    draw = np.random.default_rng(seed)
    true = [" ".join(draw.choice(list(string.ascii_lowercase[:6]), size=9)) for _ in range(40)]
    mine = [" ".join(w if draw.random() > 0.2 else "z" for w in line.split()) for line in true]
    return mine, true


@pytest.mark.parametrize("seed", SEEDS)
def test_translations_against_sacrebleu(seed):
    mine, true = sentences(seed)
    bleu, chrf = metrics.bleu(mine, true, resamples=100), metrics.chrf(mine, true, resamples=0)
    assert bleu.score == pytest.approx(sacrebleu.corpus_bleu(mine, [true]).score)
    assert chrf.score == pytest.approx(sacrebleu.corpus_chrf(mine, [true]).score)
    assert chrf.low == chrf.high == chrf.score
    assert bleu.low < bleu.score < bleu.high
    # Resampling by hand, with random numbers of its own.
    draw = np.random.default_rng(seed)
    drawn = []
    for _ in range(200):
        rows = draw.integers(len(mine), size=len(mine))
        drawn.append(
            sacrebleu.corpus_bleu([mine[r] for r in rows], [[true[r] for r in rows]]).score
        )
    low, high = np.percentile(drawn, [2.5, 97.5])
    width = high - low
    assert abs(bleu.low - low) < width / 3
    assert abs(bleu.high - high) < width / 3
    assert metrics.bleu(mine, true, resamples=100) == bleu


def test_what_is_missing_or_uneven_is_said(monkeypatch):
    with pytest.raises(DataError, match="1 answers and 2 references"):
        metrics.bleu(["a"], ["a", "b"])
    with pytest.raises(DataError, match="do not pair up"):
        metrics.accuracy([1, 2], [1])
    real = builtins.__import__

    def refuse(name, *rest):
        if name == "sacrebleu":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"polyhead\[eval\]"):
        metrics.chrf(["a"], ["a"])
