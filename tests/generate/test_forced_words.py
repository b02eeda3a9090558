"""Words that beam search must write, beside a derivation by whole forwards and plain lists."""

import random
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from tests.nn.parts import shaken

import polyhead as ph
from polyhead.generate.config import GenerationConfig, SearchConfig
from polyhead.generate.engine import Engine
from polyhead.generate.engine_config import EngineConfig
from polyhead.generate.forced import ForcedBeams
from polyhead.generate.sampling.forced_words import Progress
from polyhead.generate.search import BeamSearch, advance
from polyhead.generate.seq2seq import Seq2Seq
from polyhead.models.model import TaskModel

V = 13
Entries = list[list[list[int]]]
Texts = list[tuple[tuple[int, ...], float]]
Logprobs = Callable[[list[int]], list[float]]


def made(family: str, seed: int) -> TaskModel:
    sizes: dict[str, Any] = dict(d_model=16, num_layers=2, num_heads=2)
    sizes |= dict(head_dim=8, d_ff=24) if family == "t5" else dict(max_seq_len=48)
    if family == "llama":
        sizes["d_ff"] = 24
    return shaken(ph.build(family, seed=seed, vocab_size=V, **sizes).eval(), 0.3, seed)


def holds(text: list[int], word: list[int]) -> bool:
    return any(text[i : i + len(word)] == word for i in range(len(text)))


def missing(text: list[int], entries: Entries) -> Entries:
    return [entry for entry in entries if not any(holds(text, word) for word in entry)]


def begun(text: list[int], word: list[int]) -> int:
    return max(k for k in range(len(word)) if not k or text[-k:] == word[:k])


def lacking(text: list[int], entries: Entries) -> int:
    """Tokens of the words that are still to come, the one that is begun first."""
    left = missing(text, entries)
    ways = [
        len(word) - begun(text, word)
        + sum(min(map(len, other)) for j, other in enumerate(left) if j != i)
        for i, entry in enumerate(left)
        for word in entry
    ]  # fmt: skip
    return min(ways, default=0)


def searched(
    logprobs: Logprobs, entries: Entries, n: int, limit: int, ends: list[int], power: float,
    early: bool | str,
) -> Texts:  # fmt: skip
    """Post and Vilar 2018, figure 2: the best of all, what the words want, and turns of banks."""
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    done: Texts = []
    for length in range(1, limit + 1):
        options: list[tuple[list[int], float]] = []
        for ids, score in beams:
            row = logprobs(ids)
            best = sorted(range(V), key=lambda t: -row[t])[: n + len(ends)]
            wanted = [word[begun(ids, word)] for entry in missing(ids, entries) for word in entry]
            for token in {*best, *wanted}:
                text = [*ids, token]
                lacks = lacking(text, entries)
                allowed = lacks == 0 if token in ends else lacks <= limit - length
                if allowed and row[token] > -float("inf"):
                    options.append((text, score + row[token]))
        options.sort(key=lambda option: -option[1])
        complete = [option for option in options if not missing(option[0], entries)]
        for text, score in complete[:n]:
            if length == limit or text[-1] in ends:
                done.append((tuple(text), score / length**power))
        done = sorted(done, key=lambda text: -text[1])[:n]
        banks: dict[int, list[tuple[list[int], float]]] = {}
        for option in options:
            if option[0][-1] not in ends:
                banks.setdefault(lacking(option[0], entries), []).append(option)
        beams = []
        while len(beams) < n and any(banks.values()):
            for _, bank in sorted(banks.items()):
                if bank and len(beams) < n:
                    beams.append(bank.pop(0))
        if not beams:
            break
        top = max(score for _, score in beams)
        if len(done) == n:
            reach = limit if early == "never" and power > 0 else length
            if early is True or top / reach**power <= done[-1][1]:
                break
    return done


def drawn(seed: int) -> tuple[Entries, dict[str, Any], list[int]]:
    """Words that overlap now and then, options, and end tokens."""
    chance = random.Random(seed)
    ends = chance.choice([[], [0], [0, 1]])

    def word() -> list[int]:
        return [chance.randrange(2, 5 if chance.random() < 0.5 else V) for _ in range(
            chance.choice([1, 1, 2, 3])
        )]  # fmt: skip

    entries = [
        [word() for _ in range(chance.choice([1, 1, 2]))] for _ in range(chance.randint(1, 3))
    ]
    beams = chance.choice([2, 3, 5])
    options: dict[str, Any] = dict(
        num_beams=beams, num_return_sequences=beams,
        max_new_tokens=lacking([], entries) + chance.randint(0, 5),
        length_penalty=chance.choice([0.0, 1.0, 2.0, -0.5]),
        early_stopping=chance.choice([False, True, "never"]),
    )  # fmt: skip
    return entries, options, ends


