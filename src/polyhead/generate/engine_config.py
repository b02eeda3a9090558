"""How large an engine is."""

from dataclasses import dataclass

from polyhead.errors import ConfigError

BLOCK_SIZE = 16
_LONGEST = 4096


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How much an engine does at once, and what it remembers it in."""

    max_rows: int = 16
    """Texts that go on together; beams and samples of one request count each."""
    cache_tokens: int | None = None
    """Tokens whose keys and values are held in all. None: `max_rows` texts as long as the model
    takes, or of 4096."""
    max_len: int | None = None
    """Tokens of the longest text, prompt included; None: what the model and the cache take."""
    source_tokens: int | None = None
    """The same of what encoders read; None: as many."""
    block_size: int = BLOCK_SIZE
    """Tokens of a block."""
    chunk: int | None = None
    """Tokens of prompts that a step reads while other texts go on. None: as many as `stretch`
    allows, by what steps are seen to take."""
    idle_chunk: int = 4096
    """The same, while none does."""
    stretch: float = 2.0
    """How many times as long as a step that reads no prompt one that does may take."""
    static: bool = False
    """Steps of one token a text always have the same shapes: `max_rows` rows, and keys for the
    longest text, whatever is at work. What is not there is computed too, and not looked at."""
    compile: bool = False
    """Run such steps compiled; worth its start-up for long work. Implies `static`."""
    kv: str = "model"
    """Keys and values as the model computes them, in "fp16", or in "int8"."""

    def __post_init__(self) -> None:
        for name in ("max_rows", "block_size", "chunk", "idle_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be 1 or more")
        if not self.stretch > 1:
            raise ConfigError(f"stretch={self.stretch} must be above 1")
        if self.cache_tokens is not None and self.cache_tokens < 2:
            raise ConfigError(f"cache_tokens={self.cache_tokens} must be 2 or more")
        if self.kv not in ("model", "fp16", "int8"):
            raise ConfigError(f'kv={self.kv!r} must be "model", "fp16" or "int8"')

    def tokens(self, longest: int | None) -> int:
        """What `cache_tokens` is for a model that takes `longest` tokens."""
        return self.cache_tokens or self.max_rows * min(longest or _LONGEST, _LONGEST)

    def fits(self, other: "EngineConfig") -> bool:
        """Whether an engine of another config does all that one of this does."""
        sizes = ("max_rows", "cache_tokens", "max_len", "source_tokens")
        return all((getattr(self, name) or 0) <= (getattr(other, name) or 0) for name in sizes)
