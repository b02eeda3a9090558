"""JSON schemas, regular expressions and grammars, compiled within limits, off the step's path.

The work is llguidance's. A grammar is first tried in a process of its own, which is killed when it
takes too long: nothing else stops a compiler that does not come to an end.
"""

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

from polyhead.errors import ConfigError
from polyhead.generate.config import GenerationConfig
from polyhead.generate.sampling import gate
from polyhead.generate.sampling.vocabulary import token_bytes
from polyhead.generate.sampling.walk import Walk
from polyhead.text.tokenizer import Tokenizer

MOST_CHARACTERS = 1 << 18
SECONDS = 0.7
_STARTING = 30.0
_THREADS = 2
_KEPT = 128


class Grammars:
    """Grammars for one tokenizer and a head of `vocab_size` tokens, which may be more than it has.

    Errors: ConfigError where llguidance is missing, or the tokenizer is of a kind that cannot.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, seconds: float = SECONDS) -> None:
        if find_spec("llguidance") is None:
            raise ConfigError(
                "JSON schemas, regular expressions and grammars need llguidance: "
                "pip install 'polyhead[grammar]'"
            )
        special = sorted(tokenizer.special_ids)
        self._tokens = gate.Tokens(token_bytes(tokenizer), special, vocab_size)
        self._seconds = seconds
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="polyhead-compile")
        self._local = threading.local()
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._known: OrderedDict[str, Future[Walk]] = OrderedDict()

    def prepare(self, config: GenerationConfig) -> Future[Walk]:
        """The start of its grammar, compiled in another thread; to be forked, not walked.

        The future raises ConfigError for a grammar that is refused. Called again with the same
        grammar it is the same future.
        """
        text = _serialized(config)
        with self._lock:
            # One that took too long may have found the machine busy.
            if text not in self._known or _was_late(self._known[text]):
                self._known[text] = self._pool.submit(self._compile, text)
                if len(self._known) > _KEPT:
                    self._known.popitem(last=False)
            self._known.move_to_end(text)
            return self._known[text]

    def _compile(self, text: str) -> Walk:
        if getattr(self._local, "gate", None) is None:
            self._local.gate = _Gate(self._tokens)
        self._local.gate.check(text, self._seconds)
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = gate.tokenizer(self._tokens)
        found, error = gate.matcher(self._vocabulary, text)
        if error:
            raise _refused(error)
        return Walk(found, self._tokens.eos_token_id)


class _LateError(ConfigError):
    """A grammar that did not compile in time."""


def _was_late(compiled: Future[Walk]) -> bool:
    return compiled.done() and isinstance(compiled.exception(), _LateError)


class _Gate:
    """A child process that answers in time or is killed; the next grammar gets a new one."""

    def __init__(self, tokens: gate.Tokens) -> None:
        self._first = {
            "tokens": [token.decode("latin-1") for token in tokens.tokens[:-1]],
            "special": tokens.special_token_ids[:-1],
            "vocab_size": tokens.eos_token_id,
        }
        self._child: subprocess.Popen[str] | None = None
        self._start()

    def check(self, text: str, seconds: float) -> None:
        """ConfigError unless the grammar compiles and begins in so many seconds."""
        if not self._is_ready and self._answer(_STARTING) is None:
            self._start()
            raise ConfigError("llguidance did not start; try the grammar again")
        self._is_ready = True
        self._say(text)
        answer = self._answer(seconds)
        if answer is None:
            # The next one need not wait for its start.
            self._start()
            raise _LateError(
                f"the grammar is refused: it takes more than {seconds} s or 1 GB to compile"
            )
        if answer["error"]:
            raise _refused(answer["error"])

    def _start(self) -> None:
        self.close()
        command = [sys.executable, "-P", gate.__file__]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, text=True)
        self._is_ready = False
        self._say(self._first)

    def _say(self, words: Any) -> None:
        assert self._child is not None
        assert self._child.stdin is not None
        # Of a child that has died, nobody has an answer either.
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(json.dumps(words) + "\n")
            self._child.stdin.flush()

    def _answer(self, seconds: float) -> Any:
        """What it says, or None if it does not in so many seconds, and is killed."""
        assert self._child is not None
        assert self._child.stdout is not None
        late = threading.Timer(seconds, self._child.kill)
        began = time.monotonic()
        late.start()
        line = self._child.stdout.readline()
        late.cancel()
        return json.loads(line) if line and time.monotonic() - began < seconds else None

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()

    def __del__(self) -> None:
        self.close()


def _serialized(config: GenerationConfig) -> str:
    """In llguidance's own form."""
    from llguidance import LLMatcher, grammar_from

    text = config.json_schema or config.regex or config.grammar or ""
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(
            f"the grammar has {len(text)} characters; {MOST_CHARACTERS} are the most that is taken"
        )
    try:
        if config.json_schema is not None:
            return LLMatcher.grammar_from_json_schema(config.json_schema)
        if config.regex is not None:
            return LLMatcher.grammar_from_regex(config.regex)
        return grammar_from("grammar", text)
    except (ValueError, RecursionError) as error:
        raise _refused(str(error)) from None


def _refused(why: str) -> ConfigError:
    return ConfigError(f"the grammar is refused: {' '.join(why.split())[:300]}")