def check(found: Texts, expected: Texts, entries: Entries, ends: list[int]) -> None:
    assert [ids for ids, _ in found] == [ids for ids, _ in expected]
    assert found
    for (ids, score), (_, other) in zip(found, expected, strict=True):
        assert score == pytest.approx(other, abs=1e-4)
        assert all(any(holds(list(ids), word) for word in entry) for entry in entries)
        assert not set(ids[:-1]) & set(ends)


def wanted_of(options: dict[str, Any], ends: list[int]) -> tuple[Any, ...]:
    names = ("num_beams", "max_new_tokens", "length_penalty", "early_stopping")
    n, limit, power, early = (options[name] for name in names)
    return n, limit, ends, power, early


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("seed", range(20))
def test_decoders_write_what_the_derivation_writes(family: str, seed: int) -> None:
    model = made(family, seed % 3)
    entries, options, ends = drawn(seed)
    prompts = [[3, 4, 5, 6], [7], [8, 9, 1, 2, 11, 12, 12]]
    settings = EngineConfig(max_rows=7, cache_tokens=160, block_size=4, chunk=3, idle_chunk=5)
    engine = Engine(model, None, settings)
    config = GenerationConfig(temperature=0, force_words_ids=entries, **options)
    requests = [engine.add(prompt, config, ends=ends) for prompt in prompts]
    engine.run()
    for prompt, request in zip(prompts, requests, strict=True):

        def logprobs(ids: list[int], prompt: list[int] = prompt) -> list[float]:
            with torch.inference_mode():
                return model(torch.tensor([[*prompt, *ids]]))[0, -1].log_softmax(-1).tolist()

        found = [(text.token_ids, text.score or 0.0) for text in request.outcome()]
        check(found, searched(logprobs, entries, *wanted_of(options, ends)), entries, ends)


@pytest.mark.parametrize("seed", range(20))
def test_encoder_decoders_write_what_the_derivation_writes(seed: int) -> None:
    model = made("t5", seed % 3)
    entries, options, ends = drawn(100 + seed)
    sources = [[3, 4, 5, 6], [7], [8, 9, 1, 2, 11, 12, 12]]
    writer = Seq2Seq(model)
    writer.ends, writer.start = frozenset(ends), 0
    answers = writer.generate(sources, SearchConfig(force_words_ids=entries, **options))
    for source, own in zip(sources, answers, strict=True):

        def logprobs(ids: list[int], source: list[int] = source) -> list[float]:
            with torch.inference_mode():
                logits = model(torch.tensor([source]), torch.tensor([[0, *ids]]))
                return logits[0, -1].log_softmax(-1).tolist()

        found = [(answer.ids, answer.score) for answer in own]
        check(found, searched(logprobs, entries, *wanted_of(options, ends)), entries, ends)


@pytest.mark.parametrize("seed", range(12))
def test_no_words_are_plain_beam_search(seed: int) -> None:
    _, options, ends = drawn(200 + seed)
    options["max_new_tokens"] += 4
    config = GenerationConfig(temperature=0, **options)
    plain = BeamSearch(config, ends, config.max_new_tokens)
    forced = ForcedBeams(config, ends, config.max_new_tokens)
    generator = torch.Generator().manual_seed(seed)
    rows: dict[tuple[int, ...], torch.Tensor] = {}

    def scores(answers: list[list[int]]) -> torch.Tensor:
        for ids in map(tuple, answers):
            if ids not in rows:
                rows[ids] = torch.randn(V, generator=generator).mul(2).log_softmax(0)
        return torch.stack([rows[tuple(ids)] for ids in answers])

    while not plain.is_done:
        assert not forced.is_done
        advance([plain], scores(plain.answers))
        forced.advance(scores(forced.answers))
    assert forced.is_done
    assert [h.ids for h in forced.results()] == [h.ids for h in plain.results()]
    for ours, theirs in zip(forced.results(), plain.results(), strict=True):
        assert ours.score == pytest.approx(theirs.score, abs=1e-5)


