"""GRPO: the estimates of the paper, and a policy that learns what is rewarded."""

import sys

import pytest
import torch

import polyhead as ph
from polyhead.errors import ConfigError, DataError, PolyheadError
from polyhead.train import checkpoint
from polyhead.train.config import TrainConfig
from polyhead.train.grpo import (
    advantages_of,
    grpo,
    grpo_objective,
    named_reward,
    policy_losses,
    prompted,
)
from polyhead.train.records import read_table
from polyhead.train.registry import OBJECTIVES

from .test_checkpoint import Stop, assert_same, final_state, stop_at

SIZES = dict(d_model=16, d_ff=24, num_layers=2, num_heads=2, max_seq_len=64)
ROWS = [{"prompt": f"the {word}", "answer": word} for word in ("cat", "mat", "sat", "flat")] * 2


def letters(prompts, completions, answer):
    """How much of an answer is the letter a."""
    assert len(prompts) == len(completions) == len(answer)
    return [text.count("a") / max(1, len(text)) for text in completions]


def trainer(tokenizer, out, *, reward=letters, lora=False, callbacks=(), steps=30, **options):
    # Beside weights as small as usual an adapter has no leverage on the logits.
    std = 0.4 if lora else 0.02
    model = ph.build("llama", seed=0, vocab_size=tokenizer.vocab_size, init_std=std, **SIZES)
    if lora:
        ph.add_adapter(model, ph.LoraConfig(targets="all-linear"))
    config = TrainConfig(
        out=str(out), steps=steps, batch_size=4, context=24, lr=2e-2, warmup=2, log_every=1,
        checkpoint_every=5, validate_every=10, validate_batches=0,
    )  # fmt: skip
    options = {"group": 4, "max_new_tokens": 6, **options}
    kind = grpo_objective(reward) if callable(reward) else "grpo"
    if isinstance(reward, str):
        options["reward"] = reward
    return ph.Trainer(
        model, tokenizer, config, objective=kind, options=options, callbacks=callbacks, quiet=True
    )


@pytest.mark.parametrize(("lora", "options"), [(False, {}), (True, {"kl": 0.01})])
def test_what_is_rewarded_becomes_likelier(tokenizer, tmp_path, lora, options):
    found = trainer(tokenizer, tmp_path, lora=lora, **options).fit(ROWS, ROWS[:4])
    assert found["valid_reward"] > 0.6  # one letter of twenty is an a
    assert found["reward"] > 0.5
    assert 1 <= found["length"] <= 6


def test_a_run_that_goes_on_draws_the_same_answers(tokenizer, tmp_path):
    trainer(tokenizer, tmp_path / "whole", steps=10).fit(ROWS, ROWS[:4])
    with pytest.raises(Stop):
        trainer(tokenizer, tmp_path / "cut", steps=10, callbacks=[stop_at(7)]).fit(ROWS, ROWS[:4])
    torch.manual_seed(5)
    again = trainer(tokenizer, tmp_path / "cut", steps=10)
    again.fit(ROWS, ROWS[:4], resume=True)
    whole, cut = final_state(tmp_path / "whole"), final_state(tmp_path / "cut")
    whole[1]["rng"], cut[1]["rng"] = None, None
    assert_same(whole, cut)
    assert checkpoint.latest(tmp_path / "cut").name == "step-00000010"


