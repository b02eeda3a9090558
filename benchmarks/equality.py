"""Texts token by token beside transformers' `generate`: the real SmolLM2, and T5 and Marian.

Both are given the same ids, ragged prompts at once, in float32: greedy, penalties and bans, beams
with three length penalties and three ways to stop. What differs is written again in turns: by
transformers one prompt at a time (its batches are padded, ours are not), and by both in float64.
What float64 agrees on was a tie, to float32's last bits; what it does not is a fault.

T5 and Marian are random unless --t5 and --marian name checkpoints. Exit code 1
for a fault.

    python -m benchmarks.equality                          all models
    python -m benchmarks.equality smollm2 --cases greedy --json
    python -m benchmarks.equality --texts a.txt b.tsv      prompts from these files
"""

import argparse
import copy
import gc
import json
import pydoc_data.topics
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import polyhead as ph
from polyhead.errors import PolyheadError
from polyhead.generate.engine import Engine
from polyhead.generate.engine_config import EngineConfig
from polyhead.models.model import TaskModel

LENGTHS = (1, 2, 3, 7, 16, 17, 41, 90, 150, 230, 310, 400)
"""Tokens of the prompts."""
MOST = 48
V = 512
Options = dict[str, Any]
Answers = list[tuple[tuple[int, ...], float]]
"""Ids up to the end token, and scores; the best first."""

CASES: dict[str, Options] = {
    "greedy": {},
    "repetition 1.1": dict(repetition_penalty=1.1),
    "repetition 1.3": dict(repetition_penalty=1.3),
    "no 3-gram twice": dict(no_repeat_ngram_size=3),
    "at least 24 tokens": dict(min_new_tokens=24),
    "bad words": dict(bad_words=True),
    **{
        f"beam 4, penalty {penalty:g}, stops {stops}": dict(
            num_beams=4, length_penalty=penalty, early_stopping=stops
        )
        for penalty in (0.0, 1.0, 2.0)
        for stops in (True, False, "never")
    },
    "beam 4, repetition 1.3": dict(num_beams=4, repetition_penalty=1.3),
    "beam 4, no 3-gram twice": dict(num_beams=4, no_repeat_ngram_size=3),
    "beam 4, at least 24 tokens": dict(num_beams=4, min_new_tokens=24),
    "beam 4, bad words": dict(num_beams=4, bad_words=True),
}


@dataclass(frozen=True)
class Pair:
    """One model, theirs and ours, and what it is asked.

    ends: the tokens that end a text; beams, penalties and bans have some that come often. pad: one
    that is never written.
    """

    theirs: Any
    ours: TaskModel
    prompts: list[list[int]]
    ends: tuple[int, ...]
    bad_words: list[list[int]]
    pad: int
    start: int | None = None

    def double(self) -> "Pair":
        """The same in float64."""
        theirs, ours = (copy.deepcopy(model).double() for model in (self.theirs, self.ours))
        return Pair(**{**self.__dict__, "theirs": theirs, "ours": ours})


@dataclass
class Found:
    """What came of a case. alone: texts that differed from a padded batch of transformers' only.

    ties: that differ in float32 alone, too. faults: in float64. score: the largest difference
    between the scores of two answers alike.
    """

    texts: int = 0
    answers: int = 0
    tokens: int = 0
    same: int = 0
    alone: int = 0
    ties: int = 0
    faults: int = 0
    score: float = 0.0


def smollm2(texts: str, _: str | None) -> Pair:
    """The published file, which both read."""
    from transformers import AutoModelForCausalLM

    from polyhead.files.hub import resolve

    path = resolve("smollm2-135m")
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    tokenizer = ph.tokenizer(path)
    ids = tokenizer.encode(texts, add_special_tokens=False)
    often = tokenizer.encode(" the of", add_special_tokens=False)
    (point,) = tokenizer.encode(".", add_special_tokens=False)
    return Pair(
        theirs.eval(), ph.load(path), _cut(ids), (*tokenizer.eos_ids, point),
        [[often[0]], often[::-1]], pad=3,
    )  # fmt: skip


def _cut(ids: Sequence[int]) -> list[list[int]]:
    """Prompts from anywhere in a text."""
    chance = random.Random(0)
    starts = [chance.randrange(len(ids) - max(LENGTHS)) for _ in LENGTHS]
    return [list(ids[s : s + length]) for s, length in zip(starts, LENGTHS, strict=True)]


def t5(texts: str, path: str | None) -> Pair:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=V, d_model=128, d_kv=32, d_ff=256, num_layers=4, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return _translator(texts, path, lambda: T5ForConditionalGeneration(config))


