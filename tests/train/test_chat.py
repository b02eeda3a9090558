"""Conversations: a loss on the answers alone, packed or not."""

import json

import numpy as np
import pytest
import torch

import polyhead as ph
from polyhead.errors import DataError
from polyhead.text.tokenizer import Tokenizer
from polyhead.train.chatting import conversations
from polyhead.train.config import TrainConfig
from polyhead.train.dialogue import spoken
from polyhead.train.log import read_log
from polyhead.train.objectives import IGNORE, causal_lm
from polyhead.train.records import read_table
from polyhead.train.registry import OBJECTIVES

from .conftest import text

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Ends a turn with its eos, opens with a bos, knows no system, and thinks in the last turn alone.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {% if loop.last %}<think></think>{% endif %}{{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
TURNS = [
    {"role": "system", "content": "the mat"},
    {"role": "user", "content": "a cat"},
    {"role": "assistant", "content": "it sat"},
    {"role": "user", "content": "on a cat"},
    {"role": "assistant", "content": "was flat"},
]


def speaker(template: str | None) -> Tokenizer:
    extra = ["<|im_start|>", "<|im_end|>"]
    return Tokenizer.train(
        [text(50), "userassistantsystem[INST]/<think>"], kind="bpe", vocab_size=300,
        extra_tokens=extra, chat_template=template,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("template", "turns", "own"),
    [
        (CHATML, TURNS, ["it sat<|im_end|>", "was flat<|im_end|>"]),
        (CHATML, TURNS[1:3], ["it sat<|im_end|>"]),
        (BRACKETS, TURNS[1:3], [" <think></think>it sat<|endoftext|>"]),
        (BRACKETS, TURNS[1:], [" it sat<|endoftext|>", " <think></think>was flat<|endoftext|>"]),
    ],
)
def test_the_assistants_words_and_their_end_are_its_own(template, turns, own):
    tokenizer = speaker(template)
    found = spoken(tokenizer, turns)
    whole = tokenizer.apply_chat_template(turns, add_generation_prompt=False)
    assert found.ids.tolist() == tokenizer.encode(whole, add_special_tokens=False)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], found.own, [0]])))
    parts = [found.ids[a:b].tolist() for a, b in edges.reshape(-1, 2)]
    said = [tokenizer.decode(part, skip_special_tokens=False) for part in parts]
    assert [part.strip() for part in said] == [part.strip() for part in own]


def dataset(rows, tokenizer, split="all", context=64, **options):
    table = read_table(rows, OBJECTIVES["chat"].columns)
    model = ph.build("llama", vocab_size=tokenizer.vocab_size, **SIZES)
    config = TrainConfig(context=context, held_out=0.0)
    return conversations(table, tokenizer, model, config, split, **options)


SIZES = dict(d_model=16, d_ff=24, num_layers=2, num_heads=2, max_seq_len=64)
LINES = text(40).splitlines()
PAIRS = [{"prompt": a, "answer": b} for a, b in zip(LINES[::2], LINES[1::2], strict=True)]


@pytest.mark.parametrize("template", [CHATML, None])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_packed_rows_lose_what_they_lose_alone(template, family):
    tokenizer = speaker(template)
    more = {"num_experts": 2, "top_k": 1} if family == "mixtral" else {}
    sizes = {k: v for k, v in SIZES.items() if k != "d_ff" or family != "gpt2"}
    model = ph.build(family, seed=0, vocab_size=tokenizer.vocab_size, **sizes, **more).eval()
    alone = dataset(PAIRS, tokenizer, "train")
    packed = dataset(PAIRS, tokenizer, "train", pack=True)
    assert len(packed) <= len(alone) / 2
    one = causal_lm(model, alone.batch(0, len(alone)))
    batch = packed.batch(0, len(packed))
    other = causal_lm(model, batch)
    assert batch.input_ids.shape[1] <= 64
    assert one.tokens == other.tokens
    assert torch.allclose(one.total, other.total, rtol=1e-5)
    # Blind to its neighbours: another first text in each row changes none of the others.
    changed = batch.input_ids.masked_fill(batch.segments == 0, 5)
    states = model.backbone(batch.input_ids, attention_mask=batch.mask(),
                            position_ids=batch.position_ids)  # fmt: skip
    again = model.backbone(changed, attention_mask=batch.mask(), position_ids=batch.position_ids)
    rest = batch.segments > 0
    assert torch.allclose(states[rest], again[rest], atol=1e-6)


