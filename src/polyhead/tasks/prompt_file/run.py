"""A file of prompts through one engine, to a file of answers."""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from polyhead.errors import ConfigError, DataError, PolyheadError
from polyhead.generate.config import GenerationConfig
from polyhead.generate.engine import Engine
from polyhead.generate.engine_config import BLOCK_SIZE, EngineConfig
from polyhead.generate.intake import copies_of
from polyhead.generate.prompts import Prompt, encode_chat, encode_prompt
from polyhead.generate.request import Request
from polyhead.generate.sampling.seeds import row_seed
from polyhead.models.model import TaskModel, require_causal
from polyhead.tasks.evaluate.keeping import fingerprints
from polyhead.tasks.prompt_file.answers import answer_record, open_answers
from polyhead.tasks.prompt_file.reading import Asked, Overview, PromptFile
from polyhead.text.tokenizer import Tokenizer

ROWS = 32
_IN_FLIGHT = 2  # requests in the engine for each row
_PROMPTS_AT_ONCE = 8192  # tokens that a step reads: nobody waits for the next token
_USUAL = 4096  # tokens of a text, for as many of which as rows there is room
_ENDLESS = 1 << 20  # tokens of a text, for models that take any number

Record = Mapping[str, Any]


@dataclass
class Progress:
    """How far a file is. done, failed: prompts, those of earlier runs included. tokens: that this
    run has written in `seconds`."""

    prompts: int
    done: int = 0
    failed: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def count(self, record: Record) -> None:
        """One more answer that is kept."""
        self.done, self.failed = self.done + 1, self.failed + ("error" in record)


