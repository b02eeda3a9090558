"""Parts of speech and genre at once: two heads on one MiniLM, trained together.

Sentences of the Brown corpus for the twelve coarse tags, passages of four sentences for press,
learned prose or fiction. Every tenth file is held out. Beside the figures stand those of the most
frequent tag of each word, and of the most frequent genre.
"""

import time
from collections import Counter, defaultdict
from itertools import groupby

from recipes.brown import Sentence, sentences
from recipes.common import arguments, best_of, tell

import polyhead as ph
from polyhead.files.hub import resolve
from polyhead.train.config import TrainConfig
from polyhead.train.multitask import TaskSource, tasks_of
from polyhead.train.registry import OBJECTIVES


def main() -> None:
    given = arguments(__doc__, "multitask", rows=4000, epochs=2.0)
    began = time.perf_counter()
    everything = sentences()
    files = sorted({sentence.file for sentence in everything})
    held_files = set(files[::10])
    train = [sentence for sentence in everything if sentence.file not in held_files]
    held = [sentence for sentence in everything if sentence.file in held_files]
    sources = {
        "words": TaskSource(_tagged(train)[:: len(train) // given.rows], "tag"),
        "genre": TaskSource(_passages(train)[:: max(1, len(train) // 4 // given.rows)], "classify"),
    }
    kinds = {kind.head: kind for kind in OBJECTIVES.values() if kind.name in ("tag", "classify")}
    folder = resolve("minilm-l6")
    model = ph.load(folder, head="multitask", tasks=tasks_of(sources, kinds))
    config = TrainConfig.fine_tuning(
        epochs=given.epochs, context=96, lr=2e-4, dtype="bfloat16", out=given.out
    )
    trainer = ph.Trainer(model, ph.tokenizer(folder), config, objective="multitask")
    best = best_of(trainer.fit(sources, force=given.force))

    trained = ph.load(best, dtype="float32")
    tokenizer = ph.tokenizer(folder)
    test = held[:: max(1, len(held) // 1000)]
    tagger = ph.Tagger(trained, tokenizer, head="words")
    entities = tagger.words([sentence.words for sentence in test])
    tags = [[word.label for word in row] for row in entities]
    passages = _passages(held)
    genres = ph.Classifier(trained, tokenizer, head="genre")([row["text"] for row in passages])
    tell(
        "multitask",
        began,
        tag_accuracy=_share(test, tags),
        most_frequent_tag=_share(test, _by_word(train, test)),
        genre_accuracy=_mean(
            [g.label == row["label"] for g, row in zip(genres, passages, strict=True)]
        ),
        most_frequent_genre=max(Counter(row["label"] for row in passages).values()) / len(passages),
        sentences=len(test),
        passages=len(passages),
    )


def _tagged(some: list[Sentence]) -> list[dict[str, list[str]]]:
    return [{"tokens": sentence.words, "tags": sentence.tags} for sentence in some]


def _passages(some: list[Sentence]) -> list[dict[str, str]]:
    """Four sentences of one file, with its genre."""
    found = []
    for _, group in groupby(some, key=lambda sentence: sentence.file):
        rows = list(group)
        for four in (rows[at : at + 4] for at in range(0, len(rows), 4)):
            text = " ".join(" ".join(sentence.words) for sentence in four)
            found.append({"text": text, "label": four[0].genre})
    return found


def _by_word(train: list[Sentence], test: list[Sentence]) -> list[list[str]]:
    """Each word's most frequent tag; NOUN for one that was never seen."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for sentence in train:
        for word, tag in zip(sentence.words, sentence.tags, strict=True):
            counts[word.lower()][tag] += 1
    usual = {word: count.most_common(1)[0][0] for word, count in counts.items()}
    return [[usual.get(word.lower(), "NOUN") for word in sentence.words] for sentence in test]


def _share(some: list[Sentence], found: list[list[str]]) -> float:
    pairs = [
        pair
        for sentence, tags in zip(some, found, strict=True)
        for pair in zip(sentence.tags, tags, strict=True)
    ]
    return _mean([expected == tag for expected, tag in pairs])


def _mean(values: list[bool]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
