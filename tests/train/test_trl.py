"""Preference losses equal TRL's."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import transformers

import polyhead as ph
from polyhead.train.config import TrainConfig
from polyhead.train.grpo import advantages_of, policy_losses
from polyhead.train.preference import compared_answers, preference
from polyhead.train.ranks import Ranks
from polyhead.train.records import read_table
from polyhead.train.registry import OBJECTIVES

from .conftest import WORDS

trl = pytest.importorskip("trl", reason="trl is not installed")
SIZES = dict(d_model=32, d_ff=48, num_layers=2, num_heads=4, init_std=0.3)
ROWS = [
    {"prompt": f"the {word}", "chosen": " sat on a mat", "rejected": f" was {word} and it"}
    for word in WORDS[1:6]
]


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """A policy and a reference, saved, with their tokenizer."""
    folder = tmp_path_factory.mktemp("policies")
    tokenizer = ph.Tokenizer.train([" ".join(WORDS) * 5], kind="bpe", vocab_size=300)
    for seed, name in enumerate(("policy", "reference")):
        model = ph.build("llama", seed=seed, vocab_size=tokenizer.vocab_size, **SIZES)
        model.save(folder / name)
        tokenizer.save(folder / name, force=True)
    return folder, tokenizer


@pytest.mark.parametrize(
    ("theirs", "ours"), [("sigmoid", "dpo"), ("ipo", "ipo"), ("sigmoid_norm", "length-normalised")]
)
@pytest.mark.parametrize("beta", [0.05, 0.3])
def test_preferences(policies, tmp_path, theirs, ours, beta):
    from datasets import Dataset

    folder, tokenizer = policies
    made = [
        transformers.LlamaForCausalLM.from_pretrained(folder / name).eval()
        for name in ("policy", "reference")
    ]
    cut = transformers.AutoTokenizer.from_pretrained(folder / "policy")
    cut.pad_token = cut.pad_token or cut.eos_token
    trainer = trl.DPOTrainer(
        model=made[0], ref_model=made[1], processing_class=cut,
        train_dataset=Dataset.from_list(ROWS),
        args=trl.DPOConfig(
            output_dir=str(tmp_path), beta=beta, loss_type=[theirs], report_to=[], use_cpu=True,
            per_device_train_batch_size=len(ROWS), max_length=64, bf16=False,
            gradient_checkpointing=False,
        ),
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    made[0].eval()
    expected = trainer.compute_loss(made[0], batch)

    table = read_table(ROWS, OBJECTIVES["dpo"].columns)
    config = TrainConfig(context=64, held_out=0.0)
    policy, reference = (ph.load(folder / name) for name in ("policy", "reference"))
    data = compared_answers(table, tokenizer, policy, config, "all")
    data.refer(reference, tmp_path, "train", Ranks(), anew=True)
    loss = preference(policy, data.batch(0, len(ROWS)), variant=ours, beta=beta)
    assert torch.allclose(loss.total / loss.tokens, expected, atol=1e-5)


@pytest.mark.parametrize("kl", [0.0, 0.04])
def test_groups(kl):
    """TRL's own loss over log-probabilities that are given to it."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    torch.manual_seed(0)
    rows, width = 8, 7
    mask = (torch.arange(width) < torch.randint(2, width, (rows, 1))).long()
    now, old, before = -2 * torch.rand(3, rows, width)
    advantages = advantages_of(torch.rand(2, 4)).flatten()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *given, **named: (now, now, None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="token", beta=kl, epsilon_low=0.2, epsilon_high=0.2,
        loss_type="grpo", use_vllm=False, model=SimpleNamespace(training=True),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.ones(rows, 2).long(), "prompt_mask": torch.ones(rows, 2).long(),
        "completion_ids": torch.ones(rows, width).long(), "completion_mask": mask,
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": before,
    }  # fmt: skip
    expected = GRPOTrainer._compute_loss(trainer, None, inputs)
    each = policy_losses(now, old, advantages[:, None], before, clip=0.2, kl=kl)
    assert torch.allclose(((each * mask).sum(1) / mask.sum(1)).mean(), expected, atol=1e-6)
