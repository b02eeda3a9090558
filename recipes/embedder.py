"""A sentence embedder across languages from pairs: English and Spanish verses.

MiniLM has read English alone. In-batch negatives bring a verse and its translation together; how
often the right one of 500 held-out verses is the nearest is told before and after.
"""

import time

import torch
from recipes.common import arguments, best_of, pairs, tell, without

import polyhead as ph
from polyhead.files.hub import resolve
from polyhead.train.config import TrainConfig


def main() -> None:
    given = arguments(__doc__, "embedder", pairs=8000, epochs=2.0)
    began = time.perf_counter()
    rows = pairs("bible.en-es.tsv")
    test, valid = rows[-500:], rows[-1000:-500]
    train = without(rows[:-1000], test + valid)[:: max(1, len(rows) // given.pairs)]
    folder = resolve("minilm-l6")
    model, tokenizer = ph.load(folder, head="embed"), ph.tokenizer(folder)
    before = recall(model, tokenizer, test)
    config = TrainConfig.fine_tuning(
        epochs=given.epochs, batch_size=64, context=64, lr=3e-4, warmup=50, dtype="bfloat16",
        out=given.out,
    )  # fmt: skip
    trainer = ph.Trainer(model, tokenizer, config, objective="contrastive")
    tables = [[{"text": a, "pair": b} for a, b in some] for some in (train, valid)]
    fitted = trainer.fit(tables[0], tables[1], force=given.force)
    after = recall(ph.load(best_of(fitted), dtype="float32"), tokenizer, test)
    tell("embedder", began, recall_at_1=after, before=before, pairs=len(train))


def recall(model, tokenizer, rows: list[list[str]]) -> float:
    """How often the nearest English verse to a Spanish one is its own."""
    english, spanish = (
        torch.as_tensor(ph.embed(model, tokenizer, [row[side] for row in rows])) for side in (0, 1)
    )
    nearest = (spanish @ english.T).argmax(1)
    return (nearest == torch.arange(len(rows))).float().mean().item()


if __name__ == "__main__":
    main()
