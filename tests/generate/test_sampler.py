"""Slots: rows that come and go, are asked about at several places, and fork."""

import pytest
import torch
from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.generate.config import GenerationConfig
from polyhead.generate.sampling.sampler import Sampler
from polyhead.generate.sampling.trie import Trie

CPU = torch.device("cpu")
VOCAB = 40
TRIE = Trie([(3, 4, 5), (3, 4), (3, 6), (7,), (8, 9, 10, 11)])
ASKS = {
    "greedy": {"temperature": 0},
    "drawn": {},
    "filters": {"top_k": 9, "top_p": 0.9, "min_p": 0.01, "temperature": 0.8},
    "typical": {"typical_p": 0.7},
    "cutoffs": {"epsilon_cutoff": 0.01, "eta_cutoff": 0.02},
    "repetition": {"repetition_penalty": 1.7},
    "counts": {"presence_penalty": 0.5, "frequency_penalty": 0.8, "temperature": 0},
    "dry": {"dry_multiplier": 3.0, "dry_base": 1.3, "temperature": 0},
    "dry, last": {"dry_multiplier": 3.0, "dry_penalty_last_n": 5},
    "ngrams": {"no_repeat_ngram_size": 2, "temperature": 0},
    "ngrams of 3": {"no_repeat_ngram_size": 3, "temperature": 0},
    "bad words": {"bad_words_ids": [[5], [1, 2], [2, 3, 4]]},
    "biases": {"logit_bias": {4: 3.0, 5: -9.0}, "sequence_bias": [([1, 2], 5.0)]},
    "never": {"suppress_tokens": [1, 2, 3], "begin_suppress_tokens": [4, 5]},
    "early": {"min_new_tokens": 6, "temperature": 0},
    "decay": {"exponential_decay_length_penalty": (2, 1.5)},
    "forced": {"forced_bos_token_id": 7, "forced_prefix_ids": [8, 9], "forced_eos_token_id": 0},
    "trie": {"trie": TRIE},
}


def config(name: str, **more: object) -> GenerationConfig:
    return GenerationConfig(**({"max_new_tokens": 12} | ASKS[name] | more))


def some_logits(places: int, seed: int = 0) -> Tensor:
    """`[places, V]`; few tokens are likely, so that they come again."""
    torch.manual_seed(seed)
    logits = torch.randn(places, VOCAB)
    logits[:, :6] += 2
    return logits


def alone(name: str, prompt: list[int], logits: Tensor) -> list[int]:
    """What a row draws one after the other, by itself."""
    sampler = Sampler(1, len(prompt) + len(logits), VOCAB, CPU)
    slot = sampler.open(config(name), prompt, 5, ends=(0,))
    ids: list[int] = []
    for place, row in enumerate(logits):
        ids.append(int(sampler(row[None], [slot], [place])))
        sampler.write(slot, place, ids[-1:])
        sampler.accept(slot, ids[-1:])
    return ids


@pytest.mark.parametrize("name", ASKS)
def test_drafts_change_no_token(name):
    """Wrong drafts, overwritten; several places of a slot in one call; places asked for twice."""
    logits, prompt = some_logits(12), [1, 2, 1, 3]
    expected = alone(name, prompt, logits)
    sampler = Sampler(2, 64, VOCAB, CPU)
    slot = sampler.open(config(name), prompt, 5, ends=(0,))
    ids: list[int] = []
    while len(ids) < 12:
        start = len(ids)
        draft = [*expected[start : start + start % 3], 5, 1][: 11 - start]
        sampler.write(slot, start, draft)
        places = list(range(start, start + len(draft) + 1))
        drawn = sampler(logits[places], [slot] * len(places), places).tolist()
        again = sampler(logits[places], [slot] * len(places), places).tolist()
        assert drawn == again
        pairs = enumerate(zip(draft, drawn, strict=False))
        new = drawn[: next((i for i, (guess, token) in pairs if guess != token), len(draft)) + 1]
        sampler.write(slot, start, new)
        sampler.accept(slot, new)
        ids += new
    assert ids == expected


def test_rows_of_every_kind_draw_together_what_they_draw_alone():
    logits = {name: some_logits(12, seed) for seed, name in enumerate(ASKS)}
    prompts = {name: [1, 2, 3, 1, 2][: 1 + seed % 5] for seed, name in enumerate(ASKS)}
    expected = {name: alone(name, prompts[name], logits[name]) for name in ASKS}
    sampler = Sampler(len(ASKS), 32, VOCAB, CPU)
    going: dict[str, tuple[int, list[int]]] = {}
    waiting = list(ASKS)
    while waiting or going:
        if waiting:  # one more joins at each step; those that are done leave
            name = waiting.pop()
            going[name] = sampler.open(config(name), prompts[name], 5, ends=(0,)), []
        slots = [slot for slot, _ in going.values()]
        written = [len(ids) for _, ids in going.values()]
        now = torch.stack([logits[name][len(ids)] for name, (_, ids) in going.items()])
        drawn = sampler(now, slots, written).tolist()
        for (name, (slot, ids)), token in zip(list(going.items()), drawn, strict=True):
            sampler.write(slot, len(ids), [token])
            sampler.accept(slot, [token])
            ids.append(token)
            if len(ids) == 12:
                assert ids == expected[name], name
                sampler.close(slot)
                del going[name]


