import itertools

import pytest
import torch
from torch import Tensor

from polyhead.generate.config import GenerationConfig
from polyhead.generate.sampling import choice
from polyhead.generate.sampling.draw import draw, likeliest
from polyhead.generate.sampling.filters import keep_min_p, keep_top_k, keep_top_p
from polyhead.generate.sampling.penalties import penalize_counts, penalize_repetition
from polyhead.generate.sampling.sampler import Sampler
from polyhead.generate.sampling.seeds import row_seeds

INF = float("inf")


def some_logits(kind: str, rows: int = 4, vocab: int = 97) -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(rows, vocab) * 3
    match kind:
        case "random":
            return x
        case "ties":
            return x.round()
        case "flat":
            return torch.zeros(rows, vocab)
        case "peaked":
            return x * 1000
        case "removed":
            return x.masked_fill(torch.rand(rows, vocab) < 0.5, -INF)
        case "bf16":
            return x.bfloat16()
    raise AssertionError(kind)


KINDS = ["random", "ties", "flat", "peaked", "removed", "bf16"]


class Batch:
    """Rows that all draw one token a call, as the engine makes them."""

    def __init__(self, configs, prompts=None, steps=64, ends=None, vocab=97) -> None:
        prompts = prompts or [[1]] * len(configs)
        seeds = row_seeds(configs, prompts, shared=False)
        ends = ends or [()] * len(configs)
        longest = max(map(len, prompts)) + steps
        self.sampler = Sampler(len(configs), longest, vocab, torch.device("cpu"))
        rows = zip(configs, prompts, seeds, ends, strict=True)
        self.slots = [self.sampler.open(*row) for row in rows]
        self.written = 0

    def __call__(self, logits: Tensor) -> Tensor:
        drawn = self.sampler(logits, self.slots, [self.written] * len(self.slots))
        for slot, token in zip(self.slots, drawn.tolist(), strict=True):
            self.sampler.write(slot, self.written, [token])
            self.sampler.accept(slot, [token])
        self.written += 1
        return drawn