def test_prompts_are_not_learned():
    tokenizer = speaker(None)
    batch = dataset(PAIRS[:3], tokenizer).batch(0, 3)
    for row, pair in zip(batch.labels, PAIRS[:3], strict=True):
        said = tokenizer.decode(row[row != IGNORE].tolist(), skip_special_tokens=False)
        assert said in {p["answer"] + "<|endoftext|>" for p in PAIRS[:3]}, pair


def test_long_conversations_are_cut_or_left_out(capsys):
    tokenizer = speaker(None)
    long = {"prompt": text(40), "answer": "a mat"}
    found = dataset([long, *PAIRS[:4]], tokenizer, context=32)
    assert len(found) == 4
    assert "1 of 5 conversations are left out" in capsys.readouterr().err
    cut = dataset([{"prompt": "a cat", "answer": text(40)}], tokenizer, context=32)
    assert cut.batch(0, 1).labels.shape == (1, 32)


@pytest.mark.parametrize(
    ("rows", "template", "said"),
    [
        ([{"prompt": "a", "answer": None}], None, "row 0: answer is None"),
        (
            [{"prompt": "a", "answer": "b"}, {"prompt": 3, "answer": "b"}],
            None,
            "row 1: prompt is 3",
        ),
        ([{"messages": []}], CHATML, "row 0: messages are"),
        ([{"messages": [{"role": "user", "content": "a"}]}], CHATML, "not the assistant's"),
        ([{"messages": TURNS}], None, "chat template"),
        ([{"system": "s", "prompt": "a", "answer": "b"}], None, "no chat template takes"),
        ([{"question": "a"}], CHATML, "has no column 'messages', 'prompt'"),
        ([{"prompt": text(40), "answer": "b"}], None, "no answer begins within context = 64"),
    ],
)
def test_rows_that_cannot_be_are_refused(rows, template, said):
    tokenizer = speaker(template)
    if template is None:
        said = said if "chat template" not in said or "system" in rows[0] else "chat template"
    with pytest.raises((DataError, ph.ConfigError), match=said):
        dataset(rows, tokenizer)


def test_a_model_learns_to_answer_and_to_stop(tmp_path):
    tokenizer = speaker(CHATML)
    rows = [{"prompt": "a cat", "answer": "it sat"}, {"prompt": "a mat", "answer": "was flat"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows * 20))
    model = ph.build("llama", seed=0, vocab_size=tokenizer.vocab_size, **SIZES)
    config = TrainConfig(steps=60, batch_size=8, context=40, lr=2e-2, warmup=5,
                         out=str(tmp_path / "run"))  # fmt: skip
    found = ph.Trainer(model, tokenizer, config, objective="chat", quiet=True).fit(file)
    assert found["valid_loss"] < 0.1
    chat = ph.TextGenerator(model, tokenizer)
    for row in rows:
        ids = tokenizer.encode(
            tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]}]), False
        )
        settings = ph.GenerationConfig(max_new_tokens=20, temperature=0)
        assert str(chat.generate(ids, settings)).strip() == row["answer"]


def test_a_step_is_the_same_in_one_batch_and_in_twelve(tokenizer, tmp_path):
    """Rows of like length share a step, not a batch: accumulating changes no loss."""
    rows = [{"prompt": "a cat", "answer": "sat " * (1 + at % 7)} for at in range(60)]
    losses = []
    for size in (12, 4, 1):
        model = ph.build("llama", seed=0, vocab_size=tokenizer.vocab_size, d_model=16, d_ff=24,
                         num_layers=1, num_heads=2)  # fmt: skip
        config = TrainConfig(
            steps=4, batch_size=size, accumulate=12 // size, context=48, warmup=1, log_every=1,
            held_out=0.0, out=str(tmp_path / str(size)),
        )  # fmt: skip
        ph.Trainer(model, tokenizer, config, objective="chat", quiet=True).fit(rows)
        log = read_log(tmp_path / str(size) / "log.jsonl")
        losses.append([line["loss"] for line in log if "lr" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