@pytest.mark.parametrize("name", ASKS)
def test_a_fork_goes_its_own_way(name):
    logits, prompt = some_logits(12, 3), [1, 2]
    expected = alone(name, prompt, logits)
    sampler = Sampler(3, 32, VOCAB, CPU)
    slot = sampler.open(config(name), prompt, 5, ends=(0,))
    sampler.write(slot, 0, expected[:5])
    sampler.accept(slot, expected[:5])
    same, other = sampler.fork(slot), sampler.fork(slot, seed=9)
    sampler.write(other, 5, [5, 1, 2])
    places = list(range(5, 12))
    for copy in (slot, same):
        sampler.write(copy, 5, expected[5:])
        assert sampler(logits[5:], [copy] * 7, places).tolist() == expected[5:]


def test_mirostat_follows_what_was_accepted():
    miro = GenerationConfig(mirostat=2, mirostat_tau=2.0, max_new_tokens=300)
    assert not miro.speculates
    sampler = Sampler(2, 400, VOCAB, CPU)
    slots = [sampler.open(miro, [1], 5), sampler.open(GenerationConfig(), [1], 5)]
    torch.manual_seed(0)
    bits: list[float] = []
    for place in range(300):
        logits = torch.randn(1, VOCAB) * 2
        drawn = sampler(logits.expand(2, -1), slots, [place, place]).tolist()
        bits.append(float(sampler._surprise[slots[0]]))
        for slot, token in zip(slots, drawn, strict=True):
            sampler.write(slot, place, [token])
            sampler.accept(slot, [token])
    assert abs(sum(bits[50:]) / 250 - 2.0) < 0.2


def test_constrain_is_what_a_search_sees():
    """Penalties, bans and forced tokens, without temperature or filters, as transformers has it."""
    hf = pytest.importorskip("transformers.generation.logits_process")
    asked = {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[5], [1, 2]],
        "min_new_tokens": 4,
        "sequence_bias": [([3, 1], 2.0)],
        "suppress_tokens": [9],
    }
    ends = [0]
    theirs = [
        hf.SequenceBiasLogitsProcessor({(3, 1): 2.0}),
        hf.RepetitionPenaltyLogitsProcessor(1.3),
        hf.NoRepeatNGramLogitsProcessor(2),
        hf.NoBadWordsLogitsProcessor([[5], [1, 2]], 0),
        hf.MinNewTokensLengthLogitsProcessor(3, 4, torch.tensor(ends)),
        hf.SuppressTokensLogitsProcessor([9]),
    ]
    sampler = Sampler(3, 32, VOCAB, CPU)
    setting = GenerationConfig(temperature=0.3, top_k=2, **asked)
    texts = [[], [3, 1], [1, 2, 4, 3, 1]]
    slots = [sampler.open(setting, [2, 1, 3], 0, ends) for _ in texts]
    for slot, text in zip(slots, texts, strict=True):
        sampler.write(slot, 0, text)
    logprobs = some_logits(3).log_softmax(1)
    got = sampler.constrain(logprobs, slots, [len(text) for text in texts])
    for row, text in enumerate(texts):
        expected = logprobs[row : row + 1]
        for processor in theirs:
            expected = processor(torch.tensor([[2, 1, 3, *text]]), expected)
        torch.testing.assert_close(got[row : row + 1], expected)


def test_a_text_of_a_trie_is_one_of_its_runs():
    found = set()
    for seed in range(40):
        sampler = Sampler(1, 32, VOCAB, CPU)
        slot = sampler.open(config("trie"), [1], seed, ends=(0,))
        ids: list[int] = []
        while not sampler.is_complete(slot) and ids[-1:] != [0]:
            ids.append(int(sampler(some_logits(1, seed + len(ids)), [slot], [len(ids)])))
            sampler.write(slot, len(ids) - 1, ids[-1:])
        found.add(tuple(token for token in ids if token))
    assert found == {(3, 4, 5), (3, 4), (3, 6), (7,), (8, 9, 10, 11)}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["greedy", "drawn", "filters", "typical", "repetition"])
def test_what_is_no_number_draws_nothing(name, value):
    sampler = Sampler(2, 32, VOCAB, CPU)
    slots = [sampler.open(config(name), [1], 5) for _ in range(2)]
    logits = some_logits(2)
    logits[1] = torch.tensor(value)
    first, second = sampler(logits, slots, [0, 0]).tolist()
    assert first >= 0
    assert second == -1


def test_greedy_rows_that_ask_for_nothing_cost_one_argmax(monkeypatch):
    sampler = Sampler(2, 32, VOCAB, CPU)
    slots = [sampler.open(config("greedy"), [1], 5) for _ in range(2)]
    logits = some_logits(2).bfloat16()
    sampler(logits, slots, [0, 0])
    for name in ("float", "softmax", "log_softmax", "topk", "sort", "clone"):
        monkeypatch.setattr(Tensor, name, None)
    assert torch.equal(sampler(logits, slots, [1, 1]), logits.argmax(1))


@pytest.mark.parametrize(
    "asked",
    [
        {"logit_bias": {VOCAB: 1.0}},
        {"bad_words_ids": [[1, VOCAB]]},
        {"suppress_tokens": [VOCAB]},
        {"forced_bos_token_id": VOCAB},
        {"trie": Trie([(1, VOCAB)])},
    ],
)
def test_tokens_that_the_head_lacks_are_refused(asked):
    with pytest.raises(ConfigError, match=f"{next(iter(asked))} names token {VOCAB}"):
        Sampler(1, 8, VOCAB, CPU).open(GenerationConfig(**asked), [1], 0)
