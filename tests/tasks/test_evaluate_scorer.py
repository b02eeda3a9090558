import random

import pytest
import torch

import polyhead as ph
from polyhead.errors import ConfigError, DataError
from polyhead.generate import scoring as module
from polyhead.models.model import TaskModel
from polyhead.tasks.evaluate.scorer import Request, Scorer

V = 100
SIZES = dict(vocab_size=V, d_model=32, num_layers=2, num_heads=4, max_seq_len=64)
KINDS = {
    "gpt2": ("gpt2", SIZES),
    "llama": ("llama", {**SIZES, "d_ff": 48, "num_kv_heads": 2}),
    "window": ("mistral", {**SIZES, "d_ff": 48, "num_kv_heads": 2, "window": 6}),
    "lstm": ("lstm", {k: SIZES[k] for k in ("vocab_size", "d_model", "num_layers", "max_seq_len")}),
    "bigram": ("bigram", {"vocab_size": V}),
}


def build(name: str) -> TaskModel:
    family, sizes = KINDS[name]
    return ph.build(family, seed=0, init_std=0.3, **sizes).eval()


@pytest.fixture(scope="module", params=KINDS)
def model(request) -> TaskModel:
    return build(request.param)


def asked(shared: int, seed: int = 0) -> list[Request]:
    """Contexts of several lengths with up to four continuations each, in no order."""
    draw = random.Random(seed)
    ids = lambda count: tuple(draw.randrange(V) for _ in range(count))  # noqa: E731
    start = ids(shared)
    found = []
    for _ in range(9):
        context = start + ids(draw.randrange(1, 30))
        found += [Request(context, ids(draw.randrange(1, 9))) for _ in range(draw.randrange(1, 5))]
    draw.shuffle(found)
    return found


def alone(model: TaskModel, request: Request) -> tuple[list[float], bool]:
    """By one forward of the whole."""
    row = torch.tensor([[*request.context, *request.continuation][:-1]])
    with torch.no_grad():
        logprobs = model(row)[0].log_softmax(-1)[len(request.context) - 1 :]
    wanted = torch.tensor(request.continuation)
    tokens = logprobs.gather(1, wanted[:, None])[:, 0].tolist()
    return tokens, torch.equal(logprobs.argmax(1), wanted)


@pytest.mark.parametrize(("shared", "most_tokens"), [(0, 200), (20, 200), (20, 1), (0, 10_000)])
def test_requests_give_what_they_give_alone(model, shared, most_tokens):
    requests = asked(shared)
    found = Scorer(model, most_tokens=most_tokens).logprobs(requests)
    for request, one in zip(requests, found, strict=True):
        tokens, is_greedy = alone(model, request)
        assert one.tokens == pytest.approx(tokens, abs=1e-5)
        assert one.logprob == pytest.approx(sum(tokens), abs=5e-5)
        assert one.is_greedy == is_greedy
        assert one.cut == 0


def test_what_is_most_likely_is_greedy():
    model = build("llama")
    context = (5, 17, 40)
    written = []
    for _ in range(4):
        with torch.no_grad():
            written.append(int(model(torch.tensor([[*context, *written]]))[0, -1].argmax()))
    right, wrong = Scorer(model).logprobs(
        [Request(context, written), Request(context, [*written[:-1], (written[-1] + 1) % V])]
    )
    assert right.is_greedy
    assert not wrong.is_greedy


def read(model: TaskModel, requests: list[Request]) -> int:
    """Positions that the backbone is asked for, padding included."""
    seen = []
    hook = model.backbone.register_forward_pre_hook(lambda m, x: seen.append(x[0].numel()))
    try:
        Scorer(model).logprobs(requests)
    finally:
        hook.remove()
    return sum(seen)


def test_what_is_shared_is_read_once():
    model = build("gpt2")
    context = tuple(range(40))
    choices = [Request(context, (i, i + 1)) for i in range(4)]
    assert read(model, choices) == 40 + 4
    letters = [Request(context, (i,)) for i in range(4)]
    assert read(model, letters) == 40
    start = tuple(range(32))  # two blocks
    questions = [Request((*start, 90 + q), (c,)) for q in range(5) for c in (1, 2)]
    assert read(model, questions) == 32 + 5


def test_more_choices_than_fit_a_batch():
    model = build("gpt2")
    choices = [Request(tuple(range(30)), (i, i + 1)) for i in range(40)]
    widest = []
    hook = model.backbone.register_forward_pre_hook(lambda m, x: widest.append(x[0].numel()))
    found = Scorer(model, most_tokens=320).logprobs(choices)
    hook.remove()
    assert max(widest) < 64
    assert sum(widest) < 30 + 4 * 30 + 40  # what a block holds of the context is found
    assert [one.logprob for one in found] == pytest.approx(
        [sum(alone(model, request)[0]) for request in choices], abs=1e-5
    )


def test_a_context_that_does_not_fit_loses_its_beginning():
    model = build("gpt2")
    long = tuple(i % V for i in range(100))
    (one,) = Scorer(model).logprobs([Request(long, (1, 2, 3))])
    assert one.cut == 100 - (64 - 2)
    tokens, _ = alone(model, Request(long[one.cut :], (1, 2, 3)))
    assert one.tokens == pytest.approx(tokens, abs=1e-5)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), (1,)), "context of request 1 has no tokens"),
        (Request((1,), ()), "continuation of request 1 has no tokens"),
        (Request((1,), (V,)), f"token id {V} is outside"),
        (Request((1,), (1,) * 65), "65 tokens and the model takes 64"),
    ],
)
def test_requests_that_cannot_be(request_, message):
    with pytest.raises(DataError, match=message):
        Scorer(build("gpt2")).logprobs([Request((1,), (2,)), request_])


def test_no_requests():
    assert Scorer(build("gpt2")).logprobs([]) == []


def test_logits_that_are_no_numbers():
    model = build("gpt2")
    with torch.no_grad():
        next(model.backbone.parameters()).fill_(float("nan"))
    with pytest.raises(DataError, match="not finite"):
        Scorer(model).logprobs([Request((1,), (2,))])


def test_logits_are_held_in_pieces(monkeypatch):
    model = build("gpt2")
    requests = asked(0)
    usual = Scorer(model).logprobs(requests)
    monkeypatch.setattr(module, "_MOST_LOGITS", V * 7)
    seen = []
    hook = model.head.register_forward_hook(lambda m, x, y: seen.append(y.shape[0]))
    pieces = Scorer(model).logprobs(requests)
    hook.remove()
    assert max(seen) == 7
    assert [one.logprob for one in pieces] == pytest.approx([one.logprob for one in usual])


def test_an_encoder_decoder_reads_the_context_as_its_source():
    sizes = {key: value for key, value in SIZES.items() if key != "max_seq_len"}
    model = ph.build("t5", seed=0, d_ff=48, **sizes).eval()
    model.generation = {"decoder_start_token_id": 0}
    requests = asked(0)
    found = Scorer(model, most_tokens=150).logprobs(requests)
    for request, one in zip(requests, found, strict=True):
        read = torch.tensor([[0, *request.continuation[:-1]]])
        with torch.no_grad():
            logprobs = model(torch.tensor([request.context]), read)[0].log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(request.continuation)[:, None])[:, 0].tolist()
        assert one.tokens == pytest.approx(expected, abs=1e-5)


def test_models_that_write_nothing():
    with pytest.raises(ConfigError, match="decoder"):
        Scorer(ph.build("bert", **SIZES, d_ff=48))
    with pytest.raises(ConfigError, match="most_tokens is 0"):
        Scorer(build("gpt2"), most_tokens=0)
