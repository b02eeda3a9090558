"""Replaced-token detection: a small generator fills gaps, a discriminator finds what it filled.

(Clark et al. 2020; with gradient-disentangled embedding sharing, He et al. 2023.) Gaps are always
mask tokens; what the generator puts there is drawn from its distribution by numbers that come
with the batch, so that a step is a function of the weights and of (seed, row).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from polyhead.errors import ConfigError
from polyhead.models.assemble import assemble
from polyhead.models.model import TaskModel
from polyhead.models.registry import family_of
from polyhead.nn.embedding import Table
from polyhead.train.masked import (
    MaskedWindows,
    before_vocabulary,
    drawn,
    extras,
    masked_loss,
    masked_windows,
)
from polyhead.train.objectives import CHUNK_LOGITS, IGNORE, LanguageBatch, Loss

Sharing = Literal["none", "shared", "disentangled"]
SHARINGS: tuple[Sharing, ...] = ("none", "shared", "disentangled")
WEIGHT = 50.0
_EMBEDDING = "backbone.embedding.weight"


class ReplacedTokenModel(nn.Module):
    """A discriminator, which is what is kept, and the generator it is trained against.

    sharing: of their token embeddings. "none"; "shared", one table that both losses train
    (ELECTRA); "disentangled", the discriminator's is the generator's, which its loss does not
    reach, plus a difference of its own (DeBERTa-v3). Both start as they are given.
    """

    def __init__(
        self, discriminator: TaskModel, generator: TaskModel, sharing: Sharing = "disentangled"
    ) -> None:
        super().__init__()
        if sharing not in SHARINGS:
            raise ConfigError(f"sharing is {sharing!r}: choose one of {', '.join(SHARINGS)}")
        self.discriminator, self.generator = discriminator, generator
        self.difference: nn.Parameter | None = None
        if sharing == "none":
            return
        table, other = _table(discriminator), _table(generator)
        if table.weight.shape != other.weight.shape:
            raise ConfigError(
                f"embeddings of {list(table.weight.shape)} and {list(other.weight.shape)} cannot "
                "be shared: give the generator the same width, or set sharing to none"
            )
        if sharing == "shared":
            other.weight = table.weight
            generator.tie()
        else:
            self.difference = nn.Parameter(table.weight.detach() - other.weight.detach())
            table.weight.requires_grad_(False)

    def forward(self, input_ids: Tensor, **extras: Any) -> Tensor:
        """The discriminator's logit that a token was replaced, `[B, T]`."""
        changed = {} if self.difference is None else {_EMBEDDING: self._disentangled()}
        logits = functional_call(self.discriminator, changed, (input_ids,), extras)
        return logits.squeeze(-1) if logits.ndim == 3 else logits

    def save(
        self, directory: str | Path, force: bool = False, state: Mapping[str, Tensor] | None = None
    ) -> None:
        """The discriminator, and the generator in `generator/`, both ready to load."""
        if state is None:
            if self.difference is not None:
                with torch.no_grad():
                    _table(self.discriminator).weight.copy_(self._disentangled())
            state = self.state_dict()
        elif self.difference is not None:
            whole = state[f"generator.{_EMBEDDING}"] + state["difference"]
            state = {**state, f"discriminator.{_EMBEDDING}": whole}
        for side, folder in ((self.discriminator, "."), (self.generator, "generator")):
            name = "generator." if side is self.generator else "discriminator."
            own = {key.removeprefix(name): value for key, value in state.items()
                   if key.startswith(name)}  # fmt: skip
            side.save(Path(directory) / folder, force, own)

    def hf_config(self) -> dict[str, Any]:
        """What `config.json` says of the discriminator."""
        return self.discriminator.hf_config()

    @property
    def config(self) -> Any:
        """The discriminator's."""
        return self.discriminator.config

    @property
    def backbone(self) -> nn.Module:
        """The discriminator's."""
        return self.discriminator.backbone

    @property
    def head(self) -> nn.Module | None:
        """The discriminator's."""
        return self.discriminator.head

    @property
    def head_kind(self) -> str:
        """The discriminator's head."""
        return self.discriminator.head_kind

    def num_parameters(self) -> int:
        """Weights of both, each counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _disentangled(self) -> Tensor:
        assert self.difference is not None
        return _table(self.generator).weight.detach() + self.difference


def with_generator(
    discriminator: TaskModel,
    *,
    num_layers: int | None = None,
    sharing: Sharing = "disentangled",
    seed: int = 0,
) -> ReplacedTokenModel:
    """A discriminator and a fresh generator of the same family and width.

    num_layers: the generator's; half of the discriminator's unless given, as DeBERTa-v3's. Its
    embedding begins as the discriminator's.
    """
    config: Any = discriminator.config
    layers = max(1, config.num_layers // 2) if num_layers is None else num_layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        smaller = replace(config, num_layers=layers, labels=None, problem=None, tasks=None)
        generator = assemble(family_of(config.model_type), smaller, "lm")
    generator.to(discriminator.device, discriminator.dtype)
    if sharing != "none":
        with torch.no_grad():
            _table(generator).weight.copy_(_table(discriminator).weight)
    return ReplacedTokenModel(discriminator, generator, sharing)


def prepared(model: Any) -> ReplacedTokenModel:
    """A discriminator with a generator as `with_generator` makes it, unless it has one."""
    return model if isinstance(model, ReplacedTokenModel) else with_generator(model)


def _table(model: TaskModel) -> Table:
    table = model.backbone.get_submodule("embedding")
    assert isinstance(table, Table)
    return table


@dataclass(frozen=True, kw_only=True)
class ReplacedBatch(LanguageBatch):
    """Rows with gaps and what stood there; `draws` [B, T] from 0 to 1 choose what is put there."""

    draws: Tensor


@dataclass(frozen=True, eq=False)
class ReplacedWindows:
    """Masked windows with the numbers that the generator's choices are drawn by."""

    masked: MaskedWindows

    @property
    def digest(self) -> str:
        """The corpus, its tokenizer and the masking."""
        return f"{self.masked.digest} replaced"

    def __len__(self) -> int:
        return len(self.masked)

    def batch(self, index: int, batch_size: int) -> ReplacedBatch:
        """The index-th batch of the run."""
        batch = self.masked.batch(index, batch_size)
        first, seed, width = index * batch_size, self.masked.windows.seed, batch.labels.shape[1]
        draws = [drawn(seed, first + row, 1).random(width, np.float32) for row in range(batch_size)]
        return ReplacedBatch(batch.input_ids, batch.labels, draws=torch.from_numpy(np.stack(draws)))