sampler = Batch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("values", [(1, 5, 96, 200), (3, 3, 3, 3)])
def test_top_k_equals_transformers(kind, values):
    warp = pytest.importorskip("transformers").TopKLogitsWarper
    logits = some_logits(kind)
    got = keep_top_k(logits, torch.tensor(values))
    for row, k in enumerate(values):
        assert torch.equal(got[row], warp(k)(None, logits[row : row + 1])[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("values", [(0.01, 0.5, 0.9, 0.99), (1e-9, 0.3, 0.7, 0.5)])
def test_top_p_equals_transformers(kind, values):
    warp = pytest.importorskip("transformers").TopPLogitsWarper
    logits = some_logits(kind).float()
    got = keep_top_p(logits, torch.tensor(values))
    for row, p in enumerate(values):
        expected = warp(p)(None, logits[row : row + 1])[0]
        if kind in ("random", "peaked", "removed"):
            assert torch.equal(got[row], expected)
        # Of equal logits any may stay: there it is what an unstable sort makes it.
        assert torch.equal(got[row].sort().values, expected.sort().values)


def test_top_p_keeps_the_token_that_crosses_and_the_first_of_equals():
    logits = torch.tensor([0.2, 0.5, 0.1, 0.2]).log().expand(5, 4)
    kept = keep_top_p(logits, torch.tensor([0.4, 0.5, 0.51, 0.7, 0.75])).isfinite()
    assert [row.nonzero()[:, 0].tolist() for row in kept] == [[1], [1], [0, 1], [0, 1], [0, 1, 3]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("values", [(0.0, 0.05, 0.5, 1.0)])
def test_min_p_equals_transformers(kind, values):
    warp = pytest.importorskip("transformers").MinPLogitsWarper
    logits = some_logits(kind)
    got = keep_min_p(logits.float(), torch.tensor(values))
    for row, p in enumerate(values):
        if kind == "flat" and p == 1.0:
            assert torch.equal(got[row], logits[row])  # all are as likely as the most likely
            continue
        assert torch.equal(got[row], warp(p)(None, logits[row : row + 1].float())[0])


@pytest.mark.parametrize("kind", ["random", "ties", "bf16"])
def test_repetition_penalty_equals_transformers(kind):
    processor = pytest.importorskip("transformers").RepetitionPenaltyLogitsProcessor
    logits, seen = some_logits(kind), torch.randint(97, (4, 30))
    penalties = (1.0, 1.3, 2.5, 0.7)
    got = penalize_repetition(logits.float(), seen, torch.tensor(penalties))
    for row, penalty in enumerate(penalties):
        expected = processor(penalty)(seen[row : row + 1], logits[row : row + 1].float())
        assert torch.equal(got[row], expected[0])


def test_counts_are_penalized_as_documented():
    logits = torch.zeros(2, 5)
    drawn = torch.tensor([[1, 1, 3], [4, 4, 4]])
    got = penalize_counts(logits, drawn, torch.tensor([0.5, 0.0]), torch.tensor([0.25, 1.0]))
    assert got.tolist() == [[0, -1.0, 0, -0.75, 0], [0, 0, 0, 0, -3.0]]


@pytest.mark.parametrize(
    "transform",
    [
        lambda x: penalize_repetition(x, torch.tensor([[1, 2]] * 4), torch.full((4,), 2.0)),
        lambda x: penalize_counts(x, torch.tensor([[1, 2]] * 4), torch.ones(4), torch.ones(4)),
        lambda x: keep_top_k(x, torch.tensor([1] * 4)),
        lambda x: keep_top_p(x, torch.tensor([0.5] * 4)),
        lambda x: keep_min_p(x, torch.tensor([0.5] * 4)),
        lambda x: draw(x, torch.zeros(4)),
        lambda x: sampler(
            [GenerationConfig(top_k=3, repetition_penalty=2, min_new_tokens=2)] * 4, ends=[(3,)] * 4
        )(x),
    ],
)
def test_the_callers_logits_stay_as_they_were(transform):
    logits = some_logits("random")
    before = logits.clone()
    result = transform(logits)
    assert torch.equal(logits, before)
    assert result.data_ptr() != logits.data_ptr()


def test_rows_that_ask_for_nothing_keep_everything():
    logits = some_logits("random")
    nothing = torch.zeros(4)
    assert torch.equal(keep_top_k(logits, nothing.long()), logits)
    assert torch.equal(keep_top_p(logits, nothing + 1), logits)
    assert torch.equal(keep_min_p(logits, nothing), logits)


@pytest.mark.parametrize("vocab", [5, 256, 300, 5000])
def test_the_likeliest_is_the_first_of_the_largest(vocab):
    logits = torch.randn(60, vocab).round()
    logits[0, vocab - 1], logits[1, vocab // 2], logits[2] = INF, torch.nan, -INF
    assert torch.equal(likeliest(logits), logits.argmax(1))


def test_draw_inverts_the_cumulative_distribution():
    logits = torch.tensor([0.1, 0.0, 0.6, 0.3, 0.0]).log().expand(6, 5)
    uniform = torch.tensor([0.0, 0.0999, 0.1001, 0.6999, 0.7001, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniform).tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("vocab", [512, 513, 1000, 1024, 5000])
def test_draws_from_large_vocabularies_invert_it_too(vocab):
    logits = (torch.randn(40, vocab) * 4).masked_fill(torch.rand(40, vocab) < 0.6, -INF)
    uniform = torch.rand(40, dtype=torch.float64)
    uniform[:3] = torch.tensor([0.0, 1 - 2**-53, 0.5])
    cumulative = logits.double().softmax(1).cumsum(1)
    index = draw(logits, uniform)
    assert (logits.gather(1, index[:, None]) > -INF).all()
    above = cumulative.gather(1, index[:, None])[:, 0]
    below = above - logits.double().softmax(1).gather(1, index[:, None])[:, 0]
    assert (below - 1e-6 <= uniform).all()
    assert (uniform <= above + 1e-6).all()


CASES = [
    {},
    {"temperature": 0.7},
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"temperature": 1.7, "top_k": 6, "top_p": 0.8, "min_p": 0.05},
]


def expected_probabilities(logits: Tensor, case: dict) -> Tensor:
    x = logits / case.get("temperature", 1.0)
    if k := case.get("top_k"):
        x = keep_top_k(x, torch.tensor([k]))
    x = keep_top_p(x, torch.tensor([case.get("top_p", 1.0)]))
    return keep_min_p(x, torch.tensor([case.get("min_p", 0.0)])).softmax(-1)[0].double()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_draws_follow_the_distribution(case):
    """Chi-square over 10 kinds of tokens and 6,400 draws, at a fixed seed."""
    torch.manual_seed(1)
    logits = torch.randn(1, 10) * 1.5
    many = sampler([GenerationConfig(seed=seed, **case) for seed in range(100)])
    drawn = torch.stack([many(logits.expand(100, -1)) for _ in range(64)]).flatten()
    expected = expected_probabilities(logits, case) * len(drawn)
    counts = torch.bincount(drawn, minlength=10).double()
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    chi2 = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    # 99.9 % quantile of chi-square with up to 9 degrees of freedom.
    assert chi2 < 27.9


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
def test_a_shortlist_changes_no_draw(monkeypatch, scale):
    torch.manual_seed(2)
    fields = [
        {"top_k": 7},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"top_k": 40, "top_p": 0.7, "min_p": 0.02, "temperature": 0.5},
        {"top_p": 0.5, "temperature": 3.0},
        {},
        {"temperature": 0},
    ]
    configs = [GenerationConfig(seed=3, **f) for f in fields]
    logits = [(torch.randn(7, 20_000) * scale).bfloat16() for _ in range(20)]
    short = sampler(configs)
    got = [short(x) for x in logits]
    monkeypatch.setattr(choice, "_widths", lambda top_ks: ())
    dense = sampler(configs)
    assert torch.equal(torch.stack(got), torch.stack([dense(x) for x in logits]))


def test_a_row_draws_the_same_in_any_batch():
    cases = [{}, {"top_k": 3}, {"temperature": 0}, {"top_p": 0.5}, {"repetition_penalty": 1.5}]
    configs = [GenerationConfig(seed=11, **case) for case in cases]
    prompts = [[1], [2, 3, 4], [5, 6], [7, 7], [8, 1, 2]]
    logits = [some_logits("random", rows=5) + step for step in range(70)]
    together = sampler(configs, prompts, steps=70)
    batch = torch.stack([together(x) for x in logits])
    for row, (config, prompt) in enumerate(zip(configs, prompts, strict=True)):
        alone = sampler([config], [prompt], steps=70)
        assert [int(alone(x[row : row + 1])) for x in logits] == batch[:, row].tolist()


def test_greedy_takes_the_best_after_penalties():
    logits = torch.tensor([[2.0, 1.5, -1.0], [2.0, 1.5, -1.0]])
    configs = [
        GenerationConfig(temperature=0),
        GenerationConfig(temperature=0, repetition_penalty=2.0),
    ]
    assert sampler(configs, [[0], [0]])(logits).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("name", "values"),
    [("repetition_penalty", (2, 1.3)), ("dry_base", (2, 1.5)), ("presence_penalty", (1, 0.5))],
)
def test_a_row_of_whole_numbers_rounds_nobody_elses(name, values):
    more = {"dry_multiplier": 1} if name == "dry_base" else {}
    configs = [GenerationConfig(**{name: value}, **more) for value in values]
    logits, prompt = some_logits("random", rows=2), [4, 5, 6] * 3
    together, alone = sampler(configs, [prompt] * 2), sampler(configs[1:], [prompt])
    for batch, text in ((together, [4, 5]), (alone, [4, 5])):
        for slot in batch.slots:
            batch.sampler.write(slot, 0, text)
    got = together.sampler.constrain(logits, together.slots, [2, 2])[1:]
    assert torch.equal(got, alone.sampler.constrain(logits[1:], alone.slots, [2]))


def test_frequency_counts_the_text_and_not_the_prompt():
    logits = torch.tensor([[2.0, 1.5, 0.0]])
    greedy = sampler([GenerationConfig(temperature=0, frequency_penalty=0.3)], [[0, 0, 0]])
    # 2.0, then 1.7 > 1.5, then 1.4 < 1.5, then 1.4 > 1.2, ...
    assert [int(greedy(logits)) for _ in range(5)] == [0, 0, 1, 0, 1]


def test_end_tokens_wait_for_the_minimum_length():
    logits = torch.tensor([[3.0, 2.0, 1.0]] * 2)
    configs = [GenerationConfig(temperature=0, min_new_tokens=n) for n in (2, 0)]
    greedy = sampler(configs, ends=[(0, 1), (0,)])
    assert [greedy(logits).tolist() for _ in range(3)] == [[2, 0], [2, 0], [0, 0]]


@pytest.mark.parametrize("case", [{"temperature": 0}, {}, {"top_p": 0.5}, {"top_k": 2}])
@pytest.mark.parametrize("poison", [float("nan"), INF])
@pytest.mark.parametrize("vocab", [5, 5000])
def test_logits_that_are_not_numbers_are_reported(case, poison, vocab):
    logits = torch.zeros(2, vocab)
    logits[1, 2] = poison
    ids = sampler([GenerationConfig(seed=0, **case)] * 2)(logits)
    assert ids[0] >= 0
    assert ids[1] == -1


def test_seeds_depend_on_seed_prompt_and_repetition():
    configs = [GenerationConfig(seed=s) for s in (1, 1, 2, 1)]
    prompts = [[1, 2], [1, 2], [1, 2], [1, 3]]
    own = row_seeds(configs, prompts, shared=False)
    assert own[0] == own[1]
    assert len(set(own)) == 3
    shared = row_seeds(configs, prompts, shared=True)
    assert len(set(shared)) == 4
    assert shared[0] == own[0]
    fresh = [GenerationConfig()] * 2
    assert len({*row_seeds(fresh, [[1], [1]], True), *row_seeds(fresh, [[1], [1]], True)}) == 4


def test_transforms_match_in_every_combination():
    """Temperature, top-k, top-p and min-p chained as transformers chains them."""
    tf = pytest.importorskip("transformers")
    logits = some_logits("random", rows=1)
    for t, k, p, m in itertools.product((0.5, 2.0), (3, 50), (0.4, 0.95), (0.01, 0.3)):
        chain = [tf.TemperatureLogitsWarper(t), tf.TopKLogitsWarper(k), tf.TopPLogitsWarper(p)]
        expected = logits
        for warp in (*chain, tf.MinPLogitsWarper(m)):
            expected = warp(None, expected)
        got = keep_top_k(logits / torch.tensor([t])[:, None], torch.tensor([k]))
        got = keep_min_p(keep_top_p(got, torch.tensor([p])), torch.tensor([m]))
        assert torch.equal(got, expected)
