"""Group relative policy optimisation (Shao et al. 2024, section 4): several answers to a prompt of
the model's own, judged by a function, each against the mean of its group. P prompts, G answers.
"""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from polyhead.adapt.adapters import in_use, without_adapters
from polyhead.errors import ConfigError, DataError, PolyheadError
from polyhead.generate.config import GenerationConfig
from polyhead.generate.generator import TextGenerator
from polyhead.generate.prompts import encode_chat, encode_prompt
from polyhead.train.chatting import ChatCollator, room_of
from polyhead.train.config import TrainConfig
from polyhead.train.data import Examples, Split
from polyhead.train.dialogue import Spoken, opening
from polyhead.train.examples import digest_of, part_of
from polyhead.train.objectives import LanguageBatch, Loss
from polyhead.train.preference import label_log_probs
from polyhead.train.records import Table

if TYPE_CHECKING:
    from polyhead.train.registry import ObjectiveKind

Reward = Callable[..., Sequence[float]]
"""`(prompts, completions, **columns) -> rewards`, one a completion: the texts of prompts, of what
the model answered, and the other columns of their rows."""


@dataclass(frozen=True)
class Rollout:
    """How answers are drawn and judged: `group` of them a prompt, of `max_new_tokens` at most."""

    tokenizer: Any
    reward: Reward
    group: int
    max_new_tokens: int
    temperature: float

    def __call__(self, model: Any, batch: "PromptBatch") -> tuple[LanguageBatch, Tensor]:
        """The answers `[P G, T]`, a prompt's side by side, and their rewards `[P, G]`."""
        prompts = [ids for ids in batch.prompts for _ in range(self.group)]
        settings = [
            GenerationConfig(
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                seed=(number * self.group + turn) % 2**63,
            )
            for number in batch.numbers
            for turn in range(self.group)
        ]
        found = TextGenerator(model, self.tokenizer).generate(
            prompts, settings, batch_size=len(prompts)
        )
        rows = [
            Spoken(np.array([*ids, *answer.token_ids]), _after(len(ids), len(answer.token_ids)))
            for ids, answer in zip(prompts, found, strict=True)
        ]
        rewards = self._judged([str(answer) for answer in found], batch.rows)
        return ChatCollator.of(self.tokenizer)([(row,) for row in rows]), rewards

    def _judged(self, completions: list[str], rows: Sequence[Mapping[str, Any]]) -> Tensor:
        repeated = [row for row in rows for _ in range(self.group)]
        columns = {name: [row[name] for row in repeated] for name in rows[0] if name != "prompt"}
        prompts = [row["prompt"] for row in repeated]
        try:
            rewards = self.reward(prompts=prompts, completions=completions, **columns)
            found = torch.tensor([float(one) for one in rewards])
        except Exception as error:
            raise PolyheadError(
                f"the reward failed with {type(error).__name__}: {error}; it is called with lists "
                f"named {', '.join(['prompts', 'completions', *columns])} and gives a number for "
                "each completion"
            ) from error
        if len(found) != len(completions) or not bool(found.isfinite().all()):
            raise PolyheadError(
                f"the reward gave {len(found)} values for {len(completions)} completions, or one "
                f"that is no number: {found.tolist()[:4]}"
            )
        return found.view(-1, self.group)


def _after(prompt: int, answer: int) -> np.ndarray:
    return np.arange(prompt + answer) >= prompt


@dataclass(frozen=True)
class PromptBatch:
    """P prompts as ids, their rows, and their numbers in the run, which seed the answers."""

    prompts: list[list[int]]
    rows: Sequence[Mapping[str, Any]]
    numbers: Sequence[int]
    rollout: Rollout

    def tokens(self) -> int:
        """Answers: each counts as much as the others, however long."""
        return len(self.prompts) * self.rollout.group

    def to(self, device: torch.device) -> Self:
        """The same: prompts follow the model when they are answered."""
        return self


@dataclass(frozen=True, eq=False)
class Prompts(Examples):
    """Rows whose batches know where in the run they stand."""

    def batch(self, index: int, batch_size: int) -> PromptBatch:
        """The index-th batch of the run."""
        found: PromptBatch = super().batch(index, batch_size)
        numbers = range(index * batch_size, (index + 1) * batch_size)
        numbers = [number + (self.seed << 32) for number in numbers]
        return replace(found, numbers=numbers)


def prompted(
    table: Table, tokenizer: Any, model: Any, config: TrainConfig, split: Split, *,
    reward: str | Reward = "", group: int = 8, max_new_tokens: int = 64,
    temperature: float = 1.0, raw: bool = False,
) -> Prompts | None:  # fmt: skip
    """Rows of a `prompt` (and perhaps `system` and `answer`).

    reward: a function, or where one is: "module:function" or "file.py:function". Errors:
    ConfigError where it is not there.
    """
    if group < 2:
        raise ConfigError(f"group is {group}: an answer is judged beside others, so 2 or more")
    if not 0 < temperature < math.inf:
        raise ConfigError(f"temperature is {temperature}: above 0, or all answers are the same")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}: an answer has 1 or more")
    part = part_of(table, config, split)
    if part is None:
        return None
    rollout = Rollout(tokenizer, named_reward(reward), group, max_new_tokens, temperature)
    room = room_of(model, config) - max_new_tokens
    rows: list[tuple[list[int], Mapping[str, Any]]] = []
    for at in range(len(part)):
        ids = _encoded(part[at], part.number(at), part.name, tokenizer, raw)
        if len(ids) > room:
            raise DataError(
                f"{table.name}: the prompt of row {part.number(at)} has {len(ids)} tokens, and "
                f"context leaves {room} beside max_new_tokens = {max_new_tokens}: raise context"
            )
        rows.append((ids, part[at]))
    asked = reward if isinstance(reward, str) else getattr(reward, "__qualname__", "function")
    settings = (room, asked, group, max_new_tokens, temperature, raw, split)
    seal = digest_of(table, tokenizer, *settings, tokenizer.chat_template)
    return Prompts(rows, partial(_collated, rollout), config.seed, seal)


