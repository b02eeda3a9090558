"""T5's span corruption on the standard library's sources, with a small T5 1.1.

What is taken out of held-out files is written back token by token: cross-entropy, and how often
the next token of the target is the first guess.
"""

import time

from recipes.common import arguments, tell
from recipes.sources import corpus

import polyhead as ph
from polyhead.text.tokenizer import Tokenizer
from polyhead.train.config import TrainConfig


def main() -> None:
    given = arguments(__doc__, "span-corruption", steps=600, batch_size=32)
    began = time.perf_counter()
    train, held = corpus()
    sentinels = [f"<extra_id_{number}>" for number in range(100)]
    words = Tokenizer.train(
        train[::4], kind="unigram", vocab_size=8000, extra_tokens=sentinels, add_eos=True
    )
    model = ph.build(
        "t5", seed=0, vocab_size=words.vocab_size, d_model=192, d_ff=512, num_layers=3,
        num_heads=4, feed_forward="gated-gelu", dropout=0.0,
    )  # fmt: skip
    config = TrainConfig(
        steps=given.steps, batch_size=given.batch_size, context=128, lr=2e-3, warmup=100,
        dtype="bfloat16", weight_decay=0.01, validate_every=200, validate_batches=32,
        out=given.out,
    )  # fmt: skip
    trainer = ph.Trainer(model, words, config, objective="span-corruption")
    fitted = trainer.fit(train, held, force=given.force)
    figures = {key: fitted[key] for key in fitted if key.startswith("valid")}
    tell("span corruption", began, parameters=model.num_parameters(), **figures)


if __name__ == "__main__":
    main()
