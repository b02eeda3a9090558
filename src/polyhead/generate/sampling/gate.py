"""A process that tries grammars out, so that one without end can be killed.

Run as a program: a line of JSON each way. The first holds the tokens; the others a grammar each,
answered by {"error": ...}, empty where it compiles and begins.
"""

import contextlib
import json
import sys
import threading
from typing import Any

LIMITS: dict[str, Any] = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
_MORE_MEMORY = 1 << 30
_STACK = 4 << 20  # half of what a thread has elsewhere


class Tokens:
    """A vocabulary as llguidance wants it; one more token, `eos_token_id`, ends a text."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int], vocab_size: int) -> None:
        rest = [b""] * (vocab_size - len(tokens))
        self.tokens = [*tokens[:vocab_size], *rest, b"<|end of text|>"]
        self.eos_token_id = vocab_size
        self.special_token_ids = [*(i for i in special if i < vocab_size), vocab_size]
        self._single = {token: i for i, token in enumerate(tokens) if token}
        self._longest = max(map(len, tokens), default=0)

    def __call__(self, text: str | bytes) -> list[int]:
        """Some tokens that write this; llguidance asks for no more than that."""
        data = text.encode() if isinstance(text, str) else text
        found, at = [], 0
        while at < len(data):
            ends = range(min(at + self._longest, len(data)), at, -1)
            end = next((end for end in ends if data[at:end] in self._single), at)
            if end == at:
                break
            found.append(self._single[data[at:end]])
            at = end
        return found


def tokenizer(tokens: Tokens) -> Any:
    """An `LLTokenizer` of them."""
    import llguidance

    wrapper = llguidance.TokenizerWrapper(tokens)
    return llguidance.LLTokenizer(wrapper, n_vocab=len(tokens.tokens))


def matcher(vocabulary: Any, grammar: str) -> tuple[Any, str]:
    """An `LLMatcher` at the start of a grammar, and what is wrong with it."""
    import llguidance

    limits = llguidance.LLParserLimits(**LIMITS)
    found = llguidance.LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
    allows = not found.is_error() and any(found.compute_bitmask())
    lines = found.get_error().splitlines() or [""]
    if lines[0] in ("NoExtension", "NoExtensionBias") or not (allows or lines[0]):
        lines[0] = "it allows no text at all that these tokens can write"
    return found, lines[0][:200]


def _serve() -> None:
    said = json.loads(sys.stdin.readline())
    tokens = [token.encode("latin-1") for token in said["tokens"]]
    vocabulary = tokenizer(Tokens(tokens, said["special"], said["vocab_size"]))
    with contextlib.suppress(ImportError, OSError):
        _limit_memory()
    print("{}", flush=True)
    for line in sys.stdin:
        print(json.dumps({"error": matcher(vocabulary, json.loads(line))[1]}), flush=True)


def _limit_memory() -> None:
    """What is held now, and a gigabyte more; only where the system tells and does so."""
    import resource

    with open("/proc/self/statm") as file:
        most = int(file.read().split()[0]) * resource.getpagesize() + _MORE_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    threading.stack_size(_STACK)
    server = threading.Thread(target=_serve)
    server.start()
    server.join()
