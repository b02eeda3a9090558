import itertools
import random

import pytest

from polyhead.generate.writer import TextWriter


class Letters:
    """A tokenizer whose tokens are the pieces of a text, by index."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def stream(self, skip_special_tokens: bool):
        return self

    def push(self, token_id: int) -> str:
        return self.pieces[token_id]

    def flush(self) -> str:
        return ""


def cut(text: str, stops: tuple[str, ...]) -> str:
    """The text before the stop string that is complete first."""
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    return text[: min(ends)[1]] if ends else text


@pytest.mark.parametrize("stops", [("ab",), ("aab", "bb"), ("abab", "ba"), ("b", "aba"), ("aaa",)])
def test_every_text_however_it_is_divided(stops):
    chance = random.Random(0)
    for letters in itertools.product("abc", repeat=6):
        text = "".join(letters)
        at = sorted(chance.sample(range(1, 6), chance.randrange(5)))
        pieces = [text[i:j] for i, j in itertools.pairwise([0, *at, 6])]
        writer, written = TextWriter(Letters(pieces), stops), ""
        for token_id in range(len(pieces)):
            written += writer.push(token_id)
            assert cut(text, stops).startswith(written)
            if writer.stopped:
                break
        assert written + writer.flush() == cut(text, stops)
        assert writer.stopped == any(stop in text for stop in stops)


def test_text_that_cannot_begin_a_stop_string_does_not_wait():
    writer = TextWriter(Letters(["x", "yE", "N", "x"]), ("END",))
    assert [writer.push(i) for i in range(4)] == ["x", "y", "", "ENx"]