def _collated(rollout: Rollout, rows: Sequence[Any]) -> PromptBatch:
    return PromptBatch([ids for ids, _ in rows], [row for _, row in rows], (), rollout)


def _encoded(row: Mapping[str, Any], at: int, name: str, tokenizer: Any, raw: bool) -> list[int]:
    if not isinstance(row.get("prompt"), str) or not row["prompt"]:
        raise DataError(f"{name}: prompt of row {at} is {row.get('prompt')!r}; it must be text")
    if raw or tokenizer.chat_template is None:
        return encode_prompt(row["prompt"], tokenizer, tokenizer.vocab_size)
    return encode_chat(opening(row), tokenizer)


def named_reward(reward: str | Reward) -> Reward:
    """A reward function by its place."""
    if not isinstance(reward, str):
        return reward
    place, colon, name = reward.rpartition(":")
    if not colon:
        raise ConfigError(
            f"reward is {reward!r}: name a function, as module:function or file.py:function"
        )
    try:
        found = getattr(_module(place), name)
    except Exception as error:  # whatever stands in the file
        raise ConfigError(
            f"there is no reward {reward!r}: {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise ConfigError(f"reward {reward!r} is {found!r}: it must be a function")
    return found


def _module(place: str) -> Any:
    """A module by its name, or by its file, whose name another may have."""
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place).absolute()
    spec = importlib.util.spec_from_file_location(f"polyhead_reward_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    # It may import its neighbours, which shall not stand before what has their names elsewhere.
    sys.path.append(str(path.parent))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def advantages_of(rewards: Tensor) -> Tensor:
    """Of each answer over its group `[P, G]`, in standard deviations (equation 3)."""
    mean = rewards.mean(1, keepdim=True)
    return (rewards - mean) / (rewards.std(1, keepdim=True) + 1e-4)


def policy_losses(
    log_probs: Tensor,
    old: Tensor,
    advantages: Tensor,
    reference: Tensor | None = None,
    clip: float = 0.2,
    kl: float = 0.0,
) -> Tensor:
    """The loss of each token, by its log-probability now, when it was drawn, and of the reference.

    The clipped surrogate of PPO, and `kl` times the estimate r - log r - 1 with r = p_ref / p
    (equations 3 and 4).
    """
    ratio = (log_probs - old).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    if reference is None or not kl:
        return -gain
    away = reference - log_probs
    return kl * (away.exp() - away - 1) - gain


def check_policy(clip: float, kl: float) -> None:
    """ConfigError for settings of `policy_losses` that make no loss."""
    if not (0 < clip < math.inf and 0 <= kl < math.inf):
        raise ConfigError(f"clip is {clip} and kl {kl}: above 0, and 0 or more")


def grpo(model: Any, batch: PromptBatch, clip: float = 0.2, kl: float = 0.0) -> Loss:
    """Answers drawn from the model as it is, and the step that makes the better ones likelier.

    kl: how much moving away from the model without its adapter costs. Parts: the loss, the mean
    `reward`, and the answers' mean `length`.
    """
    answers, rewards = batch.rollout(model, batch)
    answers = answers.to(next(model.parameters()).device)
    temperature = batch.rollout.temperature  # probabilities are those it was drawn with
    log_probs, counts = label_log_probs(model, answers, temperature)
    rows = counts.nonzero()[:, 0]
    sizes = counts.sum(1)
    advantages = advantages_of(rewards).flatten().to(log_probs)
    reference = _reference(model, answers, temperature) if kl else None
    losses = policy_losses(log_probs, log_probs.detach(), advantages[rows], reference, clip, kl)
    # A mean over each answer's tokens, so that long ones weigh no more.
    total = (losses / sizes[rows]).sum()
    sums = {"loss": total.detach(), "reward": rewards.sum(), "length": sizes.sum()}
    return Loss(total, batch.tokens(), sums, (rewards.flatten(),))


def _reference(model: Any, answers: LanguageBatch, temperature: float) -> Tensor:
    if not in_use(model):
        raise ConfigError("kl is a distance from the model without its adapter: train an adapter")
    with torch.no_grad(), without_adapters(model):
        return label_log_probs(model, answers, temperature)[0]


def reward_figures(
    model: Any, dataset: Any, answers: Sequence[tuple[Tensor]]
) -> Mapping[str, float]:
    """The mean reward of answers to held-out prompts."""
    rewards = torch.cat([reward for (reward,) in answers]).float()
    return {"reward": float(rewards.mean())}


def grpo_objective(reward: Reward) -> "ObjectiveKind":
    """The objective with a function of one's own as its reward, as `Trainer` takes it."""
    from polyhead.train.registry import objective_named

    kind = objective_named("grpo")
    return replace(kind, dataset=partial(prompted, reward=reward), dataset_options={
        name: value for name, value in kind.dataset_options.items() if name != "reward"
    })  # fmt: skip
