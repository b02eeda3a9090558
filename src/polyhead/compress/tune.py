"""Steps that learn: codes stay, and what they stand for moves until a model answers as it did.

The last phase of EfficientQAT (Chen et al. 2024, section 3.3), by the answers of the model as it
was (Hinton et al. 2015) instead of a text's next tokens.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.compress.calibrate import Batch, answered
from polyhead.compress.formats import HALF_MOST, Int4
from polyhead.compress.layers import language_heads
from polyhead.models.model import TaskModel

_RATE, _LAST = 1e-3, 0.05  # of a step's own size at a time, and the share of it at the end
_WARM = 4  # portions until the rate is whole
_BETAS = 0.9, 0.99
_TOKENS = 512  # of a portion
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

    def write(self, packed: Int4) -> None:
        """Leave them in a matrix of the same codes."""
        scales, least = self.now()
        packed.scales = scales.clamp(0, HALF_MOST).half()
        packed.least = least.clamp(-HALF_MOST, HALF_MOST).half()


def tune(
    model: TaskModel,
    whole: TaskModel,
    batches: Sequence[Batch],
    passes: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Move the steps of a model's `int4` matrices until it answers to `batches` as `whole` does.

    By the logits of a language head (Kullback-Leibler divergence) or else by the states, with Adam
    and a rate that falls by a cosine, 512 tokens at a time. Both compute in bfloat16 meanwhile
    where the machine does so. A model that is interrupted is as it was.
    """
    with torch.inference_mode(False), torch.enable_grad():
        steps = _tuned(model, whole, list(_portions(batches)), passes, progress)
    with torch.no_grad():
        matrices = (part for part in model.backbone.modules() if isinstance(part, Int4))
        for packed, own in zip(matrices, steps, strict=True):
            own.write(packed)


def _tuned(
    model: TaskModel,
    whole: TaskModel,
    portions: Sequence[Batch],
    passes: int,
    progress: Callable[[int, int], None] | None,
) -> list[_Steps]:
    student, teacher = _working_copy(model), _working_copy(whole)
    steps = [_Steps(part) for part in student.backbone.modules() if isinstance(part, Int4)]
    moving = [moved for own in steps for moved in (own.wider, own.higher)]
    if not moving:
        return []
    optimizer = torch.optim.Adam(moving, betas=_BETAS)
    draw = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(len(portions), generator=draw) for _ in range(passes)])
    for number, at in enumerate(order.tolist()):
        with torch.no_grad():
            wanted = _answers(teacher, portions[at])
        for own in steps:
            own.read()
        apart = _apart(_answers(student, portions[at]), wanted, bool(language_heads(whole)))
        # Of what is no number nothing is to be learned.
        if bool(apart.isfinite()):
            optimizer.zero_grad()
            apart.backward()
            optimizer.param_groups[0]["lr"] = _rate(number, len(order))
            optimizer.step()
        if progress is not None:
            progress(number + 1, len(order))
    return steps


def _portions(batches: Sequence[Batch]) -> Iterator[Batch]:
    """Batches by few rows at a time, where they are of texts: more often a little."""
    for batch in batches:
        tensors = [batch] if isinstance(batch, Tensor) else list(batch.values())
        lengths = [x.shape[1] for x in tensors if x.dim() == 2]
        if not lengths or len({len(x) for x in tensors}) > 1:
            yield batch
            continue
        rows = max(1, _TOKENS // max(1, *lengths))
        for at in range(0, len(tensors[0]), rows):
            some = slice(at, at + rows)
            is_one = isinstance(batch, Tensor)
            yield batch[some] if is_one else {name: x[some] for name, x in batch.items()}


def _rate(number: int, count: int) -> float:
    fall = (1 + math.cos(math.pi * number / count)) / 2
    return _RATE * min(1, (number + 1) / _WARM) * (_LAST + (1 - _LAST) * fall)


def _working_copy(model: TaskModel) -> TaskModel:
    found = copy.deepcopy(model).eval().requires_grad_(False)
    is_half = model.device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return found.to(torch.bfloat16) if is_half else found


def _answers(model: TaskModel, batch: Batch) -> Tensor:
    """Logits of a language head `[N, V]`, or states `[N, E]`, in float32, of what is no filling."""
    states = answered(model, batch)
    found = (model.answer(states) if language_heads(model) else states).float()
    masks = ("decoder_attention_mask", "attention_mask")
    for mask in () if isinstance(batch, Tensor) else map(batch.get, masks):
        if mask is not None and mask.shape == found.shape[:2]:
            return found[mask.to(found.device, torch.bool)]
    return found.flatten(0, -2)


def _apart(found: Tensor, wanted: Tensor, are_logits: bool) -> Tensor:
    """How far answers `[N, C]` lie apart: nats a row, or a share of their mean square."""
    if not are_logits:
        return F.mse_loss(found, wanted) / wanted.square().mean().clamp_min(1e-30)
    rows = (part.log_softmax(-1) for part in (found, wanted))
    return F.kl_div(*rows, reduction="batchmean", log_target=True)