def test_losses_are_the_papers():
    torch.manual_seed(0)
    now, old, reference = -3 * torch.rand(3, 7).double()
    gains = torch.randn(7).double()
    found = policy_losses(now, old, gains, reference, clip=0.2, kl=0.05)
    for i in range(7):
        ratio = torch.exp(now[i] - old[i])
        clipped = min(max(ratio, torch.tensor(0.8)), torch.tensor(1.2))
        surrogate = min(ratio * gains[i], clipped * gains[i])
        share = torch.exp(reference[i] - now[i])
        expected = -(surrogate - 0.05 * (share - torch.log(share) - 1))
        assert torch.isclose(found[i], expected)
    rewards = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])
    assert torch.allclose(
        advantages_of(rewards), torch.tensor([[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), atol=1e-3
    )


def test_a_reward_by_its_place(tokenizer, tmp_path):
    file = tmp_path / "my_rewards.py"
    file.write_text("def short(prompts, completions, **rest):\n"
                    "    return [-len(text) for text in completions]\n")  # fmt: skip
    assert named_reward(f"{file}:short")(prompts=["a"], completions=["bc"]) == [-2]
    found = trainer(tokenizer, tmp_path / "run", reward=f"{file}:short", steps=2).fit(ROWS)
    assert found["reward"] <= 0


def test_a_file_of_rewards_may_be_named_as_a_module_is(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "json.py").write_text("from beside import f\n")
    (tmp_path / "beside.py").write_text("def f(**_):\n    return [3.0]\n")
    assert named_reward(f"{tmp_path / 'json.py'}:f")() == [3.0]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def f(:", "SyntaxError"),
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("f = 3", "is 3: it must be a function"),
        ("g = 3", "no attribute 'f'"),
    ],
)
def test_what_is_no_reward_is_told(tmp_path, code, said):
    (tmp_path / "broken.py").write_text(code)
    with pytest.raises(ConfigError, match=said):
        named_reward(f"{tmp_path / 'broken.py'}:f")


@pytest.mark.parametrize("seed", [0, 3_000_000_000])
def test_the_first_step_follows_the_distribution_that_it_drew_from(tokenizer, tmp_path, seed):
    """At temperature t the policy is softmax(logits / t): its gradient, by hand."""
    model = ph.build("llama", seed=0, vocab_size=tokenizer.vocab_size, init_std=0.3, **SIZES)
    config = TrainConfig(context=24, held_out=0.0, seed=seed, out=str(tmp_path))
    table = read_table(ROWS, OBJECTIVES["grpo"].columns)
    options = {"reward": letters, "group": 4, "max_new_tokens": 6, "temperature": 1.7}
    batch = prompted(table, tokenizer, model, config, "all", **options).batch(0, 4)
    grpo(model, batch).total.backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    answers, rewards = batch.rollout(model, batch)
    log_probs = (model(answers.input_ids, attention_mask=answers.mask()) / 1.7).log_softmax(-1)
    each = log_probs.gather(-1, answers.labels.clamp_min(0)[..., None])[..., 0]
    counts = answers.labels != -100
    means = (each * counts).sum(1) / counts.sum(1)
    (-means * advantages_of(rewards).flatten()).sum().backward()
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"reward": "nowhere:f"}, ConfigError, "there is no reward 'nowhere:f'"),
        ({"reward": "nothing"}, ConfigError, "module:function"),
        ({"reward": lambda **_: [1.0]}, PolyheadError, "1 values for 16 completions"),
        ({"reward": lambda completions, **_: [float("nan")] * len(completions)}, PolyheadError,
         "no number"),
        ({"reward": lambda **_: None}, PolyheadError, "TypeError.*prompts, completions, answer"),
        ({"reward": lambda: [1.0]}, PolyheadError, "unexpected keyword"),
        ({"reward": lambda completions, **_: ["x"] * len(completions)}, PolyheadError, "'x'"),
        ({"temperature": 0.0}, ConfigError, "temperature is 0.0"),
        ({"max_new_tokens": 0}, ConfigError, "max_new_tokens is 0"),
        ({"clip": -0.1}, ConfigError, "clip is -0.1"),
        ({"kl": -0.1}, ConfigError, "kl -0.1"),
        ({"group": 1}, ConfigError, "2 or more"),
        ({"max_new_tokens": 22}, DataError, "raise context"),
        ({"kl": 0.1}, ConfigError, "train an adapter"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(tokenizer, tmp_path, change, error, said):
    with pytest.raises(error, match=said):
        trainer(tokenizer, tmp_path, **change).fit(ROWS)
