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
from polyhead.errors import DataError
from polyhead.generate.config import GenerationConfig
from polyhead.generate.generator import TextGenerator
from polyhead.generate.seq2seq import Seq2Seq, start_id
from polyhead.kernels.packing import pack
from polyhead.models.model import TaskModel
from polyhead.nn.head import Heads
from polyhead.tasks.perplexity import perplexity, scorable, target_perplexity
from polyhead.text.tokenizer import Tokenizer

_ROWS, _TOKENS, _PROMPT, _WRITTEN = 4, 128, 32, 32
_SOURCE_WORDS = 32
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
    if words is not None and _kind(model) in ("decoder", "encoder", "encoder-decoder"):
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
    with torch.inference_mode():
        answers = _answers(ready, given)
    written, surprise = None, None
    if words is not None and writes(model, words):
        written = _writing(ready, words, given)
        pairs = sources_and_targets(text)
        is_pair = _kind(model) == "encoder-decoder"
        surprise = (
            target_perplexity(ready, words, pairs) if is_pair else perplexity(ready, words, text)
        )
    said = None if surprise is None else float(surprise)
    return Measure(disk_bytes, memory, _reading(ready, given), written, said), answers


def writes(model: TaskModel, words: Tokenizer) -> bool:
    """Whether a model writes texts of its own: one whose perplexity is measured."""
    if model.head_kind != "lm" or _kind(model) not in ("decoder", "encoder-decoder"):
        return False
    is_pair = _kind(model) == "encoder-decoder"
    return not is_pair or (words.eos_id is not None and start_id(model, words) is not None)


def check_text(model: TaskModel, words: Tokenizer | None, text: str) -> None:
    """DataError for a text that says nothing of a model's perplexity, before it is measured."""
    if words is None or not writes(model, words):
        return
    if _kind(model) == "decoder":
        scorable(words, text)
    else:
        sources_and_targets(text)


def sources_and_targets(text: str) -> list[tuple[str, str]]:
    """A text's lines of `source<TAB>target`; of one that has no such, of each 64 words the first 32
    as source and what follows as target.

    Errors: DataError for a text of fewer than two words.
    """
    rows = [line.split("\t") for line in text.splitlines() if line.strip()]
    # The last may be cut.
    if all(len(row) == 2 for row in rows[:-1]) and any(len(row) == 2 for row in rows):
        return [(row[0], row[1]) for row in rows if len(row) == 2]
    words = text.split()
    half = min(_SOURCE_WORDS, len(words) // 2)
    if half < 1:
        raise DataError(
            f"a text of {len(text)} characters has no target to score; give a longer one"
        )
    return [
        (" ".join(words[at : at + half]), " ".join(words[at + half : at + 2 * half]))
        for at in range(0, len(words) - half, 2 * half)
    ]


def _kind(model: TaskModel) -> str:
    return getattr(model.config, "kind", "decoder")


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
    generator = (Seq2Seq if _kind(model) == "encoder-decoder" else TextGenerator)(model, words)
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
