"""A real pretrained model, from the file as it is published."""

from pathlib import Path

import pytest
import torch

import polyhead as ph

pytestmark = pytest.mark.weights

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea,",
]


def test_answers_where_the_eiffel_tower_is(smollm2: Path) -> None:
    tokenizer = ph.tokenizer(smollm2)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Where is the Eiffel Tower?"}]
    )
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    writer = ph.TextGenerator(ph.load(smollm2), tokenizer)
    (answer,) = writer.generate([ids], ph.GenerationConfig(max_new_tokens=16, temperature=0))
    assert "Paris" in answer


def test_greedy_tokens_equal_transformers(smollm2: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers reads GGUF with accelerate alone")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    ).eval()
    tokenizer, ours = ph.tokenizer(smollm2), ph.load(smollm2)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    settings = ph.GenerationConfig(max_new_tokens=24, temperature=0, ignore_eos=True)
    batch = ph.TextGenerator(ours, tokenizer).generate(prompts, settings)
    for prompt, answer in zip(prompts, batch, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            assert (ours(ids) - theirs(ids).logits).abs().max() <= 1e-4
            expected = theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=24,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert list(answer.token_ids) == expected[0, len(prompt) :].tolist()
