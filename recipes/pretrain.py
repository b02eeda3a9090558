"""Masked-language pretraining of a small BERT, ALBERT and DeBERTa on the same tokens.

The standard library's sources, one tokenizer of 8,000 word pieces, the same width, depth, batches
and steps. Held-out files are read at masks that are the same for all three: cross-entropy and how
often the masked token is the first guess. DeBERTa guesses through its enhanced mask decoder.
"""

import time
from typing import Any

from recipes.common import arguments, tell
from recipes.sources import corpus, tokenizer

import polyhead as ph
from polyhead.train.config import TrainConfig

SIZES: dict[str, Any] = dict(
    d_model=192, d_ff=768, num_layers=4, num_heads=4, dropout=0.0, attention_dropout=0.0
)
MODELS: dict[str, dict[str, Any]] = {
    "bert": dict(max_seq_len=128),
    "albert": dict(max_seq_len=128, embedding_width=64),
    "deberta-v2": dict(max_seq_len=128, position_buckets=32, decoder="enhanced"),
}


def main() -> None:
    given = arguments(__doc__, "pretrain", steps=500, batch_size=32)
    train, held = corpus()
    words = tokenizer(train, 8000)
    for name, options in MODELS.items():
        began = time.perf_counter()
        model = ph.build(name, seed=0, vocab_size=words.vocab_size, **SIZES, **options)
        config = TrainConfig(
            steps=given.steps, batch_size=given.batch_size, context=128, lr=1.5e-3, warmup=100,
            dtype="bfloat16", weight_decay=0.01, betas=(0.9, 0.98), validate_every=250,
            validate_batches=32, out=f"{given.out}/{name}", cache=f"{given.out}/tokens",
        )  # fmt: skip
        trainer = ph.Trainer(model, words, config, objective="masked-lm")
        fitted = trainer.fit(train, held, force=given.force)
        figures = {key: fitted[key] for key in fitted if key.startswith("valid")}
        tell(
            f"pretrain {name}",
            began,
            parameters=model.num_parameters(),
            tokens=given.steps * given.batch_size * 128,
            **figures,
        )


if __name__ == "__main__":
    main()
