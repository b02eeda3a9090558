"""Adapters equal PEFT's, theirs read here and ours read there."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import polyhead as ph
from polyhead.adapt.adapters import add_adapter, merge_adapters, unmerge_adapters
from polyhead.adapt.lora import LoraConfig
from polyhead.adapt.peft import load_adapter, save_adapter
from polyhead.errors import FileError

peft = pytest.importorskip("peft")
CLOSE = 1e-5

SMALL = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
HEADS = dict(num_attention_heads=4, bos_token_id=1, eos_token_id=2, pad_token_id=0)
# transformers' class and config; PEFT's targets and kind of task; targets and whole parts here.
CASES: dict[str, tuple[Any, Any, Any, str | None, Any, tuple[str, ...]]] = {
    "llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**SMALL, **HEADS, num_key_value_heads=2),
        ["q_proj", "v_proj", "down_proj"], "CAUSAL_LM", ("q", "v", "ffn.down"), (),
    ),
    "llama-every-layer": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**SMALL, **HEADS, head_dim=10, attention_bias=True),
        "all-linear", "CAUSAL_LM", "all-linear", (),
    ),
    "llama-one-layer": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**SMALL, **HEADS),
        ["layers.1.self_attn.k_proj"], "CAUSAL_LM", ("layers.1.attention.k",), (),
    ),
    "gpt2-fused": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(
            vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1,
            eos_token_id=2,
        ),
        ["c_attn", "mlp.c_fc"], "CAUSAL_LM", ("q", "v"), (),
    ),
    "bert-classes": (
        transformers.BertForSequenceClassification,
        transformers.BertConfig(**SMALL, num_attention_heads=4, num_labels=3),
        ["query", "dense"], "SEQ_CLS", ("query", "attention.v"), ("head",),
    ),
    "bert-bare": (
        transformers.BertModel, transformers.BertConfig(**SMALL, num_attention_heads=4),
        ["query", "output.dense"], "FEATURE_EXTRACTION", ("query", "ffn.down"), ("pooler",),
    ),
    "bert-tied-head": (
        transformers.BertForMaskedLM, transformers.BertConfig(**SMALL, num_attention_heads=4),
        ["value"], None, ("attention.q",), ("head",),
    ),
    "gpt2-tied-embedding": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(
            vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1,
            eos_token_id=2,
        ),
        ["c_proj"], "CAUSAL_LM", ("k",), ("embedding",),
    ),
    "roberta-classes": (
        transformers.RobertaForSequenceClassification,
        transformers.RobertaConfig(**SMALL, num_attention_heads=4, num_labels=3, pad_token_id=1),
        ["key"], "SEQ_CLS", ("attention.q",), ("head",),
    ),
    "t5": (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(
            vocab_size=50, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=6,
            decoder_start_token_id=0,
        ),
        ["q", "wo"], "SEQ_2_SEQ_LM", ("q", "v"), (),
    ),
    "deberta-classes": (
        transformers.DebertaV2ForSequenceClassification,
        transformers.DebertaV2Config(
            **SMALL, num_attention_heads=4, num_labels=3, relative_attention=True,
            pos_att_type=["c2p", "p2c"], position_buckets=4, share_att_key=True,
            max_relative_positions=-1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ),
        ["query_proj", "dense"], "SEQ_CLS", ("attention.q", "ffn.down"), ("classifier",),
    ),
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "lora_dropout": 0.1},
    "patterns": {"rank_pattern": {"1.*": 2}, "alpha_pattern": {"0.*": 5}},
}


def inputs_of(config: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(50, (2, 7), generator=generator)
    more = {"decoder_input_ids": ids[:, :5]} if config.is_encoder_decoder else {}
    return {"input_ids": ids, **more}


def answer(model: Any, config: Any) -> Tensor:
    with torch.no_grad():
        found = model.eval()(**inputs_of(config))
    found = getattr(found, "logits", found)
    return getattr(found, "last_hidden_state", found)


def shaken(model: torch.nn.Module) -> None:
    """Adapters that have learned something."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


