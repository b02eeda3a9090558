"""Random lives of an engine: requests that come, are read, sent back, cancelled, forked and found.

Every text that was not cancelled is what it is alone, every block is accounted for after every
step, and at the end nothing is held. `--steps` runs one engine for so many steps instead and tells
what memory it takes.

    python -m benchmarks.schedules --count 10000
    python -m benchmarks.schedules --steps 100000
"""

import argparse
import gc
import json
import random
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import polyhead as ph
from polyhead.generate.config import GenerationConfig
from polyhead.generate.engine import Engine
from polyhead.generate.engine_config import EngineConfig
from polyhead.generate.intake import rows_of
from polyhead.generate.pages import NOBODY
from polyhead.generate.request import Request
from polyhead.generate.speculative import Jacobi, NgramLookup

V = 7
SIZES: dict[str, Any] = dict(
    vocab_size=V, d_model=8, d_ff=8, num_layers=2, num_heads=2, max_seq_len=64
)
MODELS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "mistral": SIZES | dict(window=6),
    "qwen2": SIZES | dict(
        window=6, use_window=True, layer_types=("sliding_attention", "full_attention")
    ),
}  # fmt: skip


@cache
def made(name: str) -> Any:
    """A tiny model whose logits lie apart."""
    model = ph.build(name, seed=1, **MODELS[name]).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.7)
    return model


@cache
def alone(name: str, prompt: tuple[int, ...], config: GenerationConfig) -> list[tuple[int, ...]]:
    """What a request gives in an engine of its own that has room for it and reads it at once."""
    rows = rows_of(config)
    engine = Engine(made(name), None, EngineConfig(max_rows=rows, cache_tokens=64 * rows))
    request = engine.add(prompt, config, ends=(0,))
    engine.run()
    return [text.token_ids for text in request.results or ()]


def drawn_engine(chance: random.Random, name: str) -> Engine:
    """An engine that is too small now and then."""
    settings = EngineConfig(
        max_rows=chance.choice([3, 4, 6]), block_size=chance.choice([1, 2, 4, 5]),
        cache_tokens=chance.choice([24, 40, 120]), chunk=chance.choice([1, 3, 16, None]),
        idle_chunk=chance.choice([2, 50]),
    )  # fmt: skip
    return Engine(made(name), None, settings, chance.choice([None, NgramLookup(3), Jacobi(2)]))


def drawn_request(chance: random.Random, engine: Engine) -> Request:
    """A prompt that often begins as others do, and one of seven ways to go on."""
    start = [1, 2, 3, 4, 1, 2, 5, 6] * chance.choice([0, 1, 2])
    prompt = (*start, *(chance.randrange(1, V) for _ in range(chance.randint(1, 4))))[:20]
    most = chance.randint(1, 3 if len(prompt) > 12 else 9)
    config = chance.choice([
        dict(temperature=0.0),
        dict(temperature=0.0, num_beams=chance.choice([2, 3])),
        dict(seed=chance.randrange(3), num_return_sequences=chance.choice([1, 3])),
        dict(seed=chance.randrange(3), repetition_penalty=1.3),
        dict(
            seed=chance.randrange(3), num_return_sequences=chance.choice([1, 1, 2]),
            guidance_scale=1.5, negative_prompt_ids=chance.choice([(), (1, 2, 3, 4, 1)]),
        ),
        dict(temperature=0.0, num_beams=2, force_words_ids=[[chance.randrange(1, V)]]),
        dict(temperature=0.0, penalty_alpha=0.6, top_k=3),
    ])  # fmt: skip
    return engine.add(
        prompt, GenerationConfig(max_new_tokens=most, **config), ends=(0,),
        priority=chance.choice([0, 0, 0, 1]), client=chance.choice("ab"),
    )  # fmt: skip


def check_blocks(engine: Engine) -> None:
    """AssertionError for a block that is lost, held too often, or held by a row that is closed."""
    texts = [text for request in engine.scheduler.running for text in request.texts]
    rows = [text.row for text in texts if text.row is not None]
    assert len(set(rows)) == len(rows)
    assert engine.memory.num_free_rows == engine.memory.max_rows - len(rows)
    for tables in engine.memory.all_tables:
        pool = tables.pool
        held = Counter(int(b) for row in rows for b in tables.blocks[row] if b != NOBODY)
        assert {b: n for b, n in enumerate(pool.holders) if n} == dict(held)
        assert len(held) + pool.num_free == pool.num_blocks - 1


def schedule(seed: int) -> Counter[str]:
    """One life; what happened in it. Errors: AssertionError where it is not as it should be."""
    chance = random.Random(seed)
    name = chance.choice(list(MODELS))
    engine = drawn_engine(chance, name)
    requests: list[Request] = []
    cancelled: set[Request] = set()
    happened: Counter[str] = Counter()
    for _ in range(chance.randint(5, 40)):
        what = chance.random()
        if what < 0.3:
            try:
                requests.append(drawn_request(chance, engine))
            except ph.PolyheadError:
                happened["refused"] += 1
        elif what < 0.4 and requests:
            request = chance.choice(requests)
            if not request.is_finished:
                cancelled.add(request)
            engine.cancel(request)
        else:
            engine.step()
        check_blocks(engine)
    while engine.has_work:
        engine.step()
        check_blocks(engine)
    for request in requests:
        assert request.results is not None
        happened["requests"] += 1
        happened["sent back"] += request.times_preempted
        happened["tokens found"] += request.found
        if request in cancelled:
            happened["cancelled"] += 1
        elif request.limit == request.config.max_new_tokens:
            expected = alone(name, tuple(request.prompt), request.config)
            assert [text.token_ids for text in request.results] == expected, (seed, request.number)
            happened["compared"] += 1
    return happened


def steps(count: int) -> dict[str, Any]:
    """MiB that one engine takes after each tenth of so many steps."""
    chance = random.Random(0)
    engine = Engine(made("qwen2"), None, EngineConfig(max_rows=4, block_size=4, cache_tokens=160))
    sizes: list[float] = []
    for number in range(count):
        if len(engine.scheduler.waiting) < 3:
            drawn_request(chance, engine)
        engine.step()
        if (number + 1) % (count // 10) == 0:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            sizes.append(round(pages * 4096 / 2**20, 1))
            print(f"{number + 1} steps, {sizes[-1]} MiB", file=sys.stderr)
    return {"steps": count, "mebibytes": sizes}


def main() -> None:
    """Run what is asked for and print a record of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=200, help="schedules (default 200)")
    parser.add_argument("--steps", type=int, default=0, help="steps of one engine instead")
    given = parser.parse_args()
    torch.set_num_threads(1)
    start = perf_counter()
    found: dict[str, Any]
    if given.steps:
        found = steps(given.steps)
    else:
        total: Counter[str] = Counter()
        for seed in range(given.count):
            total += schedule(seed)
            if (seed + 1) % 500 == 0:
                print(f"{seed + 1} of {given.count}", file=sys.stderr)
        found = {"schedules": given.count, **total}
    minutes = round((perf_counter() - start) / 60, 1)
    print(json.dumps({**found, "minutes": minutes, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
