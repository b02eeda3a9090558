"""The sentiment of social posts, from MiniLM, beside TF-IDF and a ridge.

3,500 posts with mean human ratings from -4 to 4 (Hutto and Gilbert 2014). A fifth is held out.
Twice: the rating itself (Pearson), and three classes, below -1, above 1, and between (macro-F1).
The baseline reads words and pairs of words; its strength is chosen on the training posts alone.
"""

import html
import random
import time

import numpy as np
from recipes.common import arguments, best_of, pairs, tell
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import RidgeClassifierCV, RidgeCV
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline

import polyhead as ph
from polyhead.files.hub import resolve
from polyhead.train.config import TrainConfig

CLASSES = ("negative", "neutral", "positive")
STRENGTHS = np.logspace(-2, 2, 9)


def main() -> None:
    given = arguments(__doc__, "posts", epochs=4.0)
    began = time.perf_counter()
    rows = [(float(rating), html.unescape(text)) for rating, text in pairs("posts.tsv")]
    random.Random(0).shuffle(rows)
    cut = len(rows) // 5
    test, train = rows[:cut], rows[cut:]

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    ridge = make_pipeline(words, RidgeCV(STRENGTHS)).fit(_texts(train), _ratings(train))
    pearson_ridge = np.corrcoef(ridge.predict(_texts(test)), _ratings(test))[0, 1]
    ridge = make_pipeline(words, RidgeClassifierCV(STRENGTHS, class_weight="balanced"))
    ridge.fit(_texts(train), _classes(train))
    f1_ridge = f1_score(_classes(test), ridge.predict(_texts(test)), average="macro")

    measured = tune(train, _ratings(train), "regression", ("score",), given)
    found = [result.score for result in measured(_texts(test))]
    pearson = np.corrcoef(found, _ratings(test))[0, 1]
    told = tune(train, _classes(train), None, CLASSES, given)
    named = [result.label for result in told(_texts(test))]
    f1 = f1_score(_classes(test), named, average="macro")
    tell(
        "posts",
        began,
        pearson=float(pearson),
        pearson_ridge=float(pearson_ridge),
        macro_f1=float(f1),
        macro_f1_ridge=float(f1_ridge),
        posts=len(train),
        held_out=len(test),
    )


def tune(rows, labels, problem, names, given) -> ph.Classifier:
    """MiniLM with a fresh head, trained on these labels."""
    folder = resolve("minilm-l6")
    model = ph.load(folder, head="classify", labels=names, problem=problem)
    config = TrainConfig.fine_tuning(
        epochs=given.epochs, context=96, lr=1e-4, out=f"{given.out}/{problem or 'classes'}"
    )
    trainer = ph.Trainer(model, ph.tokenizer(folder), config, objective="classify")
    table = [{"text": text, "label": label} for (_, text), label in zip(rows, labels, strict=True)]
    fitted = trainer.fit(table, force=given.force)
    return ph.Classifier(ph.load(best_of(fitted)), ph.tokenizer(folder))


def _texts(rows: list[tuple[float, str]]) -> list[str]:
    return [text for _, text in rows]


def _ratings(rows: list[tuple[float, str]]) -> list[float]:
    return [rating for rating, _ in rows]


def _classes(rows: list[tuple[float, str]]) -> list[str]:
    return [CLASSES[int(rating >= -1) + int(rating > 1)] for rating, _ in rows]


if __name__ == "__main__":
    main()
