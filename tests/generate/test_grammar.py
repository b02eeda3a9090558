"""JSON schemas, regular expressions and grammars."""

import json
import re
import subprocess
import sys
import time

import pytest
import torch

from polyhead.errors import ConfigError
from polyhead.generate.config import GenerationConfig
from polyhead.generate.sampling.grammar import Grammars
from polyhead.generate.sampling.sampler import Sampler
from polyhead.text.tokenizer import Tokenizer

pytest.importorskip("llguidance")
CPU = torch.device("cpu")
TEXTS = ['the "quick" brown fox: {"a": [1, true, null]}, é ü 0123456789 ' * 9, "yes no maybe"]
KINDS = ["bpe", "bytes", "chars", "unigram"]
HEAD = 420  # more than any of the tokenizers has


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {kind: Tokenizer.train(TEXTS, kind=kind, vocab_size=_size(kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def grammars(tokenizers) -> Grammars:
    return Grammars(tokenizers["bpe"], HEAD)


def _size(kind: str) -> int | None:
    return 300 if kind in ("bpe", "unigram") else None


def write(tokenizer: Tokenizer, seed: int, most: int = 80, **asked) -> tuple[str, bool]:
    """A text drawn from even odds, and whether it came to its end."""
    config = GenerationConfig(max_new_tokens=most, **asked)
    sampler = Sampler(1, most + 1, HEAD, CPU, tokenizer)
    slot = sampler.open(config, [0], seed, tokenizer.eos_ids)
    ids: list[int] = []
    torch.manual_seed(seed)
    while len(ids) < most:
        token = int(sampler(torch.randn(1, HEAD), [slot], [len(ids)]))
        assert 0 <= token < tokenizer.vocab_size, sampler.problem(slot)
        if token in tokenizer.eos_ids:
            return tokenizer.decode(ids), True
        sampler.write(slot, len(ids), [token])
        sampler.accept(slot, [token])
        ids.append(token)
    return tokenizer.decode(ids), False


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_follows_its_grammar_by_any_tokenizer(tokenizers, kind):
    pattern = r"(yes|no|maybe)(, (yes|no)){0,2}[0-9]"
    schema = {"enum": [{"a": [1, True, None]}, "fox", 12]}
    for seed in range(4):
        text, ended = write(tokenizers[kind], seed, regex=pattern)
        assert ended
        assert re.fullmatch(pattern, text.strip())
        text, ended = write(tokenizers[kind], seed, json_schema=schema, logit_bias={})
        assert not ended or json.loads(text) in schema["enum"]
        text, ended = write(tokenizers[kind], seed, grammar='root ::= "fox" ("no" | "yes")')
        assert ended
        assert text.strip() in ("foxno", "foxyes")


def test_a_tokenizer_whose_text_is_not_its_tokens_is_refused():
    words = Tokenizer.train(TEXTS, kind="wordpiece", vocab_size=300)
    with pytest.raises(ConfigError, match="side by side; this one decodes by WordPiece"):
        Grammars(words, HEAD)


def test_without_a_tokenizer_there_is_no_grammar():
    with pytest.raises(ConfigError, match="needs the model's tokenizer"):
        Sampler(1, 8, 8, CPU).open(GenerationConfig(regex="a"), [1], 0)


def test_without_llguidance_the_extra_is_named(tokenizers, monkeypatch):
    monkeypatch.setattr("polyhead.generate.sampling.grammar.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'polyhead\[grammar\]'"):
        Grammars(tokenizers["bpe"], HEAD)


def test_special_tokens_are_no_text(tokenizers):
    tokenizer = tokenizers["bpe"]
    walk = Grammars(tokenizer, HEAD).prepare(GenerationConfig(regex="(.|\n)*")).result()
    allowed = walk.options([]).allowed(HEAD)
    assert not allowed[list(tokenizer.special_ids)].any()
    assert not allowed[tokenizer.vocab_size :].any()
    assert walk.options([]).may_end


def test_an_end_comes_only_where_the_grammar_is_satisfied(tokenizers):
    tokenizer = tokenizers["bytes"]
    (end,), sampler = tokenizer.eos_ids, Sampler(1, 64, HEAD, CPU, tokenizer)
    slot = sampler.open(GenerationConfig(regex="xa?b|xab+"), [0], 0, [end, ord("b")])
    sampler.write(slot, 0, list(b"xab"))
    scores = sampler.constrain(torch.zeros(4, HEAD), [slot] * 4, [0, 1, 2, 3])
    allowed = [row.isfinite().nonzero()[:, 0].tolist() for row in scores]
    # "b" ends this text, so that it is one only where the text may end before it.
    assert allowed == [[ord("x")], [ord("a")], [], [ord("b"), end]]


def test_a_grammar_that_is_at_its_end_needs_no_token_for_it(tokenizers):
    sampler = Sampler(1, 64, HEAD, CPU, tokenizers["bytes"])
    slot = sampler.open(GenerationConfig(regex="xa?"), [0], 0)
    assert not sampler.is_complete(slot)
    sampler.write(slot, 0, list(b"x"))
    assert not sampler.is_complete(slot)
    sampler.write(slot, 0, list(b"xa"))
    assert sampler.is_complete(slot)


def test_a_grammar_is_about_what_follows_forced_tokens(tokenizers):
    tokenizer, forced = tokenizers["bytes"], tuple(b"So: ")
    text, ended = write(tokenizer, 1, regex="yes|no", forced_prefix_ids=forced)
    assert ended
    assert text in ("So: yes", "So: no")


def test_drafts_may_leave_the_grammar(tokenizers):
    tokenizer = tokenizers["bytes"]
    sampler = Sampler(1, 64, HEAD, CPU, tokenizer)
    slot = sampler.open(GenerationConfig(regex="(ab)+c", temperature=0), [0], 0, tokenizer.eos_ids)
    torch.manual_seed(0)
    logits = torch.randn(5, HEAD)
    logits[:, ord("c")] -= 9
    sampler.write(slot, 0, list(b"abxa"))
    drawn = sampler(logits, [slot] * 5, [0, 1, 2, 3, 4]).tolist()
    assert drawn[:3] == list(b"aba")
    sampler.write(slot, 2, list(b"ab"))
    sampler.accept(slot, list(b"abab"))
    assert sampler(logits[4:], [slot], [4]).tolist() == list(b"a")


HOSTILE = {
    "an endless compile": {"json_schema": {"type": "integer", "multipleOf": 99999989}},
    "many properties": {
        "json_schema": {"properties": {f"p{i}": {"type": "string"} for i in range(5000)}}
    },
    "deep": {"json_schema": '{"items":' * 3000 + "{}" + "}" * 3000},
    "nothing but itself": {"json_schema": {"$ref": "#"}},
    "too many choices": {
        "json_schema": {
            "allOf": [
                {"anyOf": [{"properties": {f"a{i}{j}": {"type": "null"}}} for j in range(4)]}
                for i in range(12)
            ]
        }
    },
    "deep groups": {"regex": "(" * 20_000 + "a" + ")" * 20_000},
    "left open": {"regex": "((a"},
    "large": {"regex": "a" * 300_000},
    "a rule of itself": {"grammar": "start: a\na: a"},
    "no JSON": {"json_schema": "{nonsense"},
    "not done": {"json_schema": {"not": {"type": "integer"}}},
    "false": {"json_schema": False},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused_in_one_line(grammars, name):
    with pytest.raises(ConfigError, match="the grammar") as caught:
        grammars.prepare(GenerationConfig(**HOSTILE[name])).result(timeout=60)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_refusal_disturbs_nobody(grammars):
    hostile = grammars.prepare(GenerationConfig(**HOSTILE["an endless compile"]))
    assert grammars.prepare(GenerationConfig(regex="a+")).result(timeout=60).options([]) is not None
    assert hostile.exception(timeout=60) is not None


def test_a_grammar_that_was_late_is_tried_again(tokenizers):
    short = Grammars(tokenizers["bpe"], HEAD, seconds=1e-6)
    config = GenerationConfig(regex="a+")
    with pytest.raises(ConfigError, match="more than 1e-06 s"):
        short.prepare(config).result(timeout=60)
    short._seconds = 30
    assert short.prepare(config).result(timeout=60).options([]) is not None


def test_a_grammar_is_compiled_once(grammars):
    one, other = GenerationConfig(regex="[ab]+"), GenerationConfig(regex="[ab]+", seed=3)
    assert grammars.prepare(one) is grammars.prepare(other)
    assert grammars.prepare(GenerationConfig(regex="[ac]+")) is not grammars.prepare(one)


def test_a_row_is_ready_when_its_grammar_is(tokenizers):
    sampler = Sampler(2, 64, HEAD, CPU, tokenizers["bpe"])
    slot = sampler.open(GenerationConfig(regex="[0-9]+"), [0], 0, tokenizers["bpe"].eos_ids)
    plain = sampler.open(GenerationConfig(), [0], 0)
    assert sampler.ready(plain)
    until = time.monotonic() + 60
    while not sampler.ready(slot):
        assert time.monotonic() < until
    sampler.close(slot)
    slot = sampler.open(GenerationConfig(regex="(("), [0], 0)
    assert sampler.prepare(GenerationConfig(regex="((")).exception(timeout=60) is not None
    with pytest.raises(ConfigError, match="the grammar is refused"):
        sampler.ready(slot)


def test_llguidance_is_imported_by_those_who_use_it():
    code = "import sys, polyhead.generate.sampling.sampler; sys.exit('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
