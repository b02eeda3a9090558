"""Polyhead's models for EleutherAI's lm-evaluation-harness: `--model polyhead`.

`python -m polyhead.tasks.lm_eval run --model polyhead --model_args model=DIR --tasks …` is
lm-eval's own command line with this model known to it.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from polyhead.adapt.load import load
from polyhead.adapt.load import tokenizer as load_tokenizer
from polyhead.errors import ConfigError, DataError, PolyheadError
from polyhead.generate.prompts import encode_prompt
from polyhead.models.model import TaskModel
from polyhead.tasks.evaluate.scorer import MOST_TOKENS, Request, Scored
from polyhead.tasks.evaluate.task import Worker
from polyhead.tasks.evaluate.writing import room_for, written
from polyhead.text.tokenizer import Tokenizer

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ConfigError(
        f"tasks of lm-eval need the package ({error}); pip install 'polyhead[eval]'"
    ) from None

Progress = Callable[[int, int], None]

_MOST_NEW_TOKENS = 256  # where a task says nothing, as for lm-eval's own models
# What a task may say of sampling, under the names that both have.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@register_model("polyhead")
class PolyheadLM(TemplateLM):
    """A model as lm-eval asks it: log-likelihoods and texts.

    model: a model, with its `tokenizer`, or where one lies, as for `ph.load`. batch_size: rows
    that write together; None or "auto": as many as `most_tokens` of a batch allow.
    """

    def __init__(
        self,
        model: TaskModel | str,
        tokenizer: Tokenizer | None = None,
        *,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        most_tokens: int = MOST_TOKENS,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        self._name = model if isinstance(model, str) else model.config.model_type
        if isinstance(model, str):
            tokenizer = tokenizer or load_tokenizer(model)
            model = load(model, dtype=dtype).to(_device(device))
        if tokenizer is None:
            raise ConfigError("give the tokenizer that belongs to the model")
        self.model, self.tokenizer = model, tokenizer
        self.worker = Worker(model, tokenizer, int(most_tokens))
        self.backend = "seq2seq" if self.worker.scorer.is_encoder_decoder else "causal"
        sized = batch_size is not None and not str(batch_size).startswith("auto")
        self._batch_size = int(batch_size) if sized else None
        self._progress = progress
        self._device = model.device

    @property
    def eot_token_id(self) -> int:
        return self.prefix_token_id if self.tokenizer.eos_id is None else self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        if self._first is None:
            raise DataError("the tokenizer has neither a bos nor an eos token to begin a text with")
        return self._first

    @property
    def _first(self) -> int | None:
        return self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """Tokens that the model takes; 2048 where nothing bounds them, as lm-eval has it."""
        return self.model.config.max_tokens or 2048

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        if add_special_tokens is None:
            # What a chat template wrote has its special tokens already.
            first = [] if self._first is None else [self._first]
            begun = self.tokenizer.decode(first, skip_special_tokens=False)
            add_special_tokens = not begun or not string.startswith(begun)
        if add_special_tokens and string and self.backend == "causal":
            return encode_prompt(string, self.tokenizer, self._vocab_size)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    @property
    def _vocab_size(self) -> int:
        return getattr(self.model.config, "vocab_size")  # noqa: B009

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        asked = [Request(context, continuation) for _, context, continuation in requests]
        found: list[tuple[float, bool]] = []
        for (key, _, _), one in zip(requests, self._scored(asked), strict=True):
            found.append((one.logprob, one.is_greedy))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, found[-1])
        return found

    def _scored(self, asked: Sequence[Request]) -> Iterator[Scored]:
        """One answer a request, in their order, some at a time."""
        done = 0
        for chunk in self.worker.chunks(
            asked, lambda one: len(one.context) + len(one.continuation)
        ):
            yield from self.worker.scorer.logprobs(chunk)
            done += len(chunk)
            self._tell(done, len(asked))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        texts = [request.args[0] for request in requests]
        windows = [
            [
                Request(*make_disjoint_window(pair))
                for pair in get_rolling_token_windows(
                    self.tok_encode(text), self.prefix_token_id, self.max_length, 1
                )
            ]
            for text in texts
        ]
        scored = self._scored([one for some in windows for one in some])
        found: list[float] = []
        for text, some in zip(texts, windows, strict=True):
            found.append(sum(one.logprob for one in islice(scored, len(some))))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        texts = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(place)
        done = 0
        for places in alike.values():
            asked = requests[places[0]].args[1]
            rows = [self._room(requests[place].args[0], asked) for place in places]
            order = sorted(range(len(places)), key=lambda i: -len(rows[i]))
            at_once = self._batch_size or max(1, self.worker.most_tokens // len(rows[order[0]]))
            for start in range(0, len(order), at_once):
                some = order[start : start + at_once]
                for i, text in zip(some, self._texts([rows[i] for i in some], asked), strict=True):
                    texts[places[i]] = text
                    key = requests[places[i]].args
                    self.cache_hook.add_partial("generate_until", key, text)
                done += len(some)
                self._tell(done, len(requests))
        return texts

    def _room(self, context: str, asked: Any) -> list[int]:
        """The end of a context that leaves room for an answer."""
        ids = self.tok_encode(context) or [self.prefix_token_id]
        most = room_for(self.model, self._settings(asked)["max_gen_toks"])
        return ids if most is None else ids[-most:]

    def _texts(self, rows: list[list[int]], asked: Any) -> list[str]:
        settings = self._settings(asked)
        until = [stop for stop in settings["until"] if stop]
        sampling = {name: settings[name] for name in _SAMPLING if name in settings}
        return written(self.worker, rows, settings["max_gen_toks"], until, **sampling)

    def _settings(self, asked: Any) -> dict[str, Any]:
        found: dict[str, Any] = dict(normalize_gen_kwargs(asked, _MOST_NEW_TOKENS))
        until = found.get("until") or []
        found["until"] = [until] if isinstance(until, str) else until
        if found.get("do_sample") and not found.get("temperature"):
            found["temperature"] = 1.0
        return found

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                chat_history, add_generation_prompt=add_generation_prompt
            )
        except DataError:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            return self.apply_chat_template(rest, add_generation_prompt)
        if add_generation_prompt:
            return text
        # The last message is to be continued, so nothing may end it.
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def _tell(self, done: int, every: int) -> None:
        if self._progress is not None:
            self._progress(done, every)


def _device(name: str | None) -> str:
    """A device that is there: lm-eval's command line asks for a GPU whether there is one or not."""
    there = torch.cuda.is_available()
    if name is None or (name.startswith("cuda") and not there):
        return "cuda" if there else "cpu"
    return name


def main() -> int:
    """lm-eval's command line; what is wrong with a model or its files is one line, and code 2."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except PolyheadError as error:
        print(f"polyhead: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
