"""`python -m polyhead.cli.demo`: a character GPT on Python's own documentation, in minutes.

It learns from nine tenths of the text, writes while it learns, and is compared on the last tenth
with two models that count: an interpolated n-gram and a bigram.
"""

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyhead.cli import corpora
from polyhead.cli.corpora import SplitText
from polyhead.errors import FileError, PolyheadError
from polyhead.train.config import TrainConfig

if TYPE_CHECKING:
    from polyhead.models.model import TaskModel
    from polyhead.text.tokenizer import Tokenizer
    from polyhead.train.report import Report

OUT = "runs/demo"
MARK = "demo.json"
HELD_OUT = 0.1
SIZES = {
    "d_model": 128,
    "num_layers": 4,
    "num_heads": 4,
    "head_dim": 32,
    "d_ff": 352,
    "init_std": 0.06,
}
CONTEXT, BATCH = 128, 4
# What an idle machine of two cores does in the time; a slower one does fewer, but enough to learn.
FULL_STEPS, LEAST_STEPS, SECONDS = 3600, 3000, 125
CALIBRATION_STEPS = 12
PROMPT = "The "
SNIPPET = 44


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m polyhead.cli.demo", description=__doc__)
    parser.add_argument("--out", default=OUT, help=f"directory to (re)place, {OUT} unless given")
    parser.add_argument("--steps", type=int, help="training steps; as many as fit the time if not")
    args = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        run(Path(args.out), args.steps)
    except PolyheadError as error:
        _say(f"polyhead: {error}")
        return 2
    except KeyboardInterrupt:
        _say("polyhead: interrupted")
        return 130
    return 0


def run(out: Path, steps: int | None = None) -> dict[str, float]:
    """The whole demo; bits per byte on the held-out text by model."""
    from polyhead.models.probes import write_probes
    from polyhead.text.directory import state_length

    began = time.monotonic()
    _claim(out)
    corpus = split()
    tokenizer = _tokenizer(corpus)
    _say(
        f"A GPT that reads characters learns {len(corpus.train):,} of them from Python's "
        f"documentation; {len(corpus.held_out):,} more are held out."
    )
    order, baselines = count_baselines(corpus, tokenizer)
    for name, bits in baselines.items():
        _say(f"  {name:<22} {bits:.3f} bits per byte on the held-out text")
    model = _model(tokenizer)
    steps = steps or _affordable_steps(tokenizer)
    _say(f"  GPT of {model.num_parameters():,} parameters: training for {steps} steps\n")
    figures = _train(model, tokenizer, corpus, out, steps)
    bits = {"GPT": _bits_per_byte(model, tokenizer, corpus.held_out), **baselines}
    model.save(out, force=True)
    tokenizer.save(out, force=True)
    state_length(out, model.config.max_tokens)
    write_probes(model, tokenizer, out)
    text = _write(model, tokenizer)
    print(f"\n{text}\n")
    _print_table(bits)
    seconds = time.monotonic() - began
    report = _report(out, model, tokenizer, corpus, bits, order, {**figures, "seconds": seconds})
    from polyhead.train.report import write_report

    write_report(out / "report.html", report)
    _say(f"\n{seconds:.0f} s. Report: {out / 'report.html'}. The model is in {out}; try")
    _say(f'  polyhead generate {out} "The with statement" --stream --temperature 0.8')
    return bits


def split() -> SplitText:
    """The last tenth of the documentation, and the rest without the lines that repeat there."""
    return corpora.split(corpora.pydocs(), HELD_OUT)


def count_baselines(corpus: SplitText, tokenizer: "Tokenizer") -> tuple[int, dict[str, float]]:
    """The n-gram's order, chosen without the held-out text, and bits per byte of both baselines.

    The first character of the text goes unscored, as it does for the GPT.
    """
    import math

    from polyhead.models.ngram import NGram

    seen = tokenizer.encode(corpus.train, add_special_tokens=False)
    wanted = tokenizer.encode(corpus.held_out, add_special_tokens=False)
    size = len(corpus.held_out[1:].encode())
    best = NGram.best(seen, tokenizer.vocab_size)
    bigram = NGram(tokenizer.vocab_size, 2).fit(seen)

    def bits(model: NGram) -> float:
        return -float(model.log_probs(wanted)[1:].sum()) / math.log(2) / size

    return best.order, {f"{best.order}-gram (counting)": bits(best), "bigram": bits(bigram)}


def _claim(out: Path) -> None:
    """Make the directory anew; FileError where something else stands there."""
    if out.exists() and not (out / MARK).exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileError(f"{out} holds something that is not the demo's; name another --out")
    if out.exists():
        _say(f"Replacing the demo of before in {out}.")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARK).write_text("{}\n")


def _tokenizer(corpus: SplitText) -> "Tokenizer":
    """A token a character. The alphabet is that of all the text, so that none is unknown."""
    from polyhead.text.tokenizer import Tokenizer

    return Tokenizer.train([corpus.train, corpus.held_out], kind="chars")


