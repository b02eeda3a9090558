"""From logits to tokens: what a step of the sampler takes, beside transformers' own processors.

Logits are a model's own (peaked: of SmolLM2 on a text, cut or repeated to the vocabulary's size)
and random ones (flat: standard normal), after histories of 1,024 tokens. A step is the call and
what is written down after it. Transformers: the same processors, then softmax and multinomial, or
argmax; none where it has no such thing. A line of JSON for each; milliseconds a step.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from benchmarks.abba import ratio, slices
from torch import Tensor
from transformers.generation import logits_process as hf

import polyhead as ph
from polyhead.generate.sampling.logprobs import token_logprobs
from polyhead.generate.sampling.sampler import Sampler

MODEL = "smollm2-135m"
HISTORY = 1024
BAD = tuple((1000 + 7 * i, 2000 + 3 * i) for i in range(50))
BIAS = {100 + 11 * i: 0.5 * (i % 9 - 4) for i in range(100)}

WORK: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.7},
    "top-k": {"top_k": 50},
    "top-p": {"top_p": 0.9},
    "min-p": {"min_p": 0.05},
    "typical": {"typical_p": 0.9},
    "epsilon": {"epsilon_cutoff": 3e-4},
    "eta": {"eta_cutoff": 3e-4},
    "mirostat": {"mirostat": 2},
    "mirostat 1": {"mirostat": 1},
    "repetition": {"temperature": 0.0, "repetition_penalty": 1.1},
    "counts": {"temperature": 0.0, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    "dry": {"temperature": 0.0, "dry_multiplier": 0.8},
    "ngrams": {"temperature": 0.0, "no_repeat_ngram_size": 3},
    "bad words": {"temperature": 0.0, "bad_words_ids": BAD},
    "bias": {"temperature": 0.0, "logit_bias": BIAS},
    "logprobs": {"temperature": 0.0, "logprobs": 5},
    "grammar": {"temperature": 0.0, "regex": "(.|\\n)*"},
    "usual": {"temperature": 0.7, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1},
}


def theirs(name: str) -> list[Any] | None:
    """Transformers' processors for it; None where it has none."""
    made: dict[str, Callable[[], list[Any]]] = {
        "greedy": list,
        "temperature": lambda: [hf.TemperatureLogitsWarper(0.7)],
        "top-k": lambda: [hf.TopKLogitsWarper(50)],
        "top-p": lambda: [hf.TopPLogitsWarper(0.9)],
        "min-p": lambda: [hf.MinPLogitsWarper(0.05)],
        "typical": lambda: [hf.TypicalLogitsWarper(0.9)],
        "epsilon": lambda: [hf.EpsilonLogitsWarper(3e-4)],
        "eta": lambda: [hf.EtaLogitsWarper(3e-4)],
        "repetition": lambda: [hf.RepetitionPenaltyLogitsProcessor(1.1)],
        "ngrams": lambda: [hf.NoRepeatNGramLogitsProcessor(3)],
        "bad words": lambda: [hf.NoBadWordsLogitsProcessor([list(w) for w in BAD])],
        "bias": lambda: [hf.SequenceBiasLogitsProcessor({(t,): b for t, b in BIAS.items()})],
        "usual": lambda: [
            hf.RepetitionPenaltyLogitsProcessor(1.1), hf.TemperatureLogitsWarper(0.7),
            hf.TopKLogitsWarper(50), hf.TopPLogitsWarper(0.95),
        ],
    }  # fmt: skip
    return made[name]() if name in made else None


@cache
def of_model() -> Tensor:
    """SmolLM2's logits after each token of some prose."""
    model, tokenizer = ph.load(MODEL, dtype="float32"), ph.tokenizer(MODEL)
    ids = tokenizer.encode(str(statistics.__doc__) + str(argparse.__doc__))[:128]
    with torch.inference_mode():
        return model(torch.tensor([ids]))[0]


