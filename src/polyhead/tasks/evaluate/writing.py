"""Answers to prompts of ids, greedy or as asked, from decoders and encoder-decoders alike."""

from collections.abc import Sequence
from typing import Any

from polyhead.generate.config import GenerationConfig
from polyhead.generate.generator import TextGenerator
from polyhead.generate.seq2seq import Seq2Seq
from polyhead.models.model import TaskModel
from polyhead.tasks.evaluate.task import Worker


def written(
    worker: Worker,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Sequence[str] = (),
    **sampling: Any,
) -> list[str]:
    """The text after each prompt, up to the first of the strings that end it.

    sampling: fields of `GenerationConfig`; none: the most likely token each time.
    """
    sampling.setdefault("temperature", 0.0)
    longest = max(map(len, prompts)) + max_new_tokens
    if getattr(worker.model.config, "kind", "decoder") != "encoder-decoder":
        config = GenerationConfig(max_new_tokens=max_new_tokens, stop=tuple(stop), **sampling)
        generator = TextGenerator(worker.model, worker.tokenizer)
        rows = [list(prompt) for prompt in prompts]
        at_once = max(1, worker.most_tokens // longest)
        return [str(text) for text in generator.generate(rows, config, batch_size=at_once)]
    writer = Seq2Seq(worker.model, worker.tokenizer)
    search = writer.settings(max_new_tokens=max_new_tokens, num_beams=1, **sampling)
    found = writer.generate(prompts, search, tokens_at_once=worker.most_tokens)
    texts = [worker.tokenizer.decode(answers[0].ids) for answers in found]
    return [_until(text, stop) for text in texts]


def room_for(model: TaskModel, max_new_tokens: int) -> int | None:
    """Tokens of a prompt that leave room for an answer; None: of any length.

    Where an answer alone would fill the model, a half is left for it.
    """
    most = model.config.max_tokens
    if most is None or getattr(model.config, "kind", "decoder") == "encoder-decoder":
        return most
    return max(most - max_new_tokens, most // 2, 1)


def _until(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of some strings in it."""
    found = [text.find(one) for one in stop if one in text]
    return text[: min(found)] if found else text