def _model(tokenizer: "Tokenizer") -> "TaskModel":
    from polyhead.models.assemble import build

    # Normalised queries and keys stand the high learning rate that so short a run needs.
    return build("qwen3", seed=0, vocab_size=tokenizer.vocab_size, max_seq_len=CONTEXT, **SIZES)


def _config(out: Path, steps: int) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        batch_size=BATCH,
        context=CONTEXT,
        lr=2.5e-3,
        min_lr=5e-5,
        warmup=100,
        dtype="bfloat16",
        validate_every=max(1, steps // 12),
        validate_batches=24,
        checkpoint_every=0,
        log_every=max(1, min(20, steps // 10)),
        sample_every=max(1, steps // 6),
        sample_prompt=PROMPT,
        sample_tokens=160,
        out=str(out),
        device="cpu",
    )


def _affordable_steps(tokenizer: "Tokenizer") -> int:
    """Steps that fit the time, by the pace of a few on a model that is thrown away."""
    import torch

    from polyhead.train.loop import train_step
    from polyhead.train.objectives import LanguageBatch, causal_lm
    from polyhead.train.optim import Masters

    with torch.random.fork_rng(devices=[]):
        model = _model(tokenizer).train()
        optimizer = Masters(model, _config(Path(OUT), FULL_STEPS))
        ids = torch.randint(tokenizer.vocab_size, (BATCH, CONTEXT + 1))
        batch = LanguageBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        times: list[float] = []
        for _ in range(CALIBRATION_STEPS):
            began = time.perf_counter()
            train_step(model, optimizer, causal_lm, [batch], 1e-4)
            times.append(time.perf_counter() - began)
    # The first steps are slower than what follows.
    pace = sorted(times[2:])[len(times[2:]) // 2]
    return max(LEAST_STEPS, min(FULL_STEPS, int(SECONDS / pace) // 100 * 100))


def _train(
    model: "TaskModel", tokenizer: "Tokenizer", corpus: SplitText, out: Path, steps: int
) -> dict[str, Any]:
    from polyhead.train.loop import Trainer

    trainer = Trainer(model, tokenizer, _config(out, steps))
    return trainer.fit([corpus.train], [corpus.held_out])


def _bits_per_byte(model: "TaskModel", tokenizer: "Tokenizer", text: str) -> float:
    """Every character with at least three quarters of the context before it, but at the start."""
    from polyhead.tasks.perplexity import perplexity

    score = perplexity(model, tokenizer, text, context=CONTEXT, stride=CONTEXT // 4, batch_size=32)
    return score.bits_per_byte


def _write(model: "TaskModel", tokenizer: "Tokenizer") -> str:
    from polyhead.generate.config import GenerationConfig
    from polyhead.generate.generator import TextGenerator

    # A text that is longer than the context is not what the model learned.
    config = GenerationConfig(max_new_tokens=CONTEXT - len(PROMPT), temperature=0.7, seed=0)
    return PROMPT + str(TextGenerator(model, tokenizer).generate(PROMPT, config))


def _print_table(bits: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Bits per byte on the held-out text (lower is better)")
    table.add_column("model")
    table.add_column("bits per byte", justify="right")
    for name, value in bits.items():
        table.add_row(name, f"{value:.3f}")
    Console().print(table)


def _report(
    out: Path,
    model: "TaskModel",
    tokenizer: "Tokenizer",
    corpus: SplitText,
    bits: dict[str, float],
    order: int,
    figures: dict[str, Any],
) -> "Report":
    from polyhead.cli.reporting import attention_of, curves_of, facts_of, samples_of
    from polyhead.train.report import Report

    (out / MARK).write_text(json.dumps({"bits_per_byte": bits, "steps": figures["step"]}) + "\n")
    prose = re.search(rf"(?<=\n\n)[A-Z][a-z ,]{{{SNIPPET - 1}}}", corpus.held_out)
    snippet = prose[0] if prose else corpus.held_out[:SNIPPET]
    figures = {**figures, "valid_bits_per_byte": bits["GPT"]}
    return Report(
        title="A character GPT, trained in minutes",
        summary=(
            f"On {len(corpus.train):,} characters of Python's documentation, in "
            f"{figures['seconds']:.0f} seconds on {os.cpu_count()} cores. It was judged by "
            f"{len(corpus.held_out):,} characters that it has not seen."
        ),
        facts={**facts_of(model, figures), "steps": f"{figures['step']:,}"},
        curves=curves_of(out),
        bars=list(bits.items()),
        bars_caption=(
            "Bits per byte on the held-out text; lower is better. The n-gram (interpolated "
            f"modified Kneser-Ney) counts contexts of up to {order - 1} characters; its order was "
            "chosen on a part of the training text. The bigram looks at one character."
        ),
        attention=attention_of(model, tokenizer, snippet),
        samples=samples_of(out),
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
