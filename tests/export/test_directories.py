"""What we save, transformers loads whole and answers alike; vLLM finds in it all that it asks for.

vLLM itself needs a GPU machine of its own, so its demands are held one by one: a class that its
registry lists (vllm/model_executor/models/registry.py), a config and a tokenizer that transformers'
Auto classes read, a dtype, and safetensors under the names of transformers' class.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.cli.conftest import TEXT
from tests.export.cases import BY_NAME
from torch import Tensor

import polyhead as ph

transformers = pytest.importorskip("transformers")

VLLM = {
    *"""LlamaForCausalLM MistralForCausalLM MixtralForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM
    Qwen2MoeForCausalLM Qwen3MoeForCausalLM OlmoeForCausalLM GPT2LMHeadModel""".split(),
    *"""BertModel RobertaModel XLMRobertaModel RobertaForMaskedLM CLIPModel
    BertForSequenceClassification BertForTokenClassification RobertaForSequenceClassification
    XLMRobertaForSequenceClassification GPT2ForSequenceClassification
    LlavaForConditionalGeneration""".split(),
}
# Our own classes, which no other library knows; and a model whose pooling stands beside it.
OURS = ("transformer", "bigram", "window_mlp", "lstm", "decoder", "bert-embed")
NAMES = [name for name in BY_NAME if not name.startswith(OURS)]
SERVED = [
    "llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "gpt2", "gpt2-classify",
    "bert-none", "bert-classify", "roberta", "clip", "llava",
]  # fmt: skip


def answers(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    found = model(**inputs)
    return found.logits_per_text if hasattr(found, "logits_per_text") else found[0]


def inputs_of(model: Any) -> dict[str, Tensor]:
    """Random inputs, by the names that both libraries have."""
    from polyhead.export.check import mask_of
    from polyhead.export.graphs import graphs
    from polyhead.export.parts import exportable

    kind, random = getattr(model.config, "kind", ""), torch.Generator().manual_seed(0)
    graph = graphs(exportable(model), past=kind == "image-text")[0]
    sizes = dict(batch_size=2, sequence_length=9, decoder_sequence_length=5, image_batch_size=2)
    inputs = {port.name: port.sample(sizes, random) for port in graph.inputs}
    if kind == "image-text":
        words = torch.randint(3, 50, (2, 5), generator=random)
        image = torch.full((2, 16), model.config.image_token_id)
        return {"input_ids": torch.cat([words, image, words], 1), **inputs}
    if "attention_mask" in inputs:
        inputs["attention_mask"] = mask_of(2, 9, random)
    if kind == "encoder-decoder":
        del inputs["decoder_attention_mask"]
    return inputs


@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_all_of_it_and_answers_alike(name: str, tmp_path: Path) -> None:
    model = BY_NAME[name].make()
    model.save(tmp_path)
    (architecture,) = json.loads((tmp_path / "config.json").read_text())["architectures"]
    theirs, said = getattr(transformers, architecture).from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    if name in ("bert-pretraining", "deberta", "deberta-v2"):
        return  # another head of theirs, or theirs is at fault: see tests/models
    inputs = inputs_of(model)
    if name == "gpt2-classify":
        # Theirs finds the end of a text by a padding id alone.
        inputs = {key: value[:1] for key, value in inputs.items()}
    with torch.no_grad():
        wanted, found = answers(theirs.eval(), inputs), model(**inputs)
    if name == "bert-answer":
        found = found[..., 0]
    if "attention_mask" in inputs and found.shape[:2] == inputs["attention_mask"].shape:
        keep = inputs["attention_mask"] != 0
        found, wanted = found[keep], wanted[keep]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SERVED)
def test_vllm_finds_what_it_asks_for(name: str, tmp_path: Path) -> None:
    tokenizer = ph.Tokenizer.train([TEXT], kind="bpe", vocab_size=300)
    fields = {} if name in ("clip", "llava") else {"vocab_size": tokenizer.vocab_size}
    model = BY_NAME[name].make(**fields).bfloat16()
    model.generation = {"eos_token_id": tokenizer.eos_id, "temperature": 0.7, "do_sample": True}
    model.save(tmp_path)
    tokenizer.save(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert set(said["architectures"]) <= VLLM
    assert said["dtype"] == "bfloat16"
    assert transformers.AutoConfig.from_pretrained(tmp_path).model_type == said["model_type"]
    assert transformers.GenerationConfig.from_pretrained(tmp_path).temperature == 0.7
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert words("the quick brown fox")["input_ids"] == tokenizer.encode("the quick brown fox")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_tensor(key).dtype for key in names} == {torch.bfloat16}
        assert file.metadata() == {"format": "pt"}
    theirs = getattr(transformers, said["architectures"][0]).from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "theirs")
    with safe_open(tmp_path / "theirs" / "model.safetensors", "pt") as file:
        assert names == set(file.keys())
