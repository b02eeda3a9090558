"""A model that reads a text and writes another: translations, summaries and answers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from polyhead.errors import ConfigError
from polyhead.explain.alignment import alignment, hard_alignment
from polyhead.generate.config import GenerationConfig
from polyhead.generate.prompts import check_ids
from polyhead.models.model import TaskModel
from polyhead.serve.explaining import explained
from polyhead.serve.line import Line, Work
from polyhead.tasks.translate import Rewriting as Rewritten
from polyhead.tasks.translate import Translator
from polyhead.text.pieces import pieces
from polyhead.text.tokenizer import Tokenizer


class Rewriting(Line):
    """An encoder-decoder, served by a name."""

    is_not = "this model rewrites texts: ask it for /translate or /v1/completions"

    def __init__(self, model: TaskModel, tokenizer: Tokenizer, flush: Callable[[], None]) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.translator = Translator(model, tokenizer)
        super().__init__(flush)

    def about(self) -> dict[str, Any]:
        """Its kind, and the tokens that it takes."""
        return {
            "kind": "encoder-decoder", "head": self.model.head_kind, "max_tokens": self._longest,
            "parameters": self.model.num_parameters(),
        }  # fmt: skip

    def works(self) -> Mapping[str, Work]:
        """What it does, by name."""
        return {
            "translate": self._translate, "write": self._write,
            "explain": self._explain, "tokenize": self._tokenize, "detokenize": self._detokenize,
        }  # fmt: skip

    @property
    def _longest(self) -> int | None:
        return self.model.config.max_tokens

    def _translate(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """given: texts; prefix or None; settings; alignment: whether to say what came of what."""
        translator = self.translator
        if given["prefix"] is not None:
            translator = Translator(self.model, self.tokenizer, prefix=given["prefix"])
        found = translator(given["texts"], **given["settings"])
        told = [
            {"text": str(one), "score": one.score, "cut": one.is_cut}
            | (self._aligned(translator.prefix + text, one) if given["alignment"] else {})
            for text, one in zip(given["texts"], found, strict=True)
        ]
        lengths = [len(ids) for ids in self.tokenizer.encode_batch(list(given["texts"]))]
        written = sum(len(one.token_ids) for one in found)
        return {"data": told, "tokens": sum(lengths), "written": written}

    def _aligned(self, source: str, found: Rewritten) -> dict[str, Any]:
        """The mean of all heads of cross-attention, a row a written token, and its links."""
        start = self.translator.writer.start
        if not found.token_ids or start is None:
            return {"alignment": None}
        device = self.model.device
        read = torch.tensor([self.tokenizer.encode(source)[: self._longest]], device=device)
        written = [start, *found.token_ids[:-1]]
        weights = alignment(self.model, read, torch.tensor([written], device=device))[0].cpu()
        return {
            "alignment": {
                "source": pieces(self.tokenizer, read[0].tolist()),
                "target": pieces(self.tokenizer, list(found.token_ids)),
                "weights": [[round(each, 4) for each in row] for row in weights.tolist()],
                "links": sorted(hard_alignment(weights)),
            }
        }

    def _write(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Answers to prompts, `n` to each."""
        if "messages" in given:
            raise ConfigError("this model does not chat; send a prompt to /v1/completions")
        sources = [self._source(prompt) for prompt in given["prompts"]]
        said = {name: value for name, value in given["settings"].items() if value is not None}
        if said.pop("logprobs", None) is not None:
            raise ConfigError("logprobs are told of decoders alone; leave them out")
        if said.get("temperature"):
            said.setdefault("num_beams", 1)
        config = GenerationConfig.from_hf(
            self.translator.said, encoder_decoder=True, num_return_sequences=given["n"], **said
        )
        answers = self.translator.writer.generate(sources, config)
        choices = [
            self._choice(answer.ids, config) for some in answers for answer in some[: given["n"]]
        ]
        counts = [len(source) for source in sources for _ in range(given["n"])]
        return {
            "choices": choices, "prompt_tokens": counts, "num_prompts": len(sources), "found": 0
        }  # fmt: skip

    def _choice(self, ids: Sequence[int], config: GenerationConfig) -> dict[str, Any]:
        ended = bool(ids) and ids[-1] in self.translator.writer.ends
        reason = "stop" if ended or len(ids) < config.max_new_tokens else "length"
        text = self.tokenizer.decode(ids).strip()
        return {"text": text, "finish_reason": reason, "tokens": len(ids), "logprobs": None}

    def _source(self, prompt: str | Sequence[int]) -> list[int]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        check_ids(ids, getattr(self.model.config, "vocab_size"))  # noqa: B009
        if self._longest is not None and len(ids) > self._longest:
            raise ConfigError(
                f"the prompt has {len(ids)} tokens and the model takes {self._longest}"
            )
        return ids

    def _explain(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        return explained(self.model, self.tokenizer, None, given)

    def _tokenize(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        if "messages" in given:
            raise ConfigError("this model does not chat; send a prompt")
        ids = self.tokenizer.encode(given["prompts"][0])
        return {"tokens": ids, "count": len(ids), "max_model_len": self._longest}

    def _detokenize(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        check_ids(given["tokens"], getattr(self.model.config, "vocab_size"))  # noqa: B009
        return {"prompt": self.tokenizer.decode(given["tokens"], skip_special_tokens=False)}
