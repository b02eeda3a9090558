"""Learning from comparisons: of two answers to a prompt the better one, by people's judgement.

DPO and what it led to want no model of rewards: the policy's own log-probabilities, beside those of
the model as the run found it, are one. The reward model is there for those who want it. P pairs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from polyhead.errors import ConfigError, DataError, FileError
from polyhead.files.safetensors import open_checkpoint
from polyhead.files.safetensors_write import write_file
from polyhead.models.config import PROBLEMS
from polyhead.nn.mode import evaluating
from polyhead.train.chatting import ChatCollator, cut, room_of
from polyhead.train.config import TrainConfig
from polyhead.train.data import Examples, Split
from polyhead.train.dialogue import Spoken, answered
from polyhead.train.examples import Labels, digest_of, part_of
from polyhead.train.objectives import CHUNK_LOGITS, IGNORE, LanguageBatch, Loss
from polyhead.train.ranks import Ranks
from polyhead.train.records import Table

Variant = Literal["dpo", "ipo", "length-normalised"]
_REFERENCE = "reference.safetensors"
_AT_ONCE = 8  # pairs that the reference is asked for


@dataclass(frozen=True, kw_only=True)
class PairBatch(LanguageBatch):
    """P better answers, then the P worse ones, each with its prompt `[2P, T]`.

    reference: log-probabilities of the answers `[2P]` as the run found the model; None before.
    """

    reference: Tensor | None = None

    def tokens(self) -> int:
        """Pairs."""
        return len(self.labels) // 2


@dataclass
class PairCollator:
    """Numbered pairs to a batch; `reference` `[N, 2]` is written once the model is known."""

    pad: ChatCollator
    reference: Tensor | None = None

    def __call__(self, rows: Sequence[tuple[int, Spoken, Spoken]]) -> PairBatch:
        plain = self.pad([(row[side],) for side in (1, 2) for row in rows])
        numbers = [row[0] for row in rows]
        reference = None if self.reference is None else self.reference[numbers].T.flatten()
        fields = {key: getattr(plain, key) for key in ("input_ids", "labels", "attention_mask")}
        return PairBatch(**fields, reference=reference)


@dataclass(frozen=True, eq=False)
class Compared(Examples):
    """Pairs that know what the model said of them before the run."""

    def refer(self, model: Any, folder: Path, split: str, ranks: Ranks, *, anew: bool) -> None:
        """Ask the model, as it is now, for every answer; a run that goes on reads what it asked.

        Errors: FileError where that is gone.
        """
        path = folder / f"{split}-{_REFERENCE}"
        collate: Any = self.collate
        if not anew:
            if not path.exists():
                raise FileError(f"{path} is missing, which the run began with: begin anew")
            collate.reference = open_checkpoint(path)["reference"].clone()
            return
        found = torch.zeros(len(self), 2)
        device = next(model.parameters()).device
        with torch.inference_mode(), evaluating(model):
            for first in range(0, len(self), _AT_ONCE):
                rows = self.rows[first : first + _AT_ONCE]
                answers = row_log_probs(model, collate(rows).to(device)).view(2, -1)
                found[first : first + len(rows)] = answers.T.cpu()
        if ranks.is_first:
            write_file(path, {"reference": found})
        collate.reference = found


def compared_answers(
    table: Table, tokenizer: Any, model: Any, config: TrainConfig, split: Split, *,
    raw: bool = False,
) -> Compared | None:  # fmt: skip
    """Rows of a `prompt` (and perhaps `system`), an answer `chosen` and one `rejected`.

    raw: without the tokenizer's chat template. Errors: DataError for a row without either answer,
    or whose answers do not begin within `config.context` tokens.
    """
    part = part_of(table, config, split)
    if part is None:
        return None
    room = room_of(model, config)
    rows: list[tuple[int, Spoken, Spoken]] = []
    for at in range(len(part)):
        row, where = part[at], f"{part.name}: row {part.number(at)}"
        sides = [answered(tokenizer, row, side, where, raw) for side in ("chosen", "rejected")]
        if np.array_equal(sides[0].ids, sides[1].ids):
            raise DataError(f"{where} has the same answer twice: there is nothing to prefer")
        kept = cut(sides, room)
        if len(kept) < 2:
            raise DataError(f"{where}: an answer begins after context = {room} tokens: raise it")
        rows.append((at, *kept))  # pyright: ignore[reportArgumentType]
    seal = digest_of(table, tokenizer, room, raw, split, tokenizer.chat_template)
    lengths = np.array([len(a.ids) + len(b.ids) for _, a, b in rows]) if split == "train" else None
    return Compared(rows, PairCollator(ChatCollator.of(tokenizer)), config.seed, seal, lengths)


def row_log_probs(model: Any, batch: LanguageBatch) -> Tensor:
    """Log-probability of each row's labels, summed `[B]`, in float32."""
    each, _ = label_log_probs(model, batch)
    rows = (batch.labels != IGNORE).nonzero()[:, 0]
    return each.new_zeros(len(batch.labels)).index_add(0, rows, each)


