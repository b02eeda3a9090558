"""Steps that learn: codes stay, and what they stand for moves until a model answers as it did.

The last phase of EfficientQAT (Chen et al. 2024, section 3.3), by the answers of the model as it
was (Hinton et al. 2015) instead of a text's next tokens.
"""

import copy
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.compress.calibrate import Batch, answered
from polyhead.compress.formats import Int4
from polyhead.compress.layers import language_heads
from polyhead.models.model import TaskModel

_RATE, _LAST = 2e-3, 0.05  # of a step's own size at a time, and the share of it at the end
_WARM = 4  # batches until the rate is whole
_BETAS = 0.9, 0.99
_MIDDLE = 7.5  # of the codes


class _Steps:
    """A matrix's scales and least values, and how far they have moved, as shares of a scale.

    A group is stretched about its middle, so that its mean stays where it is.
    """

    def __init__(self, packed: Int4) -> None:
        self.packed = packed
        self.scales, self.least = packed.scales.float(), packed.least.float()
        self.wider = torch.zeros_like(self.scales, requires_grad=True)
        self.higher = torch.zeros_like(self.scales, requires_grad=True)

    def now(self) -> tuple[Tensor, Tensor]:
        """Scales and least values `[R, groups]` each."""
        moved = self.higher - _MIDDLE * self.wider
        return self.scales * (1 + self.wider), self.least + self.scales * moved

    def read(self) -> None:
        """Let products read them as they are now."""
        self.packed.learning = self.packed.scales, self.packed.least = self.now()


def tune(
    model: TaskModel,
    whole: TaskModel,
    batches: Sequence[Batch],
    passes: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Move the steps of a model's `int4` matrices until it answers to `batches` as `whole` does.

    By the logits of a language head (Kullback-Leibler divergence) or else by the states, with Adam
    and a rate that falls by a cosine, a step for each batch. Both compute in bfloat16 meanwhile
    where the machine does so.
    """
    student, teacher = _working_copy(model), _working_copy(whole)
    mine = [part for part in model.backbone.modules() if isinstance(part, Int4)]
    theirs = [part for part in student.backbone.modules() if isinstance(part, Int4)]
    steps = [_Steps(packed) for packed in theirs]
    moving = [moved for own in steps for moved in (own.wider, own.higher)]
    if not moving:
        return
    optimizer = torch.optim.Adam(moving, betas=_BETAS)
    draw = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(len(batches), generator=draw) for _ in range(passes)])
    for number, at in enumerate(order.tolist()):
        with torch.no_grad():
            wanted = _answers(teacher, batches[at])
        for own in steps:
            own.read()
        optimizer.zero_grad()
        _apart(_answers(student, batches[at]), wanted, bool(language_heads(whole))).backward()
        fall = (1 + math.cos(math.pi * number / len(order))) / 2
        rate = _RATE * min(1, (number + 1) / _WARM) * (_LAST + (1 - _LAST) * fall)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        if progress is not None:
            progress(number + 1, len(order))
    with torch.no_grad():
        for packed, own in zip(mine, steps, strict=True):
            packed.scales, packed.least = (part.half() for part in own.now())


def _working_copy(model: TaskModel) -> TaskModel:
    found = copy.deepcopy(model).eval().requires_grad_(False)
    is_half = model.device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return found.to(torch.bfloat16) if is_half else found


def _answers(model: TaskModel, batch: Batch) -> Tensor:
    """Logits of a language head, or states, in float32."""
    states = answered(model, batch)
    return (model.answer(states) if language_heads(model) else states).float()


def _apart(found: Tensor, wanted: Tensor, are_logits: bool) -> Tensor:
    """How far answers `[..., C]` lie apart: nats a row, or a share of their mean square."""
    if not are_logits:
        return F.mse_loss(found, wanted) / wanted.square().mean().clamp_min(1e-30)
    rows = (part.flatten(0, -2).log_softmax(-1) for part in (found, wanted))
    return F.kl_div(*rows, reduction="batchmean", log_target=True)
