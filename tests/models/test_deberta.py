"""DeBERTa equals transformers, and where transformers has nothing, a statement of the source."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tests.models.family_oracle import (
    CLOSE,
    FamilyCase,
    check_alone,
    check_equal,
    check_round_trip,
    difference,
    padded_texts,
)
from torch import Tensor

import polyhead as ph
from polyhead.errors import ConfigError, PolyheadError

SIZES = dict(
    vocab_size=67,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=3,
    max_position_embeddings=32,
    initializer_range=0.05,
)
BOTH = dict(relative_attention=True, pos_att_type="c2p|p2c")
SHARED = dict(position_buckets=8, share_att_key=True, norm_rel_ebd="layer_norm")
V3 = {**BOTH, **SHARED, "position_biased_input": False}
LABELS = {"id2label": dict(enumerate("abcde")), "label2id": {c: i for i, c in enumerate("abcde")}}


def spans(output: Any) -> Tensor:
    return torch.stack([output.start_logits, output.end_logits], -1)


class Untied(FamilyCase):
    """A decoder with a bias of its own; the reference keeps another, and never reads it."""

    def make(self, seed: int = 0) -> Any:
        model = super().make(seed)
        top = model.cls.predictions
        top.bias.data.copy_(top.decoder.bias.data)
        return model


def case(
    name: str, kind: str, answer: Any = lambda output: output[0], **options: Any
) -> FamilyCase:
    stem = "Deberta" if name.startswith("v1") else "DebertaV2"
    return FamilyCase(name, stem + kind, {**SIZES, **options}, answer=answer)


CASES = [
    case("v1-absolute-alone", "Model", pos_att_type="c2p|p2c"),
    case("v1-relative", "Model", **BOTH, position_biased_input=False, type_vocab_size=2),
    case(
        "v1-c2p-short-reach", "ForMaskedLM", relative_attention=True, pos_att_type=["c2p"],
        max_relative_positions=4, type_vocab_size=3,
    ),
    case(
        "v1-p2c-narrow", "ForMaskedLM", relative_attention=True, pos_att_type="p2c",
        embedding_size=16, num_attention_heads=2,
    ),
    case("v1-plain-decoder", "ForMaskedLM", **BOTH, legacy=False, hidden_act="relu"),
    Untied("v1-untied", "DebertaForMaskedLM", {**SIZES, **BOTH, "tie_word_embeddings": False}),
    case("v1-classify", "ForSequenceClassification", **BOTH, **LABELS, pooler_hidden_act="tanh"),
    case("v1-tag", "ForTokenClassification", **BOTH, **LABELS, hidden_act="gelu_new"),
    case(
        "v1-answer-longer-than-table", "ForQuestionAnswering", spans, **BOTH,
        position_biased_input=False, max_position_embeddings=6, num_hidden_layers=1,
    ),
    case("v1-no-terms", "Model", relative_attention=True, num_attention_heads=1),
    case("v3", "Model", **V3),
    case("v2-own-projections", "ForMaskedLM", **BOTH, position_buckets=6, type_vocab_size=2),
    case(
        "v2-conv", "ForMaskedLM", **V3, legacy=False, conv_kernel_size=3, conv_act="gelu",
        conv_groups=2,
    ),
    case(
        "v2-conv-wide", "ForTokenClassification", **LABELS, conv_kernel_size=5, hidden_act="silu",
        pos_att_type="p2c",
    ),
    case(
        "v2-no-buckets", "ForSequenceClassification", relative_attention=True, **LABELS,
        pos_att_type="c2p", share_att_key=True, position_buckets=-1, max_relative_positions=3,
    ),
    case(
        "v2-p2c", "ForQuestionAnswering", spans, relative_attention=True, pos_att_type=["p2c"],
        position_buckets=4, max_relative_positions=20, hidden_size=30, num_attention_heads=5,
    ),
    # A reach so near that buckets lie further than their distances.
    case("v2-near-reach", "Model", **{**V3, "position_buckets": 10}, max_relative_positions=8),
    case(
        "v2-unused-buckets", "Model", relative_attention=False, position_buckets=8,
        max_relative_positions=3,
    ),
    case("v2-wide-embedding", "ForMaskedLM", **BOTH, **SHARED, embedding_size=40),
    case("v2-one-layer", "Model", **V3, attention_head_size=8, num_hidden_layers=1),
    case(
        "v2-no-terms", "Model", relative_attention=True, norm_rel_ebd="none|layer_norm",
        max_position_embeddings=11, layer_norm_eps=1e-3,
    ),
    case("v2-plain", "ForMaskedLM", legacy=False, position_biased_input=False),
]  # fmt: skip

by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@by_name
def test_equal_to_transformers(case: FamilyCase, tmp_path: Path) -> None:
    check_equal(case, tmp_path)


@by_name
def test_round_trip(case: FamilyCase, tmp_path: Path) -> None:
    check_round_trip(case, tmp_path)


@by_name
def test_padding_changes_no_token(case: FamilyCase, tmp_path: Path) -> None:
    """The reference masks padded queries too, so only what counts is compared with it."""
    check_alone(case, tmp_path)
    theirs = case.make()
    inputs = padded_texts(theirs.config, 5)
    keep = inputs["attention_mask"].bool()
    model = ph.load(tmp_path)
    found, expected = case.call(model, inputs), case.expected(theirs, inputs)
    if found.dim() == 3:
        found, expected = found[keep], expected[keep]
    assert difference(found, expected) <= CLOSE * max(1.0, expected.abs().max().item())


@by_name
def test_left_padding_changes_no_token(case: FamilyCase, tmp_path: Path) -> None:
    if case.model_class.endswith("SequenceClassification"):
        return  # it reads the first place, whatever stands there
    theirs = case.save(tmp_path)
    model = ph.load(tmp_path)
    ids = torch.randint(3, theirs.config.vocab_size, (2, 11))
    keep = torch.arange(11) >= torch.tensor([[0], [5]])
    with torch.no_grad():
        batch, alone = model(ids, keep.long()), model(ids[1:, 5:])
    assert difference(batch[1:, 5:], alone) <= CLOSE * max(1.0, alone.abs().max().item())


@pytest.mark.parametrize("name", ["v1-relative", "v3"])
def test_every_layer_equals(name: str, tmp_path: Path) -> None:
    chosen = next(case for case in CASES if case.name == name)
    theirs = chosen.save(tmp_path)
    model = ph.load(tmp_path)
    seen: list[Tensor] = []
    for layer in model.backbone.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    ids = torch.randint(3, 67, (2, 9))
    with torch.no_grad():
        model(ids)
        expected = theirs(ids, output_hidden_states=True).hidden_states[1:]
    for one, other in zip(seen, expected, strict=True):
        assert difference(one, other) <= CLOSE


# The decoder of the source, which transformers lacks.


def microsoft(folder: Path, version: str, spelling: str = "classifier", **options: Any) -> Any:
    """A checkpoint as Microsoft publishes them, and transformers' modules with its weights."""
    name = "v1" if version == "deberta" else "v2"
    chosen = case(
        name, "ForMaskedLM", **{**options, "legacy": False, "position_biased_input": False}
    )
    model = chosen.make(3)
    generator = torch.Generator().manual_seed(9)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.5

    width = SIZES["hidden_size"]
    extra = {
        "deberta.embeddings.position_embeddings.weight": drawn(32, width),
        "mask_predictions.dense.weight": drawn(width, width),
        "mask_predictions.dense.bias": drawn(width),
        "mask_predictions.LayerNorm.weight": drawn(width),
        "mask_predictions.LayerNorm.bias": drawn(width),
        f"mask_predictions.{spelling}.weight": drawn(1, width),
        f"mask_predictions.{spelling}.bias": drawn(1),
    }
    own = {k: v.contiguous() for k, v in model.state_dict().items() if "position_ids" not in k}
    folder.mkdir()
    save_file({**own, **extra}, folder / "model.safetensors")
    said = {**SIZES, **options, "model_type": version, "position_biased_input": False}
    (folder / "config.json").write_text(json.dumps(said))
    return model, extra


