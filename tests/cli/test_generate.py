import io
import json
import sys

import pytest

from polyhead.cli.settings import with_own
from polyhead.generate.config import GenerationConfig
from polyhead.generate.generator import TextGenerator
from polyhead.generate.prompts import encode_chat
from polyhead.models.load import load, tokenizer

GREEDY = ("--temperature", 0, "--max-new-tokens", 8)
CONFIG = GenerationConfig(temperature=0, max_new_tokens=8)


def answer(path, prompt):
    words = tokenizer(path)
    return str(TextGenerator(load(path), words).generate(prompt(words), CONFIG))


@pytest.fixture
def stdin(monkeypatch):
    def give(text):
        raw = io.BytesIO(text if isinstance(text, bytes) else text.encode())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw, encoding="utf-8"))

    return give


def test_standard_output_holds_the_answer_alone(cli, plain):
    found = cli("generate", plain, "the quick", *GREEDY)
    assert found == (0, answer(plain, lambda words: "the quick") + "\n", "")


def test_the_chat_template_is_applied_unless_raw(cli, chatty):
    message = [{"role": "user", "content": "the quick"}]
    wanted = answer(chatty, lambda words: encode_chat(message, words))
    raw = answer(chatty, lambda words: "the quick")
    assert cli("generate", chatty, "the quick", *GREEDY).out == wanted + "\n"
    assert cli("generate", chatty, "the quick", "--raw", *GREEDY).out == raw + "\n"
    assert wanted != raw
    assert cli("generate", chatty, "the quick", "--system", "be brief", *GREEDY).code == 0
    assert "chat template" in cli("generate", chatty, "x", "--raw", "--system", "y").err


def test_several_prompts_stream_and_stdin(cli, plain, stdin):
    one, two = (cli("generate", plain, text, *GREEDY).out for text in ("the", "lazy dog"))
    assert cli("generate", plain, "the", "lazy dog", *GREEDY).out == one + two
    assert cli("generate", plain, "the", "lazy dog", "--stream", *GREEDY).out == one + two
    stdin("lazy dog\n")
    assert cli("generate", plain, "-", *GREEDY).out == two
    stdin("")
    assert "standard input is empty" in cli("generate", plain, "-").err


def test_json_is_a_line_a_prompt(cli, plain):
    found = cli("generate", plain, "the", "dog", "--json", "--logprobs", 2, *GREEDY)
    rows = [json.loads(line) for line in found.out.splitlines()]
    assert [row["prompt"] for row in rows] == ["the", "dog"]
    assert all(row["tokens"] <= 8 and row["finish_reason"] in ("stop", "length") for row in rows)
    assert len(rows[0]["logprobs"]) == rows[0]["tokens"]
    assert len(rows[0]["logprobs"][0]["top"]) == 2


def test_a_seed_repeats(cli, plain):
    command = ("generate", plain, "the", "--seed", 3, "--max-new-tokens", 8)
    assert cli(*command).out == cli(*command).out


def test_a_device_that_is_not_there(cli, plain):
    found = cli("generate", plain, "the", "--device", "abacus")
    assert found.code == 2
    assert "device 'abacus'" in found.err


@pytest.mark.parametrize(
    ("own", "given", "temperature", "stops"),
    [
        ({}, (), 1.0, ()),
        ({"eos_token_id": [5, 6]}, (), 1.0, (5, 6)),
        ({"do_sample": True, "temperature": 0.6}, (), 0.6, ()),
        ({"do_sample": True, "temperature": 0.6}, ("temperature",), 1.0, ()),
        ({"do_sample": False}, (), 0.0, ()),
    ],
)
def test_flags_win_over_the_model_and_the_model_over_defaults(own, given, temperature, stops):
    found = with_own(GenerationConfig(), given, own)
    assert found.temperature == temperature
    assert found.stop_token_ids == stops


def test_chat_answers_each_line(cli, chatty, stdin):
    stdin("the quick\n\n/reset\nthe quick\n/what\n/quit\nnever\n")
    found = cli("chat", chatty, *GREEDY)
    once = cli("generate", chatty, "the quick", *GREEDY).out
    assert found.code == 0
    assert found.out == once * 2
    assert "forgotten" in found.err
    assert "/what is no command" in found.err


def test_chat_wants_utf8(cli, chatty, stdin):
    stdin(b"caf\xe9?\n")
    found = cli("chat", chatty, *GREEDY)
    assert found.code == 2
    assert "standard input is not UTF-8" in found.err


def test_chat_wants_a_template(cli, plain):
    found = cli("chat", plain)
    assert found.code == 2
    assert "no chat template" in found.err


@pytest.mark.weights
def test_smollm2_knows_a_capital(cli, smollm2, stdin):
    question = "What is the capital of Japan?"  # no token of the answer has a near rival
    words = ("--temperature", 0, "--max-new-tokens", 12)
    assert "Tokyo" in cli("generate", smollm2, question, *words).out
    stdin(f"{question}\n")
    assert "Tokyo" in cli("chat", smollm2, *words).out
