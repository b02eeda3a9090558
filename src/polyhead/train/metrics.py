"""What each field measures answers by. Plain lists and arrays in, numbers out; higher is better."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyhead.errors import ConfigError, DataError


def accuracy(predicted: Sequence[Any], labels: Sequence[Any]) -> float:
    """Share of answers that are right; of rows with several labels each, of rows all right."""
    predicted, labels = _pair(predicted, labels)
    same = predicted == labels
    return float(same.reshape(len(same), -1).all(1).mean())


def macro_f1(predicted: Sequence[Any], labels: Sequence[Any], num_classes: int) -> float:
    """Mean over classes of each one's F1; a class that is neither there nor answered is left out.

    Class numbers [N], or 0 and 1 for each class [N, C].
    """
    predicted, labels = _pair(predicted, labels)
    if predicted.ndim == 1:
        classes = np.arange(num_classes)
        predicted, labels = predicted[:, None] == classes, labels[:, None] == classes
    hits = (predicted & labels).sum(0) if predicted.dtype == bool else (predicted * labels).sum(0)
    both = predicted.sum(0) + labels.sum(0)
    there = both > 0
    return float((2 * hits[there] / both[there]).mean()) if there.any() else 0.0


def pearson(predicted: Sequence[float], labels: Sequence[float]) -> float:
    """Linear correlation; 0 where one side does not vary."""
    x, y = (np.asarray(side, np.float64) for side in _pair(predicted, labels))
    x, y = x - x.mean(), y - y.mean()
    norm = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / norm) if norm > 0 else 0.0


def spearman(predicted: Sequence[float], labels: Sequence[float]) -> float:
    """Correlation of the ranks, ties sharing theirs; 0 where one side does not vary."""
    return pearson(_ranks(predicted), _ranks(labels))


def _ranks(values: Sequence[float]) -> Any:
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def token_f1(predicted: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]) -> float:
    """Micro F1 of the tokens' tags, "O" being no answer."""
    pairs = [pair for row in zip(predicted, labels, strict=True) for pair in zip(*row, strict=True)]
    hits = sum(p == t != "O" for p, t in pairs)
    return _f1(hits, sum(p != "O" for p, _ in pairs), sum(t != "O" for _, t in pairs))


def entity_f1(predicted: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]) -> float:
    """Micro F1 of whole entities, kind and both ends right, as seqeval (and conlleval) find them.

    Tags are "O", or B-, I-, E- or S- and a kind; "I-" begins an entity where none of its kind runs.
    """
    found = {(row, *e) for row, tags in enumerate(predicted) for e in entities(tags)}
    true = {(row, *e) for row, tags in enumerate(labels) for e in entities(tags)}
    return _f1(len(found & true), len(found), len(true))


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(kind, first, last) of every entity of a row of tags."""
    found: list[tuple[str, int, int]] = []
    before, kind, first = "O", "", 0
    for at, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        runs_on = prefix in ("I", "E") and before in ("B", "I") and name == kind
        if before != "O" and not runs_on:
            found.append((kind, first, at - 1))
        if not runs_on:
            first = at
        before, kind = prefix, name
    return found


def _f1(hits: int, found: int, true: int) -> float:
    return 2 * hits / (found + true) if found + true else 0.0


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normal_answer(text: str) -> str:
    """An answer without case, punctuation, articles and odd spaces (Rajpurkar et al. 2016)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Share of answers that equal one of theirs, once normalised; no answer is ""."""
    return _best(predicted, answers, lambda p, a: float(normal_answer(p) == normal_answer(a)))


def answer_f1(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Mean F1 of the words of an answer and the nearest of the right ones, as SQuAD counts it."""
    return _best(predicted, answers, _words_f1)


def _best(
    predicted: Sequence[str],
    answers: Sequence[Sequence[str]],
    score: Callable[[str, str], float],
) -> float:
    best = [
        max(score(mine, one) for one in (right or [""]))
        for mine, right in zip(predicted, answers, strict=True)
    ]
    return sum(best) / len(best)


def _words_f1(predicted: str, answer: str) -> float:
    mine, right = normal_answer(predicted).split(), normal_answer(answer).split()
    if not mine or not right:
        return float(mine == right)
    return _f1((Counter(mine) & Counter(right)).total(), len(mine), len(right))


def recall_at(scores: Any, right: Sequence[int], k: int) -> float:
    """Share of rows of scores [N, M] whose right column is among the k highest.

    Columns that score the same as the right one stand before it: constant scores find nothing.
    """
    scores = np.asarray(scores)
    own = scores[np.arange(len(scores)), np.asarray(right)][:, None]
    return float(((scores >= own).sum(1) <= k).mean())


@dataclass(frozen=True)
class Interval:
    """A figure of a corpus, and where 95 % of resampled corpora lie."""

    score: float
    low: float
    high: float


def bleu(
    predicted: Sequence[str],
    references: Sequence[str],
    *,
    resamples: int = 1000,
    tokenize: str = "13a",
) -> Interval:
    """Corpus BLEU through sacrebleu, 0 to 100, with its bootstrap (Koehn 2004; seeded)."""
    return _corpus_score(_sacrebleu().BLEU(tokenize=tokenize), predicted, references, resamples)


def chrf(predicted: Sequence[str], references: Sequence[str], *, resamples: int = 1000) -> Interval:
    """Corpus chrF2 through sacrebleu, 0 to 100, with its bootstrap."""
    return _corpus_score(_sacrebleu().CHRF(), predicted, references, resamples)


def _sacrebleu() -> Any:
    try:
        from sacrebleu import metrics
    except ImportError:
        raise ConfigError("BLEU and chrF need sacrebleu: pip install 'polyhead[eval]'") from None
    return metrics


def _corpus_score(
    metric: Any, predicted: Sequence[str], references: Sequence[str], resamples: int
) -> Interval:
    if len(predicted) != len(references) or not predicted:
        raise DataError(
            f"{len(predicted)} answers and {len(references)} references: give one for each"
        )
    found = metric.corpus_score(predicted, [references], n_bootstrap=max(1, resamples))
    if resamples < 2:
        return Interval(found.score, found.score, found.score)
    # sacrebleu gives the middle of the resampled scores and half of the interval's width.
    middle, half = float(found._mean), float(found._ci)
    return Interval(found.score, middle - half, middle + half)


def _pair(predicted: Any, labels: Any) -> tuple[Any, Any]:
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    if predicted.shape != labels.shape or not len(labels):
        raise DataError(f"answers {predicted.shape} and labels {labels.shape} do not pair up")
    return predicted, labels
