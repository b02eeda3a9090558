import math

import pytest
import torch

from polyhead.errors import ConfigError, DataError
from polyhead.text.tokenizer import Tokenizer
from polyhead.train.config import TrainConfig
from polyhead.train.evaluate import score_texts
from polyhead.train.loop import Trainer

from .conftest import text, tiny


def by_hand(model, rows, context, stride):
    """Each token by its own forward pass over just what its window lets it see."""
    nll, tokens = 0.0, 0
    for ids in rows:
        for target in range(1, len(ids)):
            window = 0 if target <= context else math.ceil((target - context) / stride)
            with torch.no_grad():
                logits = model(torch.tensor([ids[window * stride : target]]))[0, -1]
            nll -= float(logits.log_softmax(-1)[ids[target]])
            tokens += 1
    return nll, tokens


@pytest.mark.parametrize("special", [{"eos": None, "bos": None}, {"bos": "<s>"}])
@pytest.mark.parametrize(("context", "stride"), [(8, 4), (8, 8), (5, 1), (64, 32)])
def test_every_token_is_scored_once(special, context, stride):
    texts = [text(1, 1), text(2, 2), "at", "a"]
    tokenizer = Tokenizer.train(texts, kind="chars", special_tokens=special)
    model = tiny(tokenizer.vocab_size).eval()
    begin = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    rows = [tokenizer.encode(t, add_special_tokens=False) for t in texts]
    rows = [row if begin is None else [begin, *row] for row in rows]
    score = score_texts(model, tokenizer, texts, context=context, stride=stride, batch_size=3)
    nll, tokens = by_hand(model, rows, context, stride)
    assert score.tokens == tokens
    assert score.nll == pytest.approx(nll, rel=1e-5)
    size = sum(len(t.encode()) for t in texts) - (len(texts) if begin is None else 0)
    assert score.text_bytes == size
    found = score.to_dict()
    assert found["bits_per_byte"] == pytest.approx(nll / math.log(2) / size)
    assert found["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)


def test_nothing_to_score_is_a_data_error(tokenizer):
    with pytest.raises(DataError, match="longer texts"):
        score_texts(tiny(tokenizer.vocab_size), tokenizer, [""], context=8)


@pytest.mark.parametrize(
    ("context", "stride", "says"),
    [
        (8, 9, "stride is 9: set it between 1 and the context, 8"),
        (8, 0, "stride is 0"),
        (0, None, "context is 0"),
        (65, None, "the model takes 64"),
    ],
)
def test_windows_that_would_skip_tokens_are_refused(tokenizer, context, stride, says):
    model = tiny(tokenizer.vocab_size)
    with pytest.raises(ConfigError, match=says):
        score_texts(model, tokenizer, [text(2)], context=context, stride=stride)
    with pytest.raises(ConfigError, match=says):
        Trainer(model, tokenizer, TrainConfig(context=16)).evaluate(
            [text(2)], context=context, stride=stride
        )
