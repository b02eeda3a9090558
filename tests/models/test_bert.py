"""BERT, RoBERTa and DistilBERT equal transformers, with every head, both ways."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import polyhead as ph

pytest.importorskip("transformers")

from tests.models.family_oracle import (
    FamilyCase,
    check_alone,
    check_equal,
    check_round_trip,
    difference,
    padded_texts,
    typed_texts,
)

SIZES: dict[str, Any] = dict(
    vocab_size=53, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=40, max_position_embeddings=24,
)  # fmt: skip
DISTIL: dict[str, Any] = dict(
    vocab_size=53, dim=32, n_layers=2, n_heads=4, hidden_dim=40, max_position_embeddings=24
)


def spans(output: Any) -> torch.Tensor:
    return torch.stack([output.start_logits, output.end_logits], dim=-1)


def hidden(output: Any) -> torch.Tensor:
    return output.last_hidden_state


def pretraining(output: Any) -> torch.Tensor:
    return torch.cat([output.prediction_logits.flatten(1), output.seq_relationship_logits], 1)


def both_heads(model: ph.models.model.TaskModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    words, order = model(**inputs, head="lm"), model(**inputs, head="nsp")
    return torch.cat([words.flatten(1), order], 1)


def case(name: str, stem: str, ending: str, answer: Any = None, **options: Any) -> FamilyCase:
    sizes = DISTIL if stem == "DistilBert" else SIZES
    more = {} if answer is None else {"answer": answer}
    return FamilyCase(f"{stem}{ending}-{name}", stem + ending, {**sizes, **options}, **more)


CASES = [
    case("plain", "Bert", "Model", hidden),
    case("odd", "Bert", "Model", hidden, hidden_size=30, num_attention_heads=3, vocab_size=41),
    case("one-type", "Bert", "Model", hidden, type_vocab_size=1, hidden_act="gelu_new"),
    case("many-types", "Bert", "Model", hidden, type_vocab_size=5, layer_norm_eps=1e-3),
    case("tied", "Bert", "ForMaskedLM", hidden_act="relu"),
    case("one-head", "Bert", "ForMaskedLM", num_attention_heads=1, num_hidden_layers=1),
    case("deep", "Bert", "ForMaskedLM", num_hidden_layers=5, intermediate_size=17),
    case("classes", "Bert", "ForSequenceClassification", num_labels=5),
    case("one-class", "Bert", "ForSequenceClassification", num_labels=1, hidden_act="silu"),
    case("tags", "Bert", "ForTokenClassification", id2label={0: "O", 1: "B", 2: "I"}),
    case("spans", "Bert", "ForQuestionAnswering", spans),
    case("order", "Bert", "ForNextSentencePrediction"),
    case("plain", "Roberta", "Model", hidden),
    case("pad-0", "Roberta", "Model", hidden, pad_token_id=0, type_vocab_size=1),
    case("pad-2", "Roberta", "ForMaskedLM", pad_token_id=2, hidden_act="gelu_new"),
    case("tied", "Roberta", "ForMaskedLM", layer_norm_eps=1e-5),
    case("odd", "Roberta", "ForMaskedLM", hidden_size=36, num_attention_heads=6, vocab_size=77),
    case("classes", "Roberta", "ForSequenceClassification", num_labels=4),
    case("tags", "Roberta", "ForTokenClassification", num_labels=7),
    case("spans", "Roberta", "ForQuestionAnswering", spans, num_hidden_layers=1),
    case("plain", "XLMRoberta", "ForMaskedLM"),
    case("plain", "DistilBert", "Model", hidden),
    case("sinusoids", "DistilBert", "Model", hidden, sinusoidal_pos_embds=True, n_heads=2),
    case("relu", "DistilBert", "Model", hidden, activation="relu", dim=28, n_layers=3),
    case("tied", "DistilBert", "ForMaskedLM"),
    case("untied", "DistilBert", "ForMaskedLM", tie_word_embeddings=False, hidden_dim=19),
    case("classes", "DistilBert", "ForSequenceClassification", num_labels=3),
    case("tags", "DistilBert", "ForTokenClassification", num_labels=5, n_heads=1),
    case("spans", "DistilBert", "ForQuestionAnswering", spans),
    FamilyCase(
        "BertForPreTraining-both", "BertForPreTraining", SIZES, answer=pretraining, ours=both_heads
    ),
]
by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@by_name
def test_answers_equal(case: FamilyCase, tmp_path: Path) -> None:
    check_equal(case, tmp_path)


@by_name
def test_both_ways(case: FamilyCase, tmp_path: Path) -> None:
    check_round_trip(case, tmp_path)


@by_name
def test_a_row_alone_equals_the_row_in_a_batch(case: FamilyCase, tmp_path: Path) -> None:
    if case.model_class == "BertForPreTraining":
        case = FamilyCase(case.name, case.model_class, case.options)
    check_alone(case, tmp_path)


def test_padding_is_masked_as_theirs(tmp_path: Path) -> None:
    for one in CASES[:16]:
        theirs = one.save(tmp_path / one.name)
        inputs = padded_texts(theirs.config, 7)
        ours = one.call(ph.load(tmp_path / one.name), inputs)
        expected = one.expected(theirs, inputs)
        if expected.dim() == 3:
            keep = inputs["attention_mask"].bool()
            ours, expected = ours[keep], expected[keep]
        assert difference(ours, expected) <= 1e-5 * max(1.0, expected.abs().max().item())


def test_an_untied_head_reads_its_own_bias(tmp_path: Path) -> None:
    for stem in ("Bert", "Roberta"):
        one = case("untied", stem, "ForMaskedLM", tie_word_embeddings=False)
        check_equal(one, tmp_path / stem)


def test_the_first_checkpoints_names(tmp_path: Path) -> None:
    one = case("old", "Bert", "ForMaskedLM")
    theirs = one.save(tmp_path)
    path = tmp_path / "model.safetensors"
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in load_file(path).items()
    }
    # The head of another task and an unused pooler came with them.
    old["cls.seq_relationship.weight"] = torch.zeros(2, 32)
    old["bert.pooler.dense.weight"] = torch.zeros(32, 32)
    old["bert.embeddings.position_ids"] = torch.arange(24)[None]
    save_file(old, path)
    inputs = typed_texts(theirs.config, 5)
    assert difference(one.call(ph.load(tmp_path), inputs), one.expected(theirs, inputs)) <= 1e-4


def test_a_head_the_checkpoint_lacks_is_drawn_fresh(tmp_path: Path) -> None:
    theirs = case("base", "Bert", "Model").save(tmp_path / "base")
    model = ph.load(tmp_path / "base", head="classify", labels=("bad", "fine", "good"))
    ids = torch.randint(3, 53, (2, 7))
    assert model(ids).shape == (2, 3)
    with torch.no_grad():
        assert difference(model.backbone(ids), theirs(ids).last_hidden_state) <= 1e-4
    # The pooler was there, and is not drawn again.
    assert torch.equal(model.pooler.dense.weight, theirs.pooler.dense.weight)
    model.save(tmp_path / "tuned")
    again = ph.load(tmp_path / "tuned")
    assert again.config.labels == ("bad", "fine", "good")
    assert torch.equal(again(ids), model(ids))
    import transformers

    peer = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned")
    assert peer.config.id2label == {0: "bad", 1: "fine", 2: "good"}
    with torch.no_grad():
        assert difference(again(ids), peer.eval()(ids).logits) <= 1e-5


def test_several_tasks_on_one_backbone(tmp_path: Path) -> None:
    tasks = {
        "topic": {"head": "classify", "labels": ["a", "b", "c"]},
        "aspects": {"head": "classify", "labels": ["x", "y"]},
        "words": {"head": "tag", "labels": ["O", "X"]},
    }
    case("base", "Bert", "Model").save(tmp_path / "base")
    model = ph.load(tmp_path / "base", head="multitask", tasks=tasks)
    ids = torch.randint(3, 53, (2, 7))
    assert model(ids, head="topic").shape == (2, 3)
    assert model(ids, head="words").shape == (2, 7, 2)
    model.save(tmp_path / "tuned")
    again = ph.load(tmp_path / "tuned")
    assert again.head_kind == "multitask"
    assert list(again.head) == list(tasks), "the first is asked unless one is named"
    for name in tasks:
        assert torch.equal(again(ids, head=name), model(ids, head=name))


@pytest.mark.parametrize(
    ("head", "word"), [("sop", "no head 'sop'"), ("image", "lm, classify, tag")]
)
def test_heads_that_do_not_fit(head: str, word: str, tmp_path: Path) -> None:
    case("base", "Bert", "Model").save(tmp_path)
    with pytest.raises(ph.ConfigError, match=word):
        ph.load(tmp_path, head=head)


def test_a_file_that_names_no_head_and_has_none(tmp_path: Path) -> None:
    theirs = case("base", "Bert", "Model").save(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    del said["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(ph.FileError, match=r"no head 'lm'.*load it with head='none'"):
        ph.load(tmp_path)
    ids = torch.randint(3, 53, (2, 7))
    with torch.no_grad():
        found = ph.load(tmp_path, head="none")(ids)
        assert difference(found, theirs(ids).last_hidden_state) <= 1e-5


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (dict(head="classify", labels="neg"), "labels is the text 'neg'"),
        (dict(head="classify", labels=()), "labels is empty"),
        (dict(head="classify", labels=("a",), problem="ranking"), "problem is 'ranking'"),
        (dict(head="multitask", tasks={"topic": "classify"}), "task 'topic' is 'classify'; write"),
    ],
)
def test_what_a_caller_cannot_ask(asked: dict[str, Any], words: str, tmp_path: Path) -> None:
    case("base", "Bert", "Model").save(tmp_path)
    with pytest.raises(ph.ConfigError, match=words):
        ph.load(tmp_path, **asked)


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("bert", dict(type_vocab_size=-1), "type_vocab_size is -1; it must be from 0"),
        ("roberta", dict(pad_id=-1), "counts positions from pad_token_id, which is -1"),
        ("roberta", dict(pad_id=None), "counts positions from pad_token_id, which is None"),
    ],
)
def test_sizes_that_cannot_be(kind: str, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ph.ConfigError, match=words):
        ph.build(kind, **fields)


def test_too_long_a_text_says_so(tmp_path: Path) -> None:
    case("base", "Roberta", "Model").save(tmp_path)
    model = ph.load(tmp_path)
    assert model.config.max_tokens == 22
    with pytest.raises(ValueError, match="positions"):
        model(torch.full((1, 23), 5))


def test_fresh_models_load_in_transformers(tmp_path: Path) -> None:
    import transformers

    for kind in ("bert", "roberta", "distilbert"):
        sizes = dict(vocab_size=40, d_model=24, d_ff=32, num_layers=2, num_heads=2, max_seq_len=20)
        model = ph.build(kind, seed=1, **sizes).eval()
        model.save(tmp_path / kind)
        peer = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / kind).eval()
        ids = torch.randint(3, 40, (2, 9))
        with torch.no_grad():
            assert difference(model(ids), peer(ids).logits) <= 1e-5
