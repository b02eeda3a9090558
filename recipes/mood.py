"""Posts of a mood that is asked for, from SmolLM2-135M: LoRA, QLoRA and DPO.

The posts of `posts.tsv` that people rated beyond 1.5, for or against, a tenth held out. An adapter
learns to write them ("Write a positive post."), beside the model in bfloat16 and beside one in four
bits; DPO goes on from it with pairs of a post of the mood asked for and one of the other. MiniLM,
trained on the ratings, judges what they write: how often the mood is the one asked for, and
how often what DPO writes is nearer to it than what LoRA alone writes.
"""

import ctypes
import gc
import html
import random
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
from recipes.common import arguments, best_of, pairs, tell
from recipes.posts import tune

import polyhead as ph
from polyhead.compress.quantize import weight_bytes
from polyhead.train.config import TrainConfig

BASE = "smollm2-135m"
MOODS = ("negative", "positive")
ADAPTER = ph.LoraConfig(rank=16, alpha=32, targets="all-linear")
Rows = list[dict[str, str]]


def main() -> None:
    given = arguments(__doc__, "mood", steps=240, dpo_steps=100, written=100, alone="")
    if given.alone:
        print(_peak(given.alone, _rows()[0]))
        return
    began = time.perf_counter()
    rows, held, rated = _rows()
    tokenizer = ph.tokenizer(BASE)
    judge = tune(rated, [rating for rating, _ in rated], "regression", ("score",),
                 Namespace(epochs=3.0, out=f"{given.out}/judge", force=given.force))  # fmt: skip

    model = ph.load(BASE, dtype="bfloat16")
    before = _held_out_loss(model, tokenizer, held, given)
    rates = {"base": _hits(judge, _written(model, tokenizer, given))}
    ph.add_adapter(model, ADAPTER)
    tuned = _fit("lora", "chat", model, tokenizer, rows, held, given, steps=given.steps, lr=5e-4)
    plain = _written(model, tokenizer, given)
    rates["lora"] = _hits(judge, plain)

    small = ph.quantize(ph.load(BASE, dtype="bfloat16"), "nf4")
    size = weight_bytes(small) / ph.load(BASE).num_parameters()
    ph.add_adapter(small, ADAPTER)
    packed = _fit("qlora", "chat", small, tokenizer, rows, held, given, steps=given.steps // 2,
                  lr=5e-4)  # fmt: skip

    model = ph.load(best_of(tuned), dtype="bfloat16")
    preferred = _fit("dpo", "dpo", model, tokenizer, _compared(rows), _compared(held), given,
                     steps=given.dpo_steps, lr=1e-4)  # fmt: skip
    chosen = _written(model, tokenizer, given)
    rates["dpo"] = _hits(judge, chosen)
    wins, low, high = _wins(judge, chosen, plain)
    memory = {kind: _in_own_process(kind) for kind in ("lora_float32", "lora", "qlora")}
    for mood in MOODS:
        print(f"{mood}: {plain[mood][0]!r} (LoRA), {chosen[mood][0]!r} (DPO)")
    tell(
        "mood", began,
        held_out_loss_base=before, held_out_loss_lora=tuned["valid_loss"],
        held_out_loss_qlora_half_the_steps=packed["valid_loss"],
        **{f"asked_mood_{name}": rate for name, rate in rates.items()},
        dpo_accuracy=preferred["valid_accuracy"],
        dpo_wins_over_lora=wins, dpo_wins_low=low, dpo_wins_high=high,
        qlora_bytes_a_weight=size, **{f"{kind}_peak_mib": found for kind, found in memory.items()},
        posts=len(rows), held_out=len(held),
    )  # fmt: skip


def _rows() -> tuple[Rows, Rows, list[tuple[float, str]]]:
    """Rows to learn from and to hold out, and all rated posts, for the judge."""
    rated = [(float(rating), html.unescape(text)) for rating, text in pairs("posts.tsv")]
    random.Random(0).shuffle(rated)
    rows = [
        {"prompt": f"Write a {MOODS[rating > 0]} post.", "answer": text}
        for rating, text in rated
        if abs(rating) >= 1.5
    ]
    cut = len(rows) // 10
    return rows[cut:], rows[:cut], rated


