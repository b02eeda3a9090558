"""A conversation that keeps its key/value cache from turn to turn."""

from collections.abc import Generator

from polyhead.generate.config import GenerationConfig
from polyhead.generate.generator import Stream, TextGenerator
from polyhead.generate.prompts import encode_chat
from polyhead.generate.result import Generation

_ANSWER_SHARE = 4


class Chat:
    """Messages back and forth with one model. Only what is new in a turn is computed.

    `messages` is the history, to be read or changed freely between turns. When it no longer fits
    the model's context, of which a quarter is kept for the answer, the oldest turns are forgotten;
    a system message stays. Errors: FileError where the tokenizer has no chat template.
    """

    def __init__(
        self,
        generator: TextGenerator,
        config: GenerationConfig | None = None,
        system: str | None = None,
    ) -> None:
        self.generator = generator
        self.config = config or GenerationConfig()
        self.system = system
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.messages: list[dict[str, str]] = first
        self._engine = self.generator.own_engine(self.config)

    def say(self, text: str) -> Stream:
        """Pieces of the answer to `text`; the generator's return value is the `Generation`.

        An answer that is broken off stays in the history as far as it came. What fails before the
        answer begins leaves the history as it was.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        messages, prompt = self._fitted(asked)
        stream = self.generator.stream(prompt, self.config, engine=self._engine)
        return self._answer(messages, stream)

    def _answer(
        self, messages: list[dict[str, str]], stream: Stream
    ) -> Generator[str, None, Generation]:
        answer = {"role": "assistant", "content": ""}
        try:
            while True:
                piece = next(stream)
                answer["content"] += piece
                self.messages = [*messages, answer]
                yield piece
        except StopIteration as end:
            self.messages = [*messages, answer]
            return end.value
        finally:
            stream.close()

    def _fitted(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[int]]:
        """The messages and their ids, without the oldest turns where they are too many."""
        prompt = encode_chat(messages, self.generator.tokenizer)
        most = getattr(self.generator.model.config, "max_seq_len", None)
        if most is None:
            return messages, prompt
        room = min(self.config.max_new_tokens, most // _ANSWER_SHARE)
        while len(prompt) + room > most:
            shorter = _without_oldest_turn(messages)
            if shorter is None:
                break
            messages = shorter
            prompt = encode_chat(messages, self.generator.tokenizer)
        return messages, prompt


def _without_oldest_turn(messages: list[dict[str, str]]) -> list[dict[str, str]] | None:
    """None where there is only one turn."""
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if len(users) < 2:
        return None
    return [*(m for m in messages[: users[0]] if m["role"] == "system"), *messages[users[1] :]]
