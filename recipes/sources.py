"""The standard library's sources as a corpus, some files held out whole."""

from polyhead.cli.corpora import stdlib, without_lines_of
from polyhead.text.tokenizer import Tokenizer

EVERY = 25  # one file in so many is held out


def corpus() -> tuple[list[str], list[str]]:
    """Files to learn from, and those held out; the former without the latter's long lines."""
    files = stdlib()
    held = files[::EVERY]
    seen = "\n".join(held)
    train = [text for number, text in enumerate(files) if number % EVERY]
    return [without_lines_of(text, seen, shortest=40) for text in train], held


def tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Word pieces with BERT's special tokens, learned on a part of the texts."""
    return Tokenizer.train(texts[::4], kind="wordpiece", vocab_size=vocab_size)