def _compared(rows: Rows) -> Rows:
    """Each post beside one of the other mood."""
    sides = {mood: [row for row in rows if mood in row["prompt"]] for mood in MOODS}
    count = min(map(len, sides.values()))
    return [
        {"prompt": good["prompt"], "chosen": good["answer"], "rejected": bad["answer"]}
        for negative, positive in zip(*(sides[mood][:count] for mood in MOODS), strict=True)
        for good, bad in ((negative, positive), (positive, negative))
    ]


def _fit(
    name: str, objective: str, model: Any, tokenizer: Any, rows: Rows, held: Rows, given: Namespace,
    **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    config = TrainConfig.fine_tuning(
        batch_size=8, context=128, warmup=20, dtype="bfloat16", validate_every=0,
        out=f"{given.out}/{name}", **settings,
    )  # fmt: skip
    trainer = ph.Trainer(model, tokenizer, config, objective=objective)
    return trainer.fit(rows, held, force=given.force)


def _held_out_loss(model: Any, tokenizer: Any, held: Rows, given: Namespace) -> float:
    config = TrainConfig.fine_tuning(context=128, batch_size=8, out=f"{given.out}/base")
    trainer = ph.Trainer(model, tokenizer, config, objective="chat", quiet=True)
    return trainer.evaluate(held)["loss"]


def _written(model: Any, tokenizer: Any, given: Namespace) -> dict[str, list[str]]:
    """Posts of each mood, the same draws for every model."""
    writer, found = ph.TextGenerator(model, tokenizer), {}
    for mood in MOODS:
        asked = [{"role": "user", "content": f"Write a {mood} post."}]
        ids = tokenizer.encode(tokenizer.apply_chat_template(asked), add_special_tokens=False)
        settings = [
            ph.GenerationConfig(max_new_tokens=40, temperature=0.8, top_p=0.95, seed=seed)
            for seed in range(given.written)
        ]
        answers = writer.generate([ids] * given.written, settings, batch_size=50)
        found[mood] = [str(answer).strip() for answer in answers]
    return found


def _ratings(judge: ph.Classifier, written: dict[str, list[str]]) -> np.ndarray:
    """What the judge says of each post, turned so that more is nearer to the mood asked for."""
    return np.concatenate([
        np.array([result.score for result in judge(texts)]) * (1 if mood == "positive" else -1)
        for mood, texts in written.items()
    ])  # fmt: skip


def _hits(judge: ph.Classifier, written: dict[str, list[str]]) -> float:
    return float((_ratings(judge, written) > 0).mean())


def _wins(
    judge: ph.Classifier, written: dict[str, list[str]], others: dict[str, list[str]]
) -> tuple[float, float, float]:
    """How often the first is nearer to the mood than the second, with a 95 % interval."""
    away = _ratings(judge, written) - _ratings(judge, others)
    won = (away > 0) + 0.5 * (away == 0)
    draws = np.random.default_rng(0).choice(won, (2000, len(won))).mean(1)
    return float(won.mean()), float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))


def _in_own_process(kind: str) -> float:
    command = [sys.executable, "-m", "recipes.mood", "--alone", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def _peak(kind: str, rows: Rows) -> float:
    """The most memory in MiB that a few steps take, the model included.

    Beside what the same steps of a tiny model have left in the process: libraries, threads, caches.
    """
    tokenizer = ph.tokenizer(BASE)
    tiny = dict(d_model=8, d_ff=8, num_layers=1, num_heads=1, max_seq_len=64)
    _few_steps(
        ph.build("llama", vocab_size=tokenizer.vocab_size, **tiny), tokenizer, rows, "float32"
    )
    before = _status("VmRSS")
    dtype = "float32" if kind == "lora_float32" else "bfloat16"
    model = ph.load(BASE, dtype=dtype)
    if kind == "qlora":
        model = ph.quantize(model, "nf4")
    _give_back()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    _few_steps(model, tokenizer, rows, dtype)
    return (_status("VmHWM") - before) / 1024


def _few_steps(model: Any, tokenizer: Any, rows: Rows, dtype: Any) -> None:
    ph.add_adapter(model, ADAPTER)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            steps=6, batch_size=4, context=64, lr=1e-4, dtype=dtype, recompute="blocks",
            held_out=0.0, out=f"{folder}/run",
        )  # fmt: skip
        ph.Trainer(model, tokenizer, config, objective="chat", quiet=True).fit(rows[:64])
    _give_back()


def _give_back() -> None:
    """What was freed stays with the process otherwise, and would count."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main()