Tell = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True)
class PromptRun:
    """How a file of prompts is answered.

    raw: prompts go to the model as they are, without its tokenizer's chat template. system: the
    message before those that have none of their own. rows: texts that are written together.
    """

    model: TaskModel
    tokenizer: Tokenizer
    config: GenerationConfig = field(default_factory=GenerationConfig)
    raw: bool = False
    system: str | None = None
    rows: int = ROWS

    def __post_init__(self) -> None:
        require_causal(self.model)
        if self.rows < 1:
            raise ConfigError(f"rows={self.rows} must be 1 or more")
        if self.system is not None and not self.has_template:
            raise DataError("a system message needs a chat template, and none is used here")

    @property
    def has_template(self) -> bool:
        """Whether prompts are put into a chat template."""
        return not self.raw and self.tokenizer.chat_template is not None

    def to_file(
        self, prompts: PromptFile, out: str | Path, *, force: bool = False, tell: Tell | None = None
    ) -> Progress:
        """Answer every prompt, a JSON line each.

        An answer is in the file as soon as it is done. The same call goes on after those that are
        there, and in the end the lines are in the order of the prompts: the same, however often it
        was stopped. What tells the work from other stands beside (`.progress`). force: begin anew.
        tell: called after each step.
        Errors: DataError, before anything is written, for a line that is no prompt; FileError where
        `out` is of other work, or of none.
        """
        overview = prompts.look_over(self.config, self.has_template)
        with open_answers(Path(out), self._identity(overview), force) as answers:
            progress = Progress(overview.prompts, len(answers.done), answers.failed)
            seeded = replace(self, config=replace(self.config, seed=answers.seed))
            for record in seeded._records(prompts, overview, progress, tell, answers.done):
                answers.add(record)
            answers.sort()
        return progress

    def stream(
        self, prompts: PromptFile, write: Callable[[Record], None], tell: Tell | None = None
    ) -> Progress:
        """Answer every prompt, and hand each answer on as it comes. Errors: as for `to_file`."""
        overview = prompts.look_over(self.config, self.has_template)
        progress = Progress(overview.prompts)
        for record in self._records(prompts, overview, progress, tell):
            write(record)
        return progress

    def _records(
        self,
        prompts: PromptFile,
        overview: Overview,
        progress: Progress,
        tell: Tell | None,
        done: Collection[int] = (),
    ) -> Iterator[Record]:
        """Answers as they come, of the lines that are not done."""
        tell = tell or (lambda progress: None)
        tell(progress)
        if progress.done == progress.prompts:
            return
        engine = self._engine(overview)
        todo = ((asked, time) for asked, time in self._counted(prompts) if asked.line not in done)
        working: dict[Request, Asked] = {}
        written, start = 0, time.monotonic()
        while True:
            while len(working) < _IN_FLIGHT * self.rows and (one := next(todo, None)) is not None:
                try:
                    working[self._add(engine, *one)] = one[0]
                except PolyheadError as error:
                    record = _failed(one[0], error)
                    yield record
                    progress.count(record)
            if not working:
                progress.seconds = time.monotonic() - start
                break
            for request in engine.step():
                asked = working.pop(request)
                written += sum(len(answer.token_ids) for answer in request.results or ())
                record = self._record(asked, request)
                yield record
                progress.count(record)
            at_work = sum(text.written for request in working for text in request.texts)
            progress.tokens, progress.seconds = written + at_work, time.monotonic() - start
            tell(progress)

    def _add(self, engine: Engine, asked: Asked, times: int) -> Request:
        """Let a prompt be answered; times: how often it was asked before."""
        vocab_size: int = getattr(self.model.config, "vocab_size")  # noqa: B009
        config = asked.config(self.config)
        ids = encode_prompt(self._prompt(asked), self.tokenizer, vocab_size)
        seeds = [row_seed(config, ids, times + copy) for copy in range(copies_of(config))]
        return engine.add(ids, config, seeds=seeds)

    def _prompt(self, asked: Asked) -> Prompt:
        if not self.has_template:
            return asked.fields["prompt"]
        return encode_chat(asked.messages(self.system), self.tokenizer, asked.fields.get("tools"))

    def _counted(self, prompts: PromptFile) -> Iterator[tuple[Asked, int]]:
        """Prompts, and how many texts of them were asked before. What has a seed of its own is
        always the first."""
        times: Counter[bytes] = Counter()
        for asked in prompts:
            if "seed" in asked.settings:
                yield asked, 0
                continue
            key = blake2b(asked.question.encode(), digest_size=8).digest()
            yield asked, times[key]
            times[key] += copies_of(asked.config(self.config))

    def _record(self, asked: Asked, request: Request) -> Record:
        if request.error is not None:
            return _failed(asked, request.error)
        several = request.config.num_return_sequences > 1
        answer = answer_record(request.outcome(), self.tokenizer, several)
        return {"line": asked.line, **asked.fields, **answer}

    def _engine(self, overview: Overview) -> Engine:
        """One that holds its rows of this file's texts, and in any case the longest."""
        longest: int = getattr(self.model.config, "max_seq_len", None) or _ENDLESS
        # No token is less than a byte; templates write little more than themselves.
        around = 0 if not self.has_template else len(f"{self.tokenizer.chat_template}{self.system}")
        prompt = min(longest, max(overview.most_bytes + around, _USUAL))
        written = min(longest, overview.most_tokens) + 2 * BLOCK_SIZE
        alone = overview.readings * prompt + overview.rows * written
        usual = min(longest, overview.most_bytes + around + overview.most_tokens, _USUAL)
        rows = max(self.rows, overview.rows)
        config = EngineConfig(
            max_rows=rows, cache_tokens=max(alone, rows * (usual + BLOCK_SIZE)),
            chunk=_PROMPTS_AT_ONCE, idle_chunk=_PROMPTS_AT_ONCE,
        )  # fmt: skip
        return Engine(self.model, self.tokenizer, config)

    def _identity(self, overview: Overview) -> dict[str, Any]:
        """What the answers follow from."""
        return {
            "prompts": overview.digest,
            **fingerprints(self.model, self.tokenizer),
            "raw": self.raw,
            "system": self.system,
            **asdict(self.config),
            "trie": self.config.trie and self.config.trie.digest,
        }


def _failed(asked: Asked, error: Exception) -> Record:
    return {"line": asked.line, **asked.fields, "error": " ".join(str(error).split())}
