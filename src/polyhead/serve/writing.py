"""A model that writes: texts that go on from prompts and conversations, many side by side."""

from collections.abc import Mapping
from functools import cached_property, partial
from time import monotonic
from typing import Any

from polyhead.errors import ConfigError
from polyhead.generate.config import GenerationConfig
from polyhead.generate.engine import Engine
from polyhead.generate.engine_config import EngineConfig
from polyhead.generate.front import EngineThread, Handle
from polyhead.generate.prompts import encode_prompt
from polyhead.generate.request import Request
from polyhead.generate.sampling.seeds import row_seeds
from polyhead.generate.sampling.vocabulary import token_bytes
from polyhead.images import Processor
from polyhead.models.model import TaskModel
from polyhead.serve.choices import Calls, Choices, Say
from polyhead.serve.explaining import Explaining
from polyhead.serve.messages import Done, Sender, Stats
from polyhead.serve.prompts import Prompts
from polyhead.tasks.fit import kind_of
from polyhead.text.tokenizer import Tokenizer

_OFTEN_S = 0.1


class Writing:
    """A decoder and its engine, served by a name; what is said goes out once a step."""

    def __init__(
        self,
        name: str,
        model: TaskModel,
        tokenizer: Tokenizer,
        config: EngineConfig,
        say: Sender,
        processor: Processor | None = None,
    ) -> None:
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.prompts = Prompts(model, tokenizer, processor)
        self._say, self._told = say, 0.0
        engine = Engine(model, tokenizer, config)
        engine.prepare()
        self.front = EngineThread(engine, self._after_step)
        self._at_work: dict[int, list[Handle]] = {}

    def about(self) -> dict[str, Any]:
        """Its kind, and the tokens that it takes."""
        engine = self.front.engine
        return {
            "kind": kind_of(self.model), "chats": self.tokenizer.chat_template is not None,
            "max_tokens": engine.memory.longest(0, 1), "parameters": self.model.num_parameters(),
            "cache_bytes": engine.memory.num_bytes,
        }  # fmt: skip

    def do(self, number: int, what: str, given: Mapping[str, Any], say: Say) -> None:
        """One of the works below. Errors: ConfigError for one that is none."""
        if what == "explain":
            self._aside.do(number, what, given, say)
            return
        works = {"write": self._write, "tokenize": self._tokenize, "detokenize": self._detokenize}
        if what not in works:
            raise ConfigError("this model writes and does not read; name one that does")
        works[what](number, given, say)

    def _write(self, number: int, given: Mapping[str, Any], say: Say) -> None:
        """Go on from prompts, or from a conversation: `n` choices for each.

        given: prompts, or messages and tools; n; settings of GenerationConfig; stream.
        """
        settings, calls = dict(given["settings"]), self._calls(given)
        if musts := given.get("musts"):
            settings["json_schema"] = self.prompts.calls(musts).schema(musts)
        prompts, pixels = self.prompts(given)
        config = self._config(settings)
        choices = Choices(
            number, len(prompts), given["n"], self.tokenizer, say, calls, self._bytes_of
        )
        handles: list[Handle] = []
        try:
            for ids in prompts:
                for seed in row_seeds([config] * given["n"], [ids] * given["n"], True):
                    listener = choices.listener(len(handles)) if given["stream"] else None
                    handle = self.front.submit(
                        ids, config, seeds=[seed], on_text=listener, pixels=pixels
                    )
                    choices.requests[len(handles)].set_result(handle.request)
                    handles.append(handle)
        except Exception:
            for handle in handles:
                handle.cancel()
            raise
        self._at_work[number] = handles
        for choice, handle in enumerate(handles):
            handle.then(partial(self._end, number, choices, choice))

    def _calls(self, given: Mapping[str, Any]) -> Calls | None:
        """What finds calls of tools in a text, where there are tools."""
        tools = given.get("tools")
        if not tools:
            return None
        return Calls(self.prompts.calls(tools), tools, given["musts"], given["calls"])

    def _tokenize(self, number: int, given: Mapping[str, Any], say: Say) -> None:
        """The ids of a text or of a conversation."""
        (ids,), _ = self.prompts(given)
        say(
            Done(
                number,
                {"tokens": ids, "count": len(ids), "max_model_len": self.about()["max_tokens"]},
            )
        )

    def _detokenize(self, number: int, given: Mapping[str, Any], say: Say) -> None:
        """The text of ids."""
        encode_prompt(given["tokens"], None, self.front.engine.intake.vocab_size)
        say(
            Done(
                number,
                {"prompt": self.tokenizer.decode(given["tokens"], skip_special_tokens=False)},
            )
        )

    def _after_step(self) -> None:
        engine, now = self.front.engine, monotonic()
        if now - self._told > _OFTEN_S or not engine.has_work:
            self._told = now
            lines = engine.scheduler
            self._say(Stats(self.name, len(lines.running), len(lines.waiting), engine.memory.used))
        self._say.flush()

    @cached_property
    def _aside(self) -> Explaining:
        return Explaining(self.model, self.tokenizer, self.prompts.processor, self._say.flush)

    def cancel(self, number: int) -> None:
        """End its texts as far as they came."""
        for handle in self._at_work.pop(number, ()):
            handle.cancel()

    def close(self) -> None:
        """End the engine's thread."""
        self.front.close()
        if "_aside" in self.__dict__:
            self._aside.close()

    def _bytes_of(self, token_id: int) -> bytes | None:
        """What a token writes; None where the tokenizer's tokens do not say it one by one."""
        return self._bytes[token_id] if token_id < len(self._bytes) else None

    @cached_property
    def _bytes(self) -> list[bytes]:
        try:
            return token_bytes(self.tokenizer)
        except ConfigError:
            return []

    def _end(self, number: int, choices: Choices, choice: int, request: Request) -> None:
        if choices.end(choice, request):
            self._at_work.pop(number, None)

    def _config(self, settings: Mapping[str, Any]) -> GenerationConfig:
        most = self.front.engine.memory.longest(0, 1)
        said = {name: value for name, value in settings.items() if value is not None}
        said.setdefault("max_new_tokens", most)
        return GenerationConfig.recommended(self.model.generation, **said)