def logits_of(kind: str, rows: int, vocab: int) -> Tensor:
    """`[rows, vocab]`."""
    if kind == "flat":
        return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))
    some = of_model()[32 : 32 + rows]
    # What is repeated is less likely, as rare tokens are.
    again = [some - 4 * i for i in range(-(-vocab // some.shape[1]))]
    return torch.cat(again, dim=1)[:, :vocab].contiguous()


def histories(rows: int) -> Tensor:
    """Tokens `[rows, HISTORY]` of which some runs come again, as in a text."""
    made = torch.Generator().manual_seed(1)
    tokens = torch.randint(3000, (rows, HISTORY), generator=made)
    tokens[:, 600:900] = tokens[:, 200:500]
    return tokens


def our_step(name: str, logits: Tensor, tokens: Tensor) -> Callable[[], object]:
    """A step of the sampler as the engine makes it."""
    rows, vocab = logits.shape
    config = ph.GenerationConfig(seed=0, **WORK[name])
    tokenizer = ph.tokenizer(MODEL) if name in ("grammar", "dry") else None
    sampler = Sampler(rows, 4096, vocab, logits.device, tokenizer)
    slots = [sampler.open(config, row, seed) for seed, row in enumerate(tokens.tolist())]
    written = [0]

    def step() -> object:
        drawn = sampler(logits, slots, written * rows)
        if config.logprobs is not None:
            token_logprobs(logits, drawn, config.logprobs)
        for slot, token in zip(slots, drawn.tolist(), strict=True):
            sampler.write(slot, written[0], [token])
            sampler.accept(slot, [token])
        written[0] += 1
        return drawn

    return step


def their_step(name: str, logits: Tensor, tokens: Tensor) -> Callable[[], object] | None:
    """The same by transformers' processors."""
    processors = theirs(name)
    if processors is None:
        return None
    is_greedy = WORK[name].get("temperature") == 0

    def step() -> object:
        scores = logits
        for processor in processors:
            scores = processor(tokens, scores)
        return scores.argmax(1) if is_greedy else scores.softmax(1).multinomial(1)

    return step


def measured(
    name: str, kind: str, rows: int, vocab: int, rounds: int, seconds: float
) -> dict[str, Any]:
    """Milliseconds of both, and how many times ours is as fast."""
    logits, tokens = logits_of(kind, rows, vocab), histories(rows)
    calls = {"ours": our_step(name, logits, tokens)}
    if (other := their_step(name, logits, tokens)) is not None:
        calls["transformers"] = other
    times = slices(calls, rounds, seconds, quiet=True)
    found: dict[str, Any] = {k: round(1e3 * statistics.median(t), 3) for k, t in times.items()}
    if other is not None:
        found["ratio"] = str(ratio(times["transformers"], times["ours"]))
    return found


def cases(given: argparse.Namespace) -> Iterator[tuple[str, str, int, int]]:
    for vocab in given.vocab:
        for kind in given.logits:
            for name in given.work or WORK:
                for rows in given.rows:
                    yield name, kind, rows, vocab


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is named, or all of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", nargs="*", help=f"of {', '.join(WORK)}; default: all")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152], help="default 49152")
    parser.add_argument(
        "--logits", nargs="+", default=["peaked", "flat"], choices=["peaked", "flat"]
    )
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own)")
    parser.add_argument("--rounds", type=int, default=3, help="A B B A rounds (default 3)")
    parser.add_argument("--seconds", type=float, default=0.05, help="of a slice (default 0.05)")
    given = parser.parse_args(arguments)
    if unknown := set(given.work) - set(WORK):
        sys.exit(f"there is no work {sorted(unknown)[0]!r}; choose of {', '.join(WORK)}")
    if given.threads:
        torch.set_num_threads(given.threads)
    with torch.inference_mode():
        for name, kind, rows, vocab in cases(given):
            found = measured(name, kind, rows, vocab, given.rounds, given.seconds)
            row = {"work": name, "logits": kind, "rows": rows, "vocab": vocab, **found}
            print(json.dumps(row | {"threads": torch.get_num_threads()}), flush=True)


if __name__ == "__main__":
    main()