@pytest.fixture
def base(case: str, tmp_path: Path) -> Path:
    kind, config, *_ = CASES[case]
    torch.manual_seed(0)
    kind(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def theirs_of(case: str, base: Path, adapter: Path) -> Tensor:
    kind, config, *_ = CASES[case]
    return answer(peft.PeftModel.from_pretrained(kind.from_pretrained(base), adapter), config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_theirs_is_read_and_written_back(
    case: str, options: str, base: Path, tmp_path: Path
) -> None:
    kind, config, targets, task, *_ = CASES[case]
    more = OPTIONS[options]
    made = peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, task_type=task, **more)
    wrapped = peft.get_peft_model(kind.from_pretrained(base), made)
    shaken(wrapped)
    wrapped.save_pretrained(tmp_path / "theirs")
    wanted = answer(wrapped, config)
    model = ph.load(base)
    plain = answer(model, config)
    load_adapter(model, tmp_path / "theirs")
    assert (wanted - plain).abs().max() > 1e-3
    torch.testing.assert_close(answer(model, config), wanted, atol=CLOSE, rtol=CLOSE)
    merge_adapters(model)
    torch.testing.assert_close(answer(model, config), wanted, atol=CLOSE, rtol=CLOSE)
    unmerge_adapters(model)
    save_adapter(model, tmp_path / "again", base=str(base))
    again = theirs_of(case, base, tmp_path / "again")
    torch.testing.assert_close(again, wanted, atol=CLOSE, rtol=CLOSE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("case", CASES)
def test_ours_is_read_there(case: str, dora: bool, base: Path, tmp_path: Path) -> None:
    _, config, *_, targets, trained = CASES[case]
    model = ph.load(base)
    plain = answer(model, config)
    made = LoraConfig(rank=3, alpha=7, targets=targets, dora=dora, trained=trained)
    add_adapter(model, made)
    torch.testing.assert_close(answer(model, config), plain, atol=CLOSE, rtol=CLOSE)
    shaken(model)
    wanted = answer(model, config)
    assert (wanted - plain).abs().max() > 1e-3
    save_adapter(model, tmp_path / "ours", base=str(base))
    found = theirs_of(case, base, tmp_path / "ours")
    torch.testing.assert_close(found, wanted, atol=CLOSE, rtol=CLOSE)
    other = ph.load(base)
    load_adapter(other, tmp_path / "ours")
    torch.testing.assert_close(answer(other, config), wanted, atol=CLOSE, rtol=CLOSE)


def saved_by_peft(folder: Path, tied: bool, **more: Any) -> tuple[Path, Path, Tensor]:
    """A base, an adapter beside it, and what both answer."""
    config = transformers.LlamaConfig(**SMALL, **HEADS, tie_word_embeddings=tied)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    base = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    made = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **more)
    wrapped = peft.get_peft_model(base, made)
    shaken(wrapped)
    wrapped.save_pretrained(folder / "theirs")
    return folder / "base", folder / "theirs", answer(wrapped, config)


REFUSED: dict[str, tuple[bool, dict[str, Any], str]] = {
    "embedding apart": (True, {"modules_to_save": ["embed_tokens"]}, "apart from lm_head.weight"),
    "head apart": (True, {"modules_to_save": ["lm_head"]}, "lm_head.weight apart from model.embed"),
    "another base": (False, {"init_lora_weights": "pissa"}, "'pissa' changed the base's weights"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_what_would_answer_otherwise_here_is_refused(case: str, tmp_path: Path) -> None:
    tied, more, said = REFUSED[case]
    base, adapter, _ = saved_by_peft(tmp_path, tied, **more)
    with pytest.raises(FileError, match=said):
        load_adapter(ph.load(base), adapter)


@pytest.mark.filterwarnings("ignore")
def test_what_learned_tied_is_read(tmp_path: Path) -> None:
    told = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    base, adapter, wanted = saved_by_peft(tmp_path, True, **told)
    model = ph.load(base)
    load_adapter(model, adapter)
    found = answer(model, transformers.LlamaConfig())
    torch.testing.assert_close(found, wanted, atol=CLOSE, rtol=CLOSE)
