"""ALBERT equals transformers, with every head, both ways."""

from pathlib import Path
from typing import Any

import pytest
import torch

import polyhead as ph

pytest.importorskip("transformers")

from tests.models.family_oracle import (
    FamilyCase,
    check_alone,
    check_equal,
    check_round_trip,
    difference,
)

SIZES: dict[str, Any] = dict(
    vocab_size=53, embedding_size=12, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
    intermediate_size=40, max_position_embeddings=24,
)  # fmt: skip


def hidden(output: Any) -> torch.Tensor:
    return output.last_hidden_state


def spans(output: Any) -> torch.Tensor:
    return torch.stack([output.start_logits, output.end_logits], dim=-1)


def pretraining(output: Any) -> torch.Tensor:
    return torch.cat([output.prediction_logits.flatten(1), output.sop_logits], 1)


def both_heads(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    words, order = model(**inputs, head="lm"), model(**inputs, head="sop")
    return torch.cat([words.flatten(1), order], 1)


def case(name: str, ending: str, answer: Any = None, **options: Any) -> FamilyCase:
    more = {} if answer is None else {"answer": answer}
    return FamilyCase(f"{ending}-{name}", "Albert" + ending, {**SIZES, **options}, **more)


CASES = [
    case("plain", "Model", hidden),
    case("groups", "Model", hidden, num_hidden_groups=2),
    case("uneven-groups", "Model", hidden, num_hidden_groups=3, num_hidden_layers=7),
    case("inner", "Model", hidden, inner_group_num=2, num_hidden_groups=2),
    case("wide-tables", "Model", hidden, embedding_size=40, type_vocab_size=3),
    case("tied", "ForMaskedLM"),
    case("relu-eps", "ForMaskedLM", hidden_act="relu", layer_norm_eps=1e-3, type_vocab_size=1),
    case("odd", "ForMaskedLM", hidden_size=30, num_attention_heads=5, embedding_size=7),
    case("untied", "ForMaskedLM", tie_word_embeddings=False),
    case("classes", "ForSequenceClassification", num_labels=3, hidden_act="gelu"),
    case("tags", "ForTokenClassification", num_labels=6),
    case("spans", "ForQuestionAnswering", spans, num_hidden_layers=1),
]
BOTH = FamilyCase("both", "AlbertForPreTraining", SIZES, answer=pretraining, ours=both_heads)


@pytest.mark.parametrize("case", [*CASES, BOTH], ids=lambda case: case.name)
def test_answers_equal(case: FamilyCase, tmp_path: Path) -> None:
    check_equal(case, tmp_path)


@pytest.mark.parametrize(
    "case", [one for one in CASES if "untied" not in one.name] + [BOTH], ids=lambda case: case.name
)
def test_both_ways(case: FamilyCase, tmp_path: Path) -> None:
    check_round_trip(case, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_row_alone_equals_the_row_in_a_batch(case: FamilyCase, tmp_path: Path) -> None:
    check_alone(case, tmp_path)


def test_layers_are_shared() -> None:
    sizes = dict(vocab_size=40, d_model=24, d_ff=32, num_heads=2, max_seq_len=20)
    one, many = (ph.build("albert", num_layers=layers, **sizes) for layers in (1, 12))
    assert one.num_parameters() == many.num_parameters()


def test_a_fresh_model_loads_in_transformers(tmp_path: Path) -> None:
    import transformers

    sizes = dict(vocab_size=40, d_model=24, d_ff=32, num_layers=3, num_heads=2, max_seq_len=20)
    model = ph.build("albert", seed=1, num_groups=2, embedding_width=9, **sizes).eval()
    model.save(tmp_path)
    peer = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(3, 40, (2, 9))
    with torch.no_grad():
        assert difference(model(ids), peer(ids).logits) <= 1e-5
