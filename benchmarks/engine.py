"""The engine against itself one request at a time, and what each of its means is worth.

together     16 requests at once beside one after the other: tokens/s
prefix       16 requests that share a prompt of 512 tokens: tokens that the model reads
gap          the longest gap between the tokens of running requests while a long prompt is read in
             chunks, beside a plain step
speculation  n-gram lookup and others on text that quotes what it was given: tokens/s, and the share
             of guesses that were right
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from benchmarks.abba import ratio

import polyhead as ph
from polyhead.generate.engine import Engine
from polyhead.generate.engine_config import EngineConfig
from polyhead.generate.speculative import DraftModel, Jacobi, NgramLookup, first_layers

MODEL = "smollm2-135m"
PROMPTS = (
    "The history of the railway begins",
    "In mathematics, a prime number is",
    "def quicksort(items):",
    "Once upon a time there was a lighthouse keeper who",
)


def together(model: Any, tokenizer: Any, rounds: int) -> dict[str, Any]:
    """Tokens a second of 16 requests at once, and of the same in turn."""
    prompts = [tokenizer.encode(f"{i}. {PROMPTS[i % 4]}") for i in range(16)]
    config = ph.GenerationConfig(temperature=0.0, max_new_tokens=32, ignore_eos=True)
    sizes = {"at once": 16, "in turn": 1}
    found: dict[str, list[tuple[int, ...]]] = {}

    def one(name: str) -> float:
        engine = Engine(model, tokenizer, EngineConfig(max_rows=sizes[name], cache_tokens=4096))
        requests = [engine.add(prompt, config) for prompt in prompts]
        start = perf_counter()
        engine.run()
        found[name] = [request.results[0].token_ids for request in requests]
        return 16 * 32 / (perf_counter() - start)

    speeds: dict[str, list[float]] = {name: [] for name in sizes}
    for _ in range(rounds):
        for name in ("at once", "in turn", "in turn", "at once"):
            speeds[name].append(one(name))
    same = sum(a == b for a, b in zip(*found.values(), strict=True))
    return {
        "tokens_per_second": {name: statistics.median(some) for name, some in speeds.items()},
        "ratio": str(ratio(speeds["at once"], speeds["in turn"])), "same_texts": f"{same} of 16",
    }  # fmt: skip


def prefix(model: Any, tokenizer: Any, rounds: int) -> dict[str, Any]:
    """Tokens read for 16 requests that begin with the same 512, all told and beside it."""
    read: list[int] = []
    hook = model.backbone.embedding.register_forward_pre_hook(
        lambda _, given: read.append(given[0].numel())
    )
    shared = tokenizer.encode(" ".join(PROMPTS) * 20)[:512]
    engine = Engine(model, tokenizer, EngineConfig(cache_tokens=8192))
    config = ph.GenerationConfig(temperature=0.0, max_new_tokens=1)
    for i in range(16):
        engine.add([*shared, *tokenizer.encode(f" {i}:")], config)
    engine.run()
    hook.remove()
    own = sum(len(tokenizer.encode(f" {i}:")) for i in range(16))
    return {"tokens_read": sum(read), "of_prompts": 16 * 512 + own, "at_least": 512 + own}


def gap(model: Any, tokenizer: Any, rounds: int) -> dict[str, Any]:
    """The longest step of four texts while a prompt of 1,024 tokens is read, over a plain one."""
    long = tokenizer.encode(" ".join(PROMPTS) * 60)[:1024]
    config = ph.GenerationConfig(temperature=0.0, max_new_tokens=400, ignore_eos=True)
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for chunk in (None, 16, 32, 64, 256):
            engine = Engine(model, tokenizer, EngineConfig(chunk=chunk, cache_tokens=8192))
            for prompt in PROMPTS:
                engine.add(prompt, config)
            engine.step()
            plain = statistics.median(_timed(engine.step) for _ in range(12))
            request, steps = engine.add(long, config), list[float]()
            while not request.texts[0].decodes:
                steps.append(_timed(engine.step))
            alone = [_timed(engine.step) for _ in steps]
            name = "as it chooses" if chunk is None else f"chunks of {chunk}"
            found.setdefault(name, []).append(
                {
                    "longest": max(steps) / plain, "usual": statistics.median(steps) / plain,
                    "longest_plain": max(alone) / statistics.median(alone),
                    "prompt_seconds": sum(steps),
                }
            )  # fmt: skip
    return {
        name: {key: statistics.median(one[key] for one in some) for key in some[0]}
        for name, some in found.items()
    }


def _timed(what: Callable[[], Any]) -> float:
    start = perf_counter()
    what()
    return perf_counter() - start


def speculation(model: Any, tokenizer: Any, rounds: int) -> dict[str, Any]:
    """Tokens a second on an edit of code that the prompt holds, with each proposer."""
    code = "\n".join(Path(statistics.__file__).read_text().splitlines()[130:190])
    prompt = tokenizer.encode(f"```python\n{code}\n```\nThe same code again:\n```python\n")
    config = ph.GenerationConfig(temperature=0.0, max_new_tokens=128, ignore_eos=True)
    proposers: dict[str, Callable[[], Any]] = {
        "plain": lambda: None,
        "ngram": lambda: NgramLookup(8),
        "jacobi": lambda: Jacobi(3),
        "early exit": lambda: DraftModel(first_layers(model, 10), 3, max_rows=1, cache_tokens=2048),
    }
    speeds: dict[str, list[float]] = {name: [] for name in proposers}
    shares: dict[str, float] = {}
    texts: dict[str, tuple[int, ...]] = {}
    for number in range(rounds):
        names = list(proposers)
        for name in (*names, *names[::-1]) if number % 2 == 0 else (*names[::-1], *names):
            proposer = proposers[name]()
            engine = Engine(model, tokenizer, EngineConfig(max_rows=1), proposer)
            request = engine.add(prompt, config)
            engine.step()
            start = perf_counter()
            engine.run()
            speeds[name].append(127 / (perf_counter() - start))
            texts[name] = request.results[0].token_ids
            if proposer is not None:
                shares[name] = proposer.acceptance
    return {
        "tokens_per_second": {name: statistics.median(some) for name, some in speeds.items()},
        "ratio": {n: str(ratio(s, speeds["plain"])) for n, s in speeds.items() if n != "plain"},
        "acceptance": shares,
        "same_text": all(text == texts["plain"] for text in texts.values()),
    }


WORK = {"together": together, "prefix": prefix, "gap": gap, "speculation": speculation}


def main() -> None:
    """Run what is named, or all of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", nargs="*", help=f"of {', '.join(WORK)}; default: all")
    parser.add_argument("--rounds", type=int, default=3, help="A B B A rounds (default 3)")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own)")
    parser.add_argument("--dtype", default="float32", help="of the model (default float32)")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    model, tokenizer = ph.load(MODEL, dtype=given.dtype), ph.tokenizer(MODEL)
    for name in given.work or WORK:
        found = WORK[name](model, tokenizer, given.rounds)
        print(json.dumps({"work": name, "threads": torch.get_num_threads(), **found}), flush=True)


if __name__ == "__main__":
    main()
