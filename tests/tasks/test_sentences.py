"""Sentence-transformers directories give the vectors that sentence-transformers gives."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import polyhead as ph
from polyhead.errors import PolyheadError

st = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
transformers = pytest.importorskip("transformers")

WORDS = "the a cat dog sat ran on under mat tree fast slow red blue and or of it was is".split()


def sentences(count: int, seed: int = 0, longest: int = 30) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for _ in range(count)]


def tiny_bert(folder: Path, **options: Any) -> Path:
    """A random BERT with a tokenizer of its own, as transformers saves them."""
    tokenizer = ph.Tokenizer.train(sentences(50), kind="wordpiece", lowercase=True)
    tokenizer.save(folder)
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=48, max_position_embeddings=64, **options,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def make(folder: Path, *steps: Any, max_seq_length: int = 40, **options: Any) -> Any:
    """A saved sentence-transformers model of these steps after the transformer."""
    body = modules.Transformer(str(tiny_bert(folder / "bert")), max_seq_length=max_seq_length)
    peer = st.SentenceTransformer(modules=[body, *steps], device="cpu", **options)
    peer.save(str(folder / "st"))
    return st.SentenceTransformer(str(folder / "st"), device="cpu")


def pooling(mode: Any) -> Any:
    return modules.Pooling(32, pooling_mode=mode)


CASES = {
    "mean": lambda: [pooling("mean")],
    "cls-normal": lambda: [pooling("cls"), modules.Normalize()],
    "max": lambda: [pooling("max")],
    "last": lambda: [pooling("lasttoken")],
    "weighted": lambda: [pooling("weightedmean"), modules.Normalize()],
    "sqrt": lambda: [pooling("mean_sqrt_len_tokens")],
    "several": lambda: [pooling(("cls", "mean"))],
    "dense": lambda: [pooling("mean"), modules.Dense(32, 12), modules.Normalize()],
    "dense-plain": lambda: [
        pooling("mean"),
        modules.Dense(32, 20, bias=False, activation_function=nn.Identity()),
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_vectors_are_theirs(name: str, tmp_path: Path) -> None:
    peer = make(tmp_path, *CASES[name]())
    texts = [*sentences(37), "cat " * 80, "x"]
    wanted = peer.encode(texts, convert_to_tensor=True)
    model, tokenizer = ph.load(tmp_path / "st"), ph.tokenizer(tmp_path / "st")
    found = ph.embed(model, tokenizer, texts, batch_size=3)
    assert isinstance(found, torch.Tensor)
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.cosine_similarity(found, wanted).min() >= 0.999999

    # What we save, theirs reads.
    model.save(tmp_path / "ours")
    tokenizer.save(tmp_path / "ours")
    again = st.SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    assert torch.allclose(again.encode(texts, convert_to_tensor=True), wanted, atol=1e-6)


def test_prompts_and_shorter_vectors(tmp_path: Path) -> None:
    prompts = {"query": "the red cat ", "passage": ""}
    peer = make(tmp_path, pooling("mean"), prompts=prompts, truncate_dim=16)
    model, tokenizer = ph.load(tmp_path / "st"), ph.tokenizer(tmp_path / "st")
    texts = sentences(5)
    found = ph.embed(model, tokenizer, texts, prompt_name="query")
    wanted = peer.encode(texts, prompt_name="query", convert_to_tensor=True)
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted, atol=1e-5)
    wanted = peer.encode(texts, convert_to_tensor=True, truncate_dim=5, normalize_embeddings=True)
    found = ph.embed(model, tokenizer, texts, truncate_dim=5, normalize_embeddings=True)
    assert torch.allclose(found, wanted, atol=1e-5)
    with pytest.raises(ph.ConfigError, match="no prompt 'ask'; it has"):
        ph.embed(model, tokenizer, texts, prompt_name="ask")


def test_the_head_is_the_vector(tmp_path: Path) -> None:
    make(tmp_path, pooling("cls"), modules.Normalize())
    model = ph.load(tmp_path / "st", head="embed")
    tokenizer = ph.tokenizer(tmp_path / "st")
    batch = tokenizer(sentences(4))
    with torch.no_grad():
        vectors = model(batch.input_ids, batch.attention_mask)
        assert torch.equal(model(batch.input_ids, ph.Mask(keep=batch.attention_mask > 0)), vectors)
    assert torch.allclose(vectors, ph.embed(model, tokenizer, sentences(4)), atol=1e-5)


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("modules.json", [{"type": "x.models.LSTM", "path": ""}], "step 'LSTM'"),
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "pools by 'median'"),
    ],
)
def test_what_is_not_known_is_refused(file: str, change: Any, says: str, tmp_path: Path) -> None:
    make(tmp_path, pooling("cls"))
    (tmp_path / "st" / file).write_text(json.dumps(change))
    with pytest.raises(PolyheadError, match=says):
        ph.load(tmp_path / "st")


@pytest.mark.weights
def test_minilm_equals_sentence_transformers(minilm: Path) -> None:
    texts = [*sentences(60, longest=60), "tree " * 400, ""]
    wanted = st.SentenceTransformer(str(minilm), device="cpu").encode(texts, convert_to_tensor=True)
    found = ph.embed(ph.load(minilm), ph.tokenizer(minilm), texts)
    assert torch.cosine_similarity(found, wanted).min() >= 0.999999
