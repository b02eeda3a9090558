"""What `polyhead compress` measures of a model before and after."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.cli.placing import random_inputs
from polyhead.compress.quantize import weight_bytes
from polyhead.generate.config import GenerationConfig
from polyhead.generate.generator import TextGenerator
from polyhead.kernels.packing import pack
from polyhead.models.model import TaskModel
from polyhead.nn.head import Heads
from polyhead.tasks.perplexity import perplexity
from polyhead.text.tokenizer import Tokenizer

_ROWS, _TOKENS, _PROMPT, _WRITTEN = 4, 128, 32, 32
_LONG_ENOUGH_S = 1.0


@dataclass(frozen=True)
class Measure:
    """What a model takes and gives; None is what does not apply.

    read_per_second: tokens, or images of a model that reads no text.
    """

    disk_bytes: int
    memory_bytes: int
    read_per_second: float
    written_per_second: float | None
    perplexity: float | None


@dataclass(frozen=True)
class Cost:
    """How far two models' answers to the same inputs lie apart.

    largest_change: of a logit, or a state. cosine: the mean of theirs. same_choice: the share of
    places where both answers are largest at the same class.
    """

    largest_change: float
    cosine: float
    same_choice: float


def inputs_of(model: TaskModel, words: Tokenizer | None, text: str) -> dict[str, Tensor]:
    """Arguments to compare answers to: of the text where the model reads that alone."""
    given = random_inputs(model.config)
    kind = getattr(model.config, "kind", "decoder")
    if words is not None and kind in ("decoder", "encoder", "encoder-decoder"):
        ids = words.encode(text, add_special_tokens=False)
        length = min(_TOKENS, model.config.max_tokens or _TOKENS, max(1, len(ids) // _ROWS))
        if len(ids) >= length * _ROWS:
            given["input_ids"] = torch.tensor(ids[: length * _ROWS]).view(_ROWS, length)
    return {name: tensor.to(model.device) for name, tensor in given.items()}


def measure(
    model: TaskModel,
    words: Tokenizer | None,
    text: str,
    given: Mapping[str, Tensor],
    disk_bytes: int,
) -> tuple[Measure, Tensor]:
    """A model as it runs here, and its answers `[..., C]` in float32."""
    memory = weight_bytes(model)
    ready = pack(model) if model.device.type == "cpu" else model
    writes = words is not None and getattr(model.config, "kind", "decoder") == "decoder"
    writes = writes and model.head_kind == "lm"
    with torch.inference_mode():
        answers = _answers(ready, given)
    found = Measure(
        disk_bytes,
        memory,
        _reading(ready, given),
        _writing(ready, words, given) if writes and words is not None else None,
        float(perplexity(ready, words, text)) if writes and words is not None else None,
    )
    return found, answers


def cost(before: Tensor, after: Tensor) -> Cost:
    """How far answers `[..., C]` lie apart."""
    same = before.argmax(-1) == after.argmax(-1)
    return Cost(
        float((before - after).abs().max()),
        float(F.cosine_similarity(before, after, dim=-1).mean()),
        float(same.float().mean()),
    )


def _answers(model: TaskModel, given: Mapping[str, Tensor]) -> Tensor:
    """What the model's first head answers, or its states."""
    head = next(iter(model.head)) if isinstance(model.head, Heads) else None
    return model(**given, head=head).float().cpu()


def _reading(model: TaskModel, given: Mapping[str, Tensor]) -> float:
    """Tokens a second, all rows at once."""
    some: Any = given.get("input_ids")
    count = len(given["pixel_values"]) if some is None else some.numel()
    with torch.inference_mode():
        return count / _seconds(lambda: _answers(model, given))


def _writing(model: TaskModel, words: Tokenizer, given: Mapping[str, Tensor]) -> float:
    """Tokens a second of one text, its first included."""
    length: int = min(_PROMPT, given["input_ids"].shape[1])
    room = (model.config.max_tokens or 1 << 20) - length
    count = max(1, min(_WRITTEN, room))
    config = GenerationConfig(max_new_tokens=count, min_new_tokens=count, temperature=0)
    prompt = given["input_ids"][0, :length].tolist()
    generator = TextGenerator(model, words)
    return count / _seconds(lambda: generator.generate([prompt], config))


def _seconds(work: Any) -> float:
    """The shortest of a few runs, after one to warm up."""
    work()
    began, best = time.perf_counter(), float("inf")
    while time.perf_counter() - began < _LONG_ENOUGH_S:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