def marian(texts: str, path: str | None) -> Pair:
    from transformers import MarianConfig, MarianMTModel

    sizes = dict(encoder_layers=4, decoder_layers=2, encoder_attention_heads=4,
                 decoder_attention_heads=4, encoder_ffn_dim=256, decoder_ffn_dim=256)  # fmt: skip
    config = MarianConfig(
        vocab_size=V, d_model=128, max_position_embeddings=512, init_std=0.1, eos_token_id=1,
        pad_token_id=0, decoder_start_token_id=0, forced_eos_token_id=None, **sizes,
    )  # fmt: skip

    def make() -> Any:
        model = MarianMTModel(config)
        # Its head is its embedding: fresh, it would say the same token for ever.
        model.model.decoder.layers[-1].final_layer_norm.weight.data.normal_()
        return model

    return _translator(texts, path, make)


def _translator(texts: str, path: str | None, make: Callable[[], Any]) -> Pair:
    """A checkpoint, or a random model."""
    from transformers import AutoModelForSeq2SeqLM

    if path is not None:
        theirs, ours = AutoModelForSeq2SeqLM.from_pretrained(path), ph.load(path)
        theirs.generation_config.forced_eos_token_id = None
        ids = ph.tokenizer(path).encode(texts, add_special_tokens=False)
        end, start, pad = (
            getattr(theirs.config, f"{name}_token_id") for name in ("eos", "decoder_start", "pad")
        )
        return Pair(theirs.eval(), ours, _cut(ids), (end,), [[ids[0]], ids[1:3]], pad, start)
    torch.manual_seed(0)
    theirs = make().eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = ph.load(folder)
    ids = [2 + byte for byte in texts.encode()]
    # No token is likely to come to such a model's mind: many of them end a text.
    return Pair(theirs, ours, _cut(ids), tuple(range(1, V, 25)), [[9], [4, 5], [6, 7, 8]], 0, 0)


MODELS = {"smollm2": smollm2, "t5": t5, "marian": marian}


