import math

import pytest
import torch

import polyhead as ph
from polyhead.errors import ConfigError, DataError
from polyhead.generate import score as module
from polyhead.tasks.perplexity import perplexity


def one_by_one(model, ids: list[int], context: int, stride: int) -> list[float]:
    """The surprise at every token but the first, each by a forward of its own."""
    losses = []
    for target in range(1, len(ids)):
        # The first window that reaches the target scores it.
        window = max(math.ceil((target + 1 - context) / stride), 0)
        with torch.no_grad():
            logits = model(torch.tensor([ids[window * stride : target]]))[0, -1]
        losses.append(-float(logits.log_softmax(-1)[ids[target]]))
    return losses


def recipe_of_transformers(model, ids: torch.Tensor, max_length: int, stride: int) -> float:
    """The loop of transformers' "Perplexity of fixed-length models"."""
    nll_sum, n_tokens, prev_end = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + max_length, ids.shape[1])
        trg_len = end - prev_end
        window = ids[:, begin:end]
        target = window.clone()
        target[:, :-trg_len] = -100
        with torch.no_grad():
            loss = model(window, labels=target).loss
        valid = int((target[:, 1:] != -100).sum())
        nll_sum += float(loss) * valid
        n_tokens += valid
        prev_end = end
        if end == ids.shape[1]:
            break
    return math.exp(nll_sum / n_tokens)


WINDOWS = [(48, 24), (48, 47), (48, 1), (17, 5), (2, 1), (30, 29)]


@pytest.mark.parametrize(("context", "stride"), WINDOWS)
def test_every_token_is_scored_once_with_its_context(model, tokenizer, text, context, stride):
    ids = tokenizer.encode(text)[:100]
    text = tokenizer.decode(ids)
    assert tokenizer.encode(text) == ids
    expected = one_by_one(model, ids, context, stride)
    got = perplexity(model, tokenizer, text, context=context, stride=stride, batch_size=3)
    assert got.tokens == len(expected) == len(ids) - 1
    assert got.loss == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    assert float(got) == pytest.approx(math.exp(got.loss))
    assert got.bytes == len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())
    assert got.bits_per_byte == pytest.approx(sum(expected) / math.log(2) / got.bytes, abs=1e-5)
    assert got.bits_per_token == pytest.approx(got.loss / math.log(2))


@pytest.mark.parametrize(("context", "stride"), [(48, 24), (20, 7), (48, 40)])
def test_the_recipe_of_transformers(tmp_path, model, tokenizer, text, context, stride):
    tf = pytest.importorskip("transformers")
    model.save(tmp_path)
    theirs = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([tokenizer.encode(text)])
    expected = recipe_of_transformers(theirs, ids, context, stride)
    got = perplexity(model, tokenizer, text, context=context, stride=stride)
    assert float(got) == pytest.approx(expected, rel=1e-5)


def test_the_first_token_is_scored_after_bos(model, with_bos, text):
    ids = with_bos.encode(text)
    assert ids[0] == with_bos.bos_id
    got = perplexity(model, with_bos, text)
    assert got.tokens == len(ids) - 1
    assert got.bytes == len(text.encode())
    expected = one_by_one(model, ids, 48, 24)
    assert got.loss == pytest.approx(sum(expected) / len(expected), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_batches_change_nothing(model, tokenizer, text, batch_size):
    got = perplexity(model, tokenizer, text, context=20, stride=6, batch_size=batch_size)
    usual = perplexity(model, tokenizer, text, context=20, stride=6)
    assert got.loss == pytest.approx(usual.loss, abs=1e-6)


def test_logits_are_held_in_pieces(monkeypatch, model, tokenizer, text):
    usual = perplexity(model, tokenizer, text)
    monkeypatch.setattr(module, "_MOST_LOGITS", 300 * 7)
    seen = []
    hook = model.head.register_forward_hook(lambda m, x, y: seen.append(y.shape[0]))
    try:
        pieces = perplexity(model, tokenizer, text)
    finally:
        hook.remove()
    assert max(seen) == 7
    assert sum(seen) == usual.tokens
    assert pieces.loss == pytest.approx(usual.loss, abs=1e-6)


@pytest.mark.parametrize("text", ["", "t"])
def test_a_text_without_a_token_to_score(model, tokenizer, text):
    assert len(tokenizer.encode(text)) < 2
    with pytest.raises(DataError, match="no token to score"):
        perplexity(model, tokenizer, text)


def test_one_token_after_bos_is_enough(model, with_bos):
    assert perplexity(model, with_bos, "t").tokens == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context": 49}, "context=49.*48"),
        ({"context": 1}, "context=1 "),
        ({"context": 10, "stride": 10}, "stride=10"),
        ({"stride": 0}, "stride=0"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_impossible_windows(model, tokenizer, text, fields, message):
    with pytest.raises(ConfigError, match=message):
        perplexity(model, tokenizer, text, **fields)


def test_ids_beyond_the_model(tokenizer, text):
    small = ph.build("gpt2", vocab_size=100, d_model=32, num_layers=1, num_heads=2, max_seq_len=16)
    with pytest.raises(DataError, match="vocabulary of 100"):
        perplexity(small, tokenizer, text)


def test_dropout_is_off_and_the_mode_comes_back(model, tokenizer, text):
    usual = perplexity(model, tokenizer, text)
    model.train()
    try:
        assert perplexity(model, tokenizer, text) == usual
        assert model.training
    finally:
        model.eval()
