"""The graphs of every family answer as the model does, before any runtime has them."""

from collections.abc import Callable, Sequence

import pytest
import torch
from tests.export.cases import BY_NAME, CASES, DECODERS, Case
from torch import Tensor

import polyhead as ph
from polyhead.errors import ConfigError
from polyhead.export.check import Feeds, Run, largest_difference, mask_of, pieces
from polyhead.export.graphs import Graph, graphs
from polyhead.export.parts import exportable
from polyhead.models.model import TaskModel

SIZES = ((1, 1), (2, 3), (5, 31))


def eager(found: Sequence[Graph]) -> Run:
    """The graphs' own modules in the place of a runtime."""
    by_name = {graph.name: graph for graph in found}

    def run(name: str, feeds: Feeds) -> dict[str, Tensor]:
        graph = by_name[name]
        answers = graph.module(*(feeds[port.name] for port in graph.inputs))
        return dict(zip(graph.outputs, answers, strict=True))

    return run


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("past", [True, False], ids=["past", "whole"])
def test_a_graph_answers_as_its_model(case: Case, past: bool) -> None:
    if str(case) == "llava" and not past:
        pytest.skip("refused: see below")
    model = case.make()
    found = graphs(exportable(model), past)
    assert largest_difference(model, found, eager(found), SIZES, seed=3).share <= 1e-5


@pytest.mark.parametrize("case", [case for case in CASES if "bert" in str(case)], ids=str)
def test_fused_attention_gives_the_same(case: Case) -> None:
    model = case.make()
    found = graphs(exportable(model, fused=True), past=False)
    assert largest_difference(model, found, eager(found), SIZES).share <= 1e-5


def test_graphs_of_towers_and_of_several_heads_name_what_they_give() -> None:
    names = {
        str(case): [graph.outputs for graph in graphs(exportable(case.make()), True)]
        for case in CASES
        if str(case) in ("clip", "bert-answer", "bert-embed", "bert-none", "t5")
    }
    assert names["clip"] == [("logits_per_text",), ("text_embeds",), ("image_embeds",)]
    assert names["bert-answer"] == [("start_logits", "end_logits")]
    assert names["bert-embed"] == [("sentence_embedding",)]
    assert names["bert-none"] == [("last_hidden_state", "pooler_output")]
    assert names["t5"][2][:3] == ("logits", "present.0.decoder.key", "present.0.decoder.value")


@pytest.mark.parametrize("case", DECODERS, ids=str)
def test_rows_padded_at_the_left_go_on_as_alone(case: Case) -> None:
    # A pattern counts slots, padding included, as the model itself does.
    if "pattern" in case.fields:
        pytest.skip("patterns count slots")
    model = case.make()
    (graph,) = graphs(exportable(model), True)
    ids = torch.randint(61, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        found = pieces(graph, eager([graph]), ids, mask, (0, 6, 8, 9))
        alone = model(ids[1:, 4:])
    torch.testing.assert_close(found[1:, 4:], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_padding_at_the_right_of_a_past_is_not_seen(name: str) -> None:
    model = BY_NAME[name].make()
    (graph,) = graphs(exportable(model), True)
    ids = torch.randint(61, (2, 10))
    mask = torch.ones_like(ids)
    mask[1, 3:6] = 0  # a short prompt, padded, and then what was written
    with torch.no_grad():
        found = pieces(graph, eager([graph]), ids, mask, (0, 6, *range(7, 11)))
        alone = model(torch.cat([ids[1:, :3], ids[1:, 6:]], 1))
    torch.testing.assert_close(found[1:, 6:], alone[:, 3:], atol=1e-5, rtol=1e-4)


def test_masks_of_the_check_are_padded_at_both_ends() -> None:
    mask = mask_of(8, 30, torch.Generator().manual_seed(0))
    assert mask[::2].all()
    assert mask[1, 0] == 1
    assert mask[3, -1] == 1
    assert not mask.all()
    assert (mask.sum(1) > 0).all()


def test_the_original_is_untouched() -> None:
    for name in ("t5", "deberta-v2", "mixtral"):
        model = BY_NAME[name].make()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        kinds = [type(part) for part in model.modules()]
        double = exportable(model)
        assert [type(part) for part in model.modules()] == kinds
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        shared = {p.data_ptr() for p in model.parameters()}
        own = {p.data_ptr() for p in double.parameters()}
        assert shared <= own  # experts are views of their stack


def scaled() -> TaskModel:
    return BY_NAME["llama"].make(rope_scaling={"rope_type": "dynamic", "factor": 2.0})


def adapted() -> TaskModel:
    model = BY_NAME["llama"].make()
    ph.add_adapter(model)
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ph.quantize(BY_NAME["llama"].make(), "int8"), "few bits"),
        (lambda: ph.pack(BY_NAME["bert"].make()), "packed for this machine"),
        (lambda: Case("lstm", dict(vocab_size=61, d_model=32, num_layers=1)).make(), "lstm"),
        (scaled, "dynamic"),
        (adapted, "merge_adapters"),
    ],
    ids=["few bits", "packed", "lstm", "dynamic", "adapters"],
)
def test_what_has_no_graph_is_refused_in_a_line(make: Callable[[], TaskModel], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as found:
        exportable(make())
    assert "\n" not in str(found.value)


def test_a_model_of_images_and_text_goes_with_its_past() -> None:
    with pytest.raises(ConfigError, match="past"):
        graphs(exportable(BY_NAME["llava"].make()), past=False)