def label_log_probs(
    model: Any, batch: LanguageBatch, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label that counts `[n]`, in order, in float32; which those are."""
    hidden = model.backbone(batch.input_ids, attention_mask=batch.mask())
    counts = batch.labels != IGNORE
    hidden, labels = hidden[counts], batch.labels[counts]

    def of(rows: Tensor, targets: Tensor) -> Tensor:
        logits = model.head(rows).float() / temperature
        return -F.cross_entropy(logits, targets, reduction="none")

    rows = max(1, CHUNK_LOGITS // model.config.vocab_size)
    if len(labels) <= rows:
        return of(hidden, labels), counts
    # Logits of many tokens are made again for the gradient, a part at a time.
    parts = zip(hidden.split(rows), labels.split(rows), strict=True)
    found: list[Any] = [checkpoint(of, *part, use_reentrant=False) for part in parts]
    return torch.cat(found), counts


def preference_losses(
    log_probs: Tensor,
    reference: Tensor,
    lengths: Tensor,
    variant: Variant = "dpo",
    beta: float = 0.1,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The loss of each pair `[P]`, and by how much its better answer gained on the worse `[P]`.

    log_probs, reference: of the better answers, then of the worse, `[2P]`, as they are and as they
    were; lengths: the answers' tokens.
    dpo:               -log σ(β Δ), Rafailov et al. 2023, equation 7; with `smoothing` the share of
                       judgements that are taken for wrong (conservative DPO, Mitchell 2023).
    ipo:               (Δ - 1 / 2β)², Azar et al. 2023, equation 17, by gains a token.
    length-normalised: DPO of gains a token (Lambert et al. 2024, section 5.1).
    """
    gains = log_probs - reference
    if variant != "dpo":
        gains = gains / lengths.clamp_min(1)
    better, worse = gains.chunk(2)
    margin = better - worse
    if variant == "ipo":
        return (margin - 1 / (2 * beta)).square(), margin
    right, wrong = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
    return -(1 - smoothing) * right - smoothing * wrong, margin


def check_preference(variant: str, beta: float, smoothing: float) -> None:
    """ConfigError for settings of `preference_losses` that make no loss."""
    if variant not in get_args(Variant):
        raise ConfigError(f"variant is {variant!r}: choose one of {', '.join(get_args(Variant))}")
    if not 0 < beta < math.inf:
        raise ConfigError(f"beta is {beta}: it must be above 0")
    if not 0 <= smoothing < 0.5:
        raise ConfigError(f"smoothing is {smoothing}: a share of wrong judgements, below a half")
    if smoothing and variant == "ipo":
        raise ConfigError("ipo takes every judgement as it is: leave smoothing out")


def preference(
    model: Any,
    batch: PairBatch,
    variant: Variant = "dpo",
    beta: float = 0.1,
    smoothing: float = 0.0,
) -> Loss:
    """`preference_losses` of a batch. Its parts: the loss, how often the better answer gained more
    (`accuracy`), and by how much (`margin`)."""
    if batch.reference is None:
        raise ConfigError("dpo compares with the model as a run found it, which only fit can ask")
    lengths = (batch.labels != IGNORE).sum(1)
    log_probs = row_log_probs(model, batch)
    losses, margin = preference_losses(
        log_probs, batch.reference.to(log_probs), lengths, variant, beta, smoothing
    )
    parts = {"loss": losses, "accuracy": (margin > 0).float(), "margin": margin}
    sums = {name: part.detach().sum() for name, part in parts.items()}
    return Loss(losses.sum(), batch.tokens(), sums, (margin.detach(),))


def preference_figures(
    model: Any, dataset: Any, answers: Sequence[tuple[Tensor]]
) -> Mapping[str, float]:
    """How often the better answer gained more, or has the higher reward; and the mean margin."""
    margins = torch.cat([margin for (margin,) in answers]).float()
    return {"accuracy": float((margins > 0).float().mean()), "margin": float(margins.mean())}


@dataclass(frozen=True)
class RewardBatch:
    """P better conversations, then the P worse ones `[2P, T]`, whole."""

    input_ids: Tensor
    attention_mask: Tensor

    def tokens(self) -> int:
        """Pairs."""
        return len(self.input_ids) // 2

    def to(self, device: torch.device) -> Self:
        """The same batch on another device."""
        ids, mask = self.input_ids.to(device), self.attention_mask.to(device)
        return replace(self, input_ids=ids, attention_mask=mask)


@dataclass(frozen=True)
class RewardCollator:
    """Pairs of conversations, padded on the right."""

    pad_id: int

    def __call__(self, rows: Sequence[tuple[int, Spoken, Spoken]]) -> RewardBatch:
        sides = [torch.from_numpy(row[side].ids) for side in (1, 2) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad(sides, batch_first=True, padding_value=self.pad_id)
        mask = pad([torch.ones_like(side) for side in sides], batch_first=True)
        return RewardBatch(ids, mask)


def rewarded_answers(*given: Any, raw: bool = False) -> Examples | None:
    """The rows of `compared_answers`, for a model of rewards."""
    found = compared_answers(*given, raw=raw)
    if found is None:
        return None
    collate: Any = found.collate
    return Examples(
        found.rows, RewardCollator(collate.pad.pad_id), found.seed, found.digest, found.lengths
    )


def reward(model: Any, batch: RewardBatch) -> Loss:
    """-log σ(r(better) - r(worse)) (Bradley and Terry 1952; Ouyang et al. 2022, equation 1)."""
    scores = model(batch.input_ids, attention_mask=batch.attention_mask).float()[:, 0]
    better, worse = scores.chunk(2)
    losses = -F.logsigmoid(better - worse)
    margin = (better - worse).detach()
    parts = {"loss": losses, "accuracy": (margin > 0).float(), "margin": margin}
    sums = {name: part.detach().sum() for name, part in parts.items()}
    return Loss(losses.sum(), batch.tokens(), sums, (margin,))


def reward_labels(table: Table, problem: str | None = None) -> Labels:
    """One measure."""
    return Labels(("reward",), PROBLEMS[2])