def theirs_of(pair: Pair, prompts: Sequence[list[int]], options: Options) -> list[Answers]:
    """Of each prompt, transformers' answers; several prompts are padded, decoders' on the left."""
    both, width = pair.start is not None, max(map(len, prompts))
    pads = [[pair.pad] * (width - len(prompt)) for prompt in prompts]
    rows = [[*p, *pad] if both else [*pad, *p] for p, pad in zip(prompts, pads, strict=True)]
    keep = [[1] * len(p) + [0] * len(pad) for p, pad in zip(prompts, pads, strict=True)]
    beams = options.get("num_beams", 1)
    with torch.inference_mode():
        said = pair.theirs.generate(
            input_ids=torch.tensor(rows),
            attention_mask=torch.tensor(keep if both else [row[::-1] for row in keep]),
            do_sample=False, max_new_tokens=MOST, pad_token_id=pair.pad, **options,
            num_return_sequences=beams, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    written = said.sequences[:, 1 if both else width :].tolist()
    scores = said.sequences_scores.tolist() if beams > 1 else [0.0] * len(written)
    answers = [
        (_ended(ids, options["eos_token_id"]), score)
        for ids, score in zip(written, scores, strict=True)
    ]
    return [answers[start : start + beams] for start in range(0, len(answers), beams)]


def _ended(ids: list[int], ends: Sequence[int]) -> tuple[int, ...]:
    stops = [place for place, token in enumerate(ids) if token in ends]
    return tuple(ids[: stops[0] + 1] if stops else ids)


def ours_of(pair: Pair, prompts: Sequence[list[int]], options: Options) -> list[Answers]:
    """The same by an engine that all of them do not fit at once."""
    options = dict(options)
    ends = options.pop("eos_token_id")
    config = ph.GenerationConfig(
        temperature=0.0, max_new_tokens=MOST,
        num_return_sequences=options.get("num_beams", 1), **options,
    )  # fmt: skip
    size = EngineConfig(max_rows=24, cache_tokens=6144, max_len=512, source_tokens=4096, chunk=100)
    engine = Engine(pair.ours, None, size)
    if pair.start is None:
        requests = [engine.add(prompt, config, ends=ends) for prompt in prompts]
    else:
        requests = [
            engine.add([pair.start], config, source=prompt, ends=ends) for prompt in prompts
        ]
    engine.run()
    return [[(text.token_ids, text.score or 0.0) for text in r.outcome()] for r in requests]


def compare(pair: Pair, doubled: Callable[[], Pair], case: Options) -> Found:
    """One case over all prompts."""
    options = dict(case)
    if options.pop("bad_words", False):
        options["bad_words_ids"] = pair.bad_words
    # Beams, and those that may not end yet, meet an end that is likely; the rest go on.
    meets_ends = {"num_beams", "min_new_tokens"} & case.keys()
    options["eos_token_id"] = list(pair.ends if meets_ends else pair.ends[:1])
    mine, others = (of(pair, pair.prompts, options) for of in (ours_of, theirs_of))
    found = Found(texts=len(mine))
    for prompt, ours, theirs in zip(pair.prompts, mine, others, strict=True):
        found.answers += len(ours)
        found.tokens += sum(len(ids) for ids, _ in ours)
        if _same(ours, theirs):
            found.same += 1
        elif _same(ours, theirs := theirs_of(pair, [prompt], options)[0]):
            found.alone += 1
        else:
            exact = doubled()
            pairs = [of(exact, [prompt], options)[0] for of in (ours_of, theirs_of)]
            is_tie = _same(*pairs)
            found.ties += is_tie
            found.faults += not is_tie
            _tell_difference(prompt, ours, theirs, *pairs)
            continue
        found.score = max(
            found.score, *(abs(a[1] - b[1]) for a, b in zip(ours, theirs, strict=False))
        )
    return found


def _same(one: Answers, other: Answers) -> bool:
    # What was never finished is filled up by transformers with copies that score nothing.
    real = [ids for ids, score in other if score > -1e8]
    return [ids for ids, _ in one] == real


def _tell_difference(prompt: list[int], *answers: Answers) -> None:
    """Where four answers part, for whoever looks."""
    for name, some in zip(("ours", "theirs", "ours64", "theirs64"), answers, strict=True):
        shown = " ".join(map(str, some[0][0][:12]))
        scores = ", ".join(f"{score:.7f}" for _, score in some)
        print(f"\n  prompt of {len(prompt)}: {name}: {shown} ...; {scores}", file=sys.stderr)


def texts_of(paths: Sequence[str]) -> str:
    """What prompts are cut from: files, or Python's own documentation."""
    if not paths:
        return "\n".join(pydoc_data.topics.topics.values())
    return "\n".join(Path(path).read_text(encoding="utf-8")[:200_000] for path in paths)


def campaign(
    names: Sequence[str], cases: Sequence[str], texts: str, given: argparse.Namespace
) -> list[dict[str, Any]]:
    """A record for each case of each model."""
    records: list[dict[str, Any]] = []
    for name in names:
        try:
            pair = MODELS[name](texts, getattr(given, name, None))
        except PolyheadError as error:
            print(f"{name} is missing: {error}", file=sys.stderr)
            records.append({"model": name, "missing": str(error)})
            continue
        held: list[Pair] = []

        def doubled(pair: Pair = pair, held: list[Pair] = held) -> Pair:
            if not held:
                held.append(pair.double())
            return held[0]

        for case in cases:
            began = perf_counter()
            found = compare(pair, doubled, CASES[case])
            seconds = round(perf_counter() - began, 1)
            records.append({"model": name, "case": case, **asdict(found), "seconds": seconds})
            print(f"{name}: {case}: {found}, {seconds} s", file=sys.stderr, flush=True)
        del pair, doubled, held
        gc.collect()
    return records


def table(records: Sequence[dict[str, Any]]) -> str:
    """A line for each model: all its cases together."""
    counts = ("texts", "answers", "tokens", "same", "alone", "ties", "faults")
    lines = [" ".join(f"{title:>8}" for title in ("model", "cases", *counts, "score"))]
    for name in dict.fromkeys(record["model"] for record in records):
        mine = [r for r in records if r["model"] == name and "case" in r]
        if not mine:
            lines.append(f"{name:>8} missing")
            continue
        sums = [sum(record[count] for record in mine) for count in counts]
        score = max(record["score"] for record in mine)
        cells = [name, len(mine), *sums, f"{score:.1e}"]
        lines.append(" ".join(f"{cell:>8}" for cell in cells))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; default: all")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE",
                        help="such as greedy; default: all")  # fmt: skip
    parser.add_argument("--texts", nargs="+", default=[], metavar="FILE",
                        help="prompts are cut from (default: Python's documentation)")  # fmt: skip
    parser.add_argument("--t5", metavar="DIR", help="a checkpoint of T5")
    parser.add_argument("--marian", metavar="DIR", help="a checkpoint of Marian")
    parser.add_argument("--json", action="store_true", help="one JSON record a case")
    args = parser.parse_args()
    for name in args.models:
        if name not in MODELS:
            parser.error(f"there is no model {name!r}; name some of {', '.join(MODELS)}")
    records = campaign(args.models or list(MODELS), args.cases, texts_of(args.texts), args)
    if args.json:
        for record in records:
            print(json.dumps(record, ensure_ascii=False))
    print(table(records), file=sys.stderr if args.json else sys.stdout)
    return 1 if any(record.get("faults") for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