def replaced_windows(*args: Any, **settings: Any) -> ReplacedWindows | None:
    """As `masked_windows`; every gap is a mask token unless told."""
    masked = masked_windows(*args, **{"mask": 1.0, "random": 0.0, **settings})
    return None if masked is None else ReplacedWindows(masked)


def replaced_token(model: ReplacedTokenModel, batch: ReplacedBatch, weight: float = WEIGHT) -> Loss:
    """Mean of the generator's cross-entropy plus `weight` times the discriminator's mean.

    `total` is a sum over masked tokens, as the generator's; parts: `loss` all of it, and each
    side's own. What the generator guessed right counts as not replaced.
    """
    given = extras(batch)
    gaps = batch.labels != IGNORE
    states = model.generator.hidden(batch.input_ids, **given)
    generator = masked_loss(model.generator, states, batch)
    decoder, before = before_vocabulary(model.generator, states.detach(), gaps)
    ids = batch.input_ids.masked_scatter(gaps, sample(decoder, before, batch.draws[gaps]))
    replaced = gaps & (ids != batch.labels)
    logits = model(ids, **given).float()
    keep = torch.ones_like(gaps) if batch.attention_mask is None else batch.attention_mask.bool()
    logits, replaced = logits[keep], replaced[keep]
    found = F.binary_cross_entropy_with_logits(logits, replaced.float(), reduction="sum")
    # As many tokens as the generator's sum is over; the ratio is the same in every batch.
    found = found * (generator.tokens / len(logits))
    total = generator.total + weight * found
    terms = {"loss": total, "generator": generator.total, "discriminator": found}
    return Loss(
        total,
        generator.tokens,
        {name: term.detach() for name, term in terms.items()},
        (logits.detach() > 0, replaced),
        lambda: torch.stack([torch.zeros_like(logits), logits], -1),
    )


@torch.no_grad()
def sample(decoder: Any, states: Tensor, draws: Tensor) -> Tensor:
    """A token for each state [N, E], where its draw [N] falls in the distribution; int64 [N]."""
    size = max(1, CHUNK_LOGITS // decoder.weight.shape[0])
    chosen = [draws.new_zeros(0, dtype=torch.int64)]
    for state, draw in zip(states.split(size), draws.split(size), strict=True):
        chance = decoder(state).float().softmax(-1).cumsum(-1)
        # Sums of fp32 end near 1, not at it.
        at = torch.searchsorted(chance, (draw[:, None] * chance[:, -1:]).contiguous(), right=True)
        chosen.append(at[:, 0].clamp(max=chance.shape[1] - 1))
    return torch.cat(chosen)


def detection(
    model: Any, dataset: Any, answers: Sequence[tuple[Tensor, Tensor]]
) -> Mapping[str, float]:
    """F1, precision and recall of the replaced tokens, and accuracy over all."""
    found, replaced = (torch.cat(side) for side in zip(*answers, strict=True))
    right = int((found & replaced).sum())
    told, there = max(1, int(found.sum())), max(1, int(replaced.sum()))
    return {
        "f1": 2 * right / (told + there),
        "precision": right / told,
        "recall": right / there,
        "accuracy": float((found == replaced).float().mean()),
    }
