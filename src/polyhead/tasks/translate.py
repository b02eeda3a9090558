"""Texts rewritten by an encoder-decoder: translations and summaries."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

from polyhead.generate.config import GenerationConfig
from polyhead.generate.search import Hypothesis
from polyhead.generate.seq2seq import Seq2Seq, recommended
from polyhead.models.model import TaskModel
from polyhead.tasks.batching import Progress, longest
from polyhead.text.tokenizer import Tokenizer, check_text


class Rewriting(str):
    """A text that a model wrote, with its ids and its score.

    score: log-probability / length ** length_penalty; 0 where there were no beams to compare.
    is_cut: whether its source was longer than the model, so that the end was not read.
    """

    token_ids: tuple[int, ...]
    score: float
    is_cut: bool

    def __new__(cls, text: str, answer: Hypothesis, is_cut: bool = False) -> Self:
        self = super().__new__(cls, text)
        self.token_ids, self.score = answer
        self.is_cut = is_cut
        return self


class Translator:
    """Texts to translations: `Translator(model, tokenizer)(["Good morning."], num_beams=4)`.

    prefix: put before every text, as T5 wants it ("translate English to German: "). What the
    checkpoint says of generating holds where a call does not, and of a T5's task, too.
    Errors: ConfigError for a model that is no encoder-decoder with a language head.
    """

    task = "translation"
    default_prefix = ""

    def __init__(
        self, model: TaskModel, tokenizer: Tokenizer, *, prefix: str | None = None
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.writer = Seq2Seq(model, tokenizer)
        self.said = self._said(prefix)
        stated = self.said.get("prefix", self.default_prefix)
        self.prefix = stated if prefix is None else prefix

    def _said(self, prefix: str | None) -> Mapping[str, Any]:
        """What the checkpoint recommends: for this task, and, of several, for this prefix."""
        tasks: Mapping[str, Mapping[str, Any]] = (
            self.model.config.source.get("task_specific_params") or {}
        )
        fitting = [params for name, params in tasks.items() if name.startswith(self.task)]
        if prefix is not None:
            fitting = [params for params in fitting if params.get("prefix") == prefix]
        own = fitting[0] if len(fitting) == 1 else {}
        return {"num_beams": 4, **recommended(self.model), **own}

    def __call__(
        self,
        texts: str | Sequence[str],
        *,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> list[Rewriting]:
        """One text for each, in their order; a blank one stays blank.

        num_beams, max_new_tokens: None is what the checkpoint says, or 4 and 256. settings: further
        fields of `GenerationConfig`. Texts longer than the model lose their end: `is_cut`.
        """
        if num_beams is not None:
            settings["num_beams"] = num_beams
        if max_new_tokens is not None:
            settings["max_new_tokens"] = max_new_tokens
        config = GenerationConfig.from_hf(self.said, encoder_decoder=True, **settings)
        wanted = [texts] if isinstance(texts, str) else list(texts)
        for number, text in enumerate(wanted):
            check_text(text, f"text {number}")
        found = [Rewriting("", Hypothesis(()))] * len(wanted)
        full = [number for number, text in enumerate(wanted) if text.strip()]
        if full:
            whole = [self.tokenizer.encode(self.prefix + wanted[number]) for number in full]
            sources = [self._cut(ids) for ids in whole]
            answers = self.writer.generate(sources, config, progress=progress)
            for number, ids, source, (best, *_) in zip(full, whole, sources, answers, strict=True):
                text = self.tokenizer.decode(best.ids).strip()
                found[number] = Rewriting(text, best, is_cut=len(source) < len(ids))
        return found

    def _cut(self, ids: list[int]) -> list[int]:
        """As much of a source as the model takes."""
        most = longest(self.model)
        if most is None or len(ids) <= most:
            return ids
        # The token that ends a source, where there is one, stays its last.
        return [*ids[: most - 1], ids[-1]]


class Summarizer(Translator):
    """Texts to summaries: `Summarizer(model, tokenizer)([article])`, as `Translator` does it.

    prefix: None is what the checkpoint says for summaries, or "summarize: " for a T5.
    """

    task = "summarization"

    def __init__(
        self, model: TaskModel, tokenizer: Tokenizer, *, prefix: str | None = None
    ) -> None:
        self.default_prefix = "summarize: " if model.config.model_type == "t5" else ""
        super().__init__(model, tokenizer, prefix=prefix)
