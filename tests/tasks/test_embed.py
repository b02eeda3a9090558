import numpy as np
import pytest
import torch
from tests.tasks.tiny import make

from polyhead.errors import ConfigError, DataError
from polyhead.models.sentence import Sentences
from polyhead.tasks.embed import cut_texts, embed, limit

TEXTS = [
    "the lazy dog",
    "hello",
    "some more text. " * 9,
    "wörld 日本",
    "the quick brown fox; " * 3,
    "x",
]


@pytest.mark.parametrize("batch_size", [1, 32])
def test_a_batch_gives_what_each_text_gives_alone(model, tokenizer, batch_size):
    together = embed(model, tokenizer, TEXTS, batch_size=batch_size)
    assert together.shape == (len(TEXTS), 32)
    for text, row in zip(TEXTS, together, strict=True):
        alone = embed(model, tokenizer, text)
        assert alone.shape == (32,)
        assert torch.allclose(row, alone, atol=1e-5)


def test_it_is_the_mean_of_the_hidden_states(model, tokenizer):
    got = embed(model, tokenizer, TEXTS, normalize_embeddings=False)
    for text, row in zip(TEXTS, got, strict=True):
        ids = tokenizer.encode(text)[:48]
        with torch.no_grad():
            expected = model.backbone(torch.tensor([ids]))[0].mean(0)
        assert torch.allclose(row, expected, atol=1e-5)


def test_lengths_and_kinds(model, tokenizer):
    assert torch.allclose(embed(model, tokenizer, TEXTS).norm(dim=1), torch.ones(len(TEXTS)))
    array = embed(model, tokenizer, TEXTS, convert_to_tensor=False)
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.float32
    assert embed(model, tokenizer, []).shape == (0, 32)


def test_batches_are_of_like_length_and_bounded(model, tokenizer):
    seen = []
    hook = model.backbone.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))
    try:
        embed(model, tokenizer, ["the lazy dog " * n for n in (12, 1, 12, 1)] * 4, batch_size=5)
    finally:
        hook.remove()
    assert all(rows * width <= 5 * 24 or rows == 1 for rows, width in seen)
    assert len(seen) < 6
    assert max(width for _, width in seen) > 3 * min(width for _, width in seen)


def test_an_empty_text_needs_a_token_to_stand_for_it(model, with_bos, tokenizer):
    assert embed(model, with_bos, ["", "hello"]).isfinite().all()
    bare = type(tokenizer).train(["ab"], kind="bytes", special_tokens={"bos": None, "eos": None})
    with pytest.raises(DataError, match="empty"):
        embed(model, bare, ["hello", ""])


def test_which_texts_are_cut_can_be_asked(model, tokenizer):
    assert limit(model) == 48
    whole = tokenizer.decode(tokenizer.encode("the lazy dog. " * 40)[:48])
    assert len(tokenizer.encode(whole)) == 48
    texts = ["x", whole + " and more", whole, "some more text. " * 40]
    assert cut_texts(model, tokenizer, texts) == [1, 3]
    vectors = embed(model, tokenizer, texts)
    assert torch.allclose(vectors[1], vectors[2], atol=1e-5)


def test_the_end_of_the_frame_stays_where_a_text_is_cut(tmp_path):
    model, words = make(tmp_path, "lm")
    ids = words.encode("Ada wrote a program. " * 40)
    assert limit(model) == 64
    with torch.no_grad():
        expected = model.backbone(torch.tensor([[*ids[:63], words.sep_id]]))[0].mean(0)
    found = embed(model, words, "Ada wrote a program. " * 40, normalize_embeddings=False)
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_shorter_of_two_limits_holds_and_prompts_count(tmp_path):
    model, words = make(tmp_path, "lm")
    model.sentences = Sentences(max_tokens=8, prompts={"query": "Ada Ada "})
    assert limit(model) == 8
    assert cut_texts(model, words, ["Ada", "Ada " * 7, "Ada " * 6]) == [1]
    assert cut_texts(model, words, ["Ada " * 4, "Ada " * 5], prompt_name="query") == [1]
    model.sentences = Sentences(max_tokens=500)
    assert limit(model) == 64


def test_batch_size_is_checked(model, tokenizer):
    with pytest.raises(ConfigError, match="batch_size=0"):
        embed(model, tokenizer, TEXTS, batch_size=0)


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_a_model_that_gives_no_states_of_a_text_is_said(kind, tokenizer):
    class Config:
        model_type, max_tokens = kind, 9

    class Model:
        config = Config()

    Config.kind = "encoder-decoder" if kind == "t5" else "two towers"
    with pytest.raises(ConfigError, match=f"{kind} is of the kind .* need an encoder"):
        embed(Model(), tokenizer, ["a"])