@pytest.mark.parametrize("seed", range(30))
def test_what_is_missing_follows_from_the_text_alone(seed: int) -> None:
    chance = random.Random(seed)
    entries = [
        [
            [chance.randrange(3) for _ in range(chance.randint(1, 4))]
            for _ in range(chance.randint(1, 2))
        ]
        for _ in range(chance.randint(1, 3))
    ]
    for ids in product(range(3), repeat=5):
        text, progress = [], Progress.start(entries)
        for token in ids:
            assert progress.remaining == lacking(text, entries)
            if not progress.is_done:
                least = min(progress.after(each).remaining for each in progress.wanted)
                assert least < progress.remaining
            text.append(token)
            progress = progress.after(token)
            assert progress.is_done == (not missing(text, entries))


def test_words_stand_in_a_batch_with_plain_searches_and_samples() -> None:
    model = made("gpt2", 1)
    configs = [
        GenerationConfig(temperature=0, num_beams=3, max_new_tokens=8, force_words_ids=[[9, 10]]),
        GenerationConfig(temperature=0, num_beams=3, max_new_tokens=8),
        GenerationConfig(seed=1, max_new_tokens=8, num_return_sequences=2),
        GenerationConfig(
            temperature=0, num_beams=2, max_new_tokens=8, force_words_ids=[[[2], [3, 4]], [5]],
            no_repeat_ngram_size=2, num_return_sequences=2,
        ),
    ]  # fmt: skip

    def texts(some: list[GenerationConfig], rows: int) -> list[Any]:
        engine = Engine(model, None, EngineConfig(max_rows=rows, cache_tokens=48, block_size=4))
        requests = [engine.add([3, 4, 5, 6, 7], config, ends=(0,)) for config in some]
        engine.run()
        return [[text.token_ids for text in request.outcome()] for request in requests]

    assert texts(configs, 4) == [texts([config], 3)[0] for config in configs]


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (dict(force_words_ids=[[1, 2, 3], [4, 5]], max_new_tokens=4), "needs 5 tokens, and 4 may"),
        (dict(force_words_ids=[[1, 2]], forced_eos_token_id=0, max_new_tokens=2), "and 1 may"),
        (dict(force_words_ids=[[1, 2]], forced_prefix_ids=[3, 1], max_new_tokens=2), "needs 3"),
        (dict(force_words_ids=[[[1], [2, 0]]]), r"has \[2, 0\], and token 0 ends a text"),
        (dict(force_words_ids=[[1, 99]]), "force_words_ids names token 99"),
    ],
)
def test_words_that_cannot_be_are_refused_at_once(said: dict[str, Any], why: str) -> None:
    engine = Engine(made("gpt2", 0), None)
    with pytest.raises(ph.ConfigError, match=why) as caught:
        engine.request([5], GenerationConfig(temperature=0, num_beams=2, **said), ends=(0,))
    assert "\n" not in str(caught.value)


def test_the_last_tokens_are_enough() -> None:
    """Of a prefix and a forced end, as much room is left as the words need, and no more."""
    engine = Engine(made("gpt2", 0), None)
    config = GenerationConfig(
        temperature=0, num_beams=3, max_new_tokens=5, forced_eos_token_id=0,
        forced_prefix_ids=[3, 1], force_words_ids=[[1, 2, 7]],
    )  # fmt: skip
    request = engine.add([5], config, ends=(0,))
    engine.run()
    assert all(text.token_ids[:4] == (3, 1, 2, 7) for text in request.outcome())


def test_words_that_are_banned_end_in_one_line_and_nobody_else() -> None:
    engine = Engine(made("gpt2", 0), None)
    both: dict[str, Any] = dict(temperature=0, num_beams=2, max_new_tokens=5)
    banned = engine.add([5], GenerationConfig(force_words_ids=[[7]], suppress_tokens=[7], **both))
    other = engine.add([5], GenerationConfig(force_words_ids=[[7]], **both))
    engine.run()
    with pytest.raises(ph.DataError, match="no text of 5 tokens or fewer was found that holds"):
        banned.outcome()
    assert 7 in other.outcome()[0].token_ids
    assert engine.memory.num_free_rows == engine.memory.max_rows


def test_a_search_that_is_cancelled_gives_what_it_had() -> None:
    engine = Engine(made("gpt2", 0), None)
    config = GenerationConfig(
        temperature=0, num_beams=2, max_new_tokens=9, force_words_ids=[[7, 8]]
    )
    request = engine.add([5], config, ends=())
    for _ in range(3):
        engine.step()
    engine.cancel(request)
    assert [len(text.token_ids) for text in request.outcome()] == [3]