def by_hand(model: Any, positions: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
    """Microsoft's decoder, from its source: one query at a time, in float64."""
    model = model.double()
    config, layer = model.config, model.deberta.encoder.layer[-1]
    with torch.no_grad():
        states = model.deberta(ids, keep.long(), output_hidden_states=True).hidden_states
        hidden = states[-2]
        table = model.deberta.encoder.get_rel_embedding()
        query = hidden + positions.double()[: ids.shape[1]]
        for _ in range(2):
            attended = torch.zeros_like(query)
            for row in range(len(ids)):
                attended[row] = attention_by_hand(
                    layer.attention.self, query[row], hidden[row], keep[row], table, config
                )
            output = layer.attention.output
            x = output.LayerNorm(output.dense(attended) + query)
            query = layer.output.LayerNorm(layer.output.dense(layer.intermediate(x)) + x)
        head = model.lm_predictions.lm_head
        logits = head(query, model.deberta.embeddings.word_embeddings)
    model.float()
    return logits.float()


def attention_by_hand(
    part: Any, asking: Tensor, memory: Tensor, keep: Tensor, table: Tensor, config: Any
) -> Tensor:
    heads, length = config.num_attention_heads, len(asking)
    width = config.hidden_size // heads
    if hasattr(part, "in_proj"):
        joined = part.in_proj.weight.view(heads, 3, width, -1)
        wq, wk, wv = (joined[:, which].reshape(heads * width, -1) for which in range(3))
        q, k, v = asking @ wq.T + part.q_bias, memory @ wk.T, memory @ wv.T + part.v_bias
        far_k, far_q = part.pos_proj(table), part.pos_q_proj(table)
        span, bucket = config.max_position_embeddings, lambda distance: distance
    else:
        q, k, v = part.query_proj(asking), part.key_proj(memory), part.value_proj(memory)
        far_k, far_q = part.key_proj(table), part.query_proj(table)
        span, half = config.position_buckets, config.position_buckets // 2

        def bucket(distance: int) -> int:
            if abs(distance) <= half:
                return distance
            top = torch.tensor((config.max_position_embeddings - 1) / half).log()
            far = torch.ceil(torch.tensor(abs(distance) / half).log() / top * (half - 1)) + half
            return int(far) * (1 if distance > 0 else -1)

    answer = torch.zeros_like(asking)
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        for i in range(length):
            if not keep[i]:
                continue
            scores = torch.full((length,), -torch.inf, dtype=torch.float64)
            for j in range(length):
                if keep[j]:
                    at = max(0, min(2 * span - 1, bucket(i - j) + span))
                    score = q[i, own] @ k[j, own]
                    score = score + q[i, own] @ far_k[at, own] + k[j, own] @ far_q[at, own]
                    scores[j] = score / (3 * width) ** 0.5
            answer[i, own] = scores.softmax(0) @ v[:, own]
    return answer


ENHANCED = {
    "v1": ("deberta", BOTH),
    "v3": ("deberta-v2", {**BOTH, **SHARED}),
    "v2-conv": ("deberta-v2", {**BOTH, **SHARED, "conv_kernel_size": 3, "conv_act": "gelu"}),
}


@pytest.mark.parametrize("name", ENHANCED)
def test_the_enhanced_decoder_is_that_of_the_source(name: str, tmp_path: Path) -> None:
    version, options = ENHANCED[name]
    theirs, extra = microsoft(tmp_path / "theirs", version, **options)
    model = ph.load(tmp_path / "theirs")
    assert model.config.decoder == "enhanced"
    ids = torch.randint(3, 67, (3, 11))
    keep = torch.arange(11) < torch.tensor([[11], [6], [9]])
    expected = by_hand(theirs, extra["deberta.embeddings.position_embeddings.weight"], ids, keep)
    with torch.no_grad():
        found = model(ids, keep.long())
        plain = theirs(ids, keep.long()).logits
        alone = model(ids[1:2, :6])
    assert difference(found[keep], expected[keep]) <= CLOSE
    assert difference(found[1:2, :6], alone) <= CLOSE
    # transformers reads the last layer, without positions: another answer.
    assert difference(found[keep], plain[keep]) > 0.1


def test_microsofts_tensors_come_back(tmp_path: Path) -> None:
    microsoft(tmp_path / "theirs", "deberta-v2", **BOTH, **SHARED)
    ph.load(tmp_path / "theirs").save(tmp_path / "ours")
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    other = {name for name in before if name.startswith("mask_predictions")}
    assert after.keys() == before.keys() - other
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert ph.load(tmp_path / "ours").config.decoder == "enhanced"
    kind = transformers.DebertaV2ForMaskedLM
    _, told = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not told["missing_keys"]


@pytest.mark.parametrize("spelling", ["classifier", "classifer"])
def test_replaced_tokens_are_found_as_in_the_source(spelling: str, tmp_path: Path) -> None:
    theirs, extra = microsoft(tmp_path / "a", "deberta-v2", spelling, **BOTH, **SHARED)
    model = ph.load(tmp_path / "a", head="rtd")
    ids = torch.randint(3, 67, (2, 7))
    own = {name.removeprefix("mask_predictions."): value for name, value in extra.items()}
    with torch.no_grad():
        hidden = theirs.deberta(ids).last_hidden_state
        x = hidden + hidden[:, 0].unsqueeze(1)
        x = F.layer_norm(x, (24,), own["LayerNorm.weight"], own["LayerNorm.bias"], 1e-7)
        x = F.gelu(F.linear(x, own["dense.weight"], own["dense.bias"]))
        expected = F.linear(x, own[f"{spelling}.weight"], own[f"{spelling}.bias"])[..., 0]
        assert difference(model(ids), expected) <= CLOSE
    model.save(tmp_path / "b")
    again = ph.load(tmp_path / "b")
    assert again.head_kind == "rtd"
    states = (again.state_dict(), model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_each_head_of_several_reads_its_own_states(tmp_path: Path) -> None:
    microsoft(tmp_path / "a", "deberta-v2", **BOTH, **SHARED)
    tasks = {"fill": {"head": "lm"}, "found": {"head": "rtd"}}
    model = ph.load(tmp_path / "a", head="multitask", tasks=tasks)
    ids = torch.randint(3, 67, (2, 7))
    with torch.no_grad():
        states = model.backbone.decode_masked(ids)
        assert torch.equal(model(ids, head="fill"), model.head["fill"](states))
        assert torch.equal(model(ids, head="found"), model.head["found"](model.backbone(ids)))


@pytest.mark.parametrize("decoder", ["legacy", "plain", "enhanced"])
def test_a_fresh_model_is_stored_as_its_decoder_says(decoder: str, tmp_path: Path) -> None:
    sizes = dict(vocab_size=67, d_model=24, d_ff=40, num_layers=2, num_heads=3, max_seq_len=32)
    model = ph.build("deberta-v2", seed=0, **sizes, position_buckets=8, decoder=decoder).eval()
    model.save(tmp_path)
    again = ph.load(tmp_path)
    assert again.config.decoder == decoder
    kind = transformers.DebertaV2ForMaskedLM
    theirs, told = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"]
    ids = torch.randint(3, 67, (2, 9))
    with torch.no_grad():
        assert torch.equal(again(ids), model(ids))
        equal = difference(model(ids), theirs.eval()(ids).logits) <= CLOSE
    assert equal == (decoder != "enhanced")


REFUSED = {
    "talking_head": dict(kind="Deberta", talking_head=True),
    "pos_att_type": dict(kind="DebertaV2", pos_att_type="c2p|p2p"),
    "conv_width is 4": dict(kind="DebertaV2", conv_kernel_size=4),
    "reach above": dict(kind="DebertaV2", position_buckets=70),
    "2 buckets or more": dict(kind="DebertaV2", position_buckets=1),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(said: str, tmp_path: Path) -> None:
    options = dict(REFUSED[said])
    kind = getattr(transformers, str(options.pop("kind")) + "Config")
    config = kind(**{**SIZES, **BOTH, **options})
    config.save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(PolyheadError, match=said) as caught:
        ph.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_fresh_configs_that_cannot_be_are_refused() -> None:
    sizes = dict(vocab_size=67, d_model=24, d_ff=40, num_layers=1, num_heads=3, max_seq_len=300)
    for wrong in (
        dict(decoder="enhanced", biased_input=True),
        dict(decoder="deep"),
        dict(decoder="plain", tie_embeddings=False),
        dict(conv_width=3),
    ):
        with pytest.raises(ConfigError):
            ph.build("deberta-v2", **sizes, **wrong)
