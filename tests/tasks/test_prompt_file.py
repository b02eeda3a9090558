"""A file of prompts is answered as its prompts alone are, however often the work is stopped."""

import gzip
import io
import json
from itertools import islice
from pathlib import Path

import pytest
from tests.cli.conftest import CHATML, save_model

import polyhead as ph
from polyhead.errors import ConfigError, DataError, FileError
from polyhead.files.disk import locked
from polyhead.generate.engine import Engine
from polyhead.generate.prompts import encode_chat
from polyhead.tasks.prompt_file.reading import PromptFile
from polyhead.tasks.prompt_file.run import PromptRun

WORDS = "the quick brown fox jumps over the lazy dog".split()
DRAWN = ph.GenerationConfig(max_new_tokens=9, seed=5)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    path = save_model(tmp_path_factory.mktemp("chatty"), CHATML)
    return ph.load(path), ph.tokenizer(path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = save_model(tmp_path_factory.mktemp("plain"), None)
    return ph.load(path), ph.tokenizer(path)


def prompts(*rows, name="prompts.jsonl"):
    """A file in memory, of objects or of lines."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    return PromptFile(io.BytesIO("".join(f"{line}\n" for line in lines).encode()), name)


def run(pair, config=DRAWN, **more):
    return PromptRun(model=pair[0], tokenizer=pair[1], config=config, **more)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def streamed(work, *rows, **more):
    found = []
    work.stream(prompts(*rows, **more), found.append)
    return sorted(found, key=lambda record: record["line"])


@pytest.mark.parametrize("rows", [1, 3, 32])
@pytest.mark.parametrize("texts", [1, 2])
def test_a_file_gives_what_its_prompts_give(plain, tmp_path, rows, texts):
    config = ph.GenerationConfig(max_new_tokens=9, seed=5, num_return_sequences=texts)
    asked = [*WORDS, "fox", "fox the"]  # some of them several times
    run(plain, config, rows=rows).to_file(prompts(*asked, name="p.txt"), tmp_path / "a.jsonl")
    wanted = ph.TextGenerator(*plain).generate_all(asked, config)
    found = read(tmp_path / "a.jsonl")
    assert [row["prompt"] for row in found] == asked
    assert [[t["text"] for t in row.get("texts", [row])] for row in found] == wanted
    assert len({*wanted[0], *wanted[6]}) == 2 * texts  # "the" asked again is drawn anew


def test_stopped_anywhere_it_ends_the_same(plain, tmp_path):
    asked = [{"prompt": word, "n": n, "max_new_tokens": 1 + n % 5} for n, word in enumerate(WORDS)]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    work = run(plain, ph.GenerationConfig(), rows=2)  # without a seed: the first run's is kept
    work.to_file(prompts(*asked), whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    mixed = b"".join([*lines[5:], *lines[:5]])  # as they may come
    about = tmp_path / "whole.jsonl.progress"
    for cut in (0, 1, 70, len(lines[5]) - 1, len(lines[5]), len(mixed) - 1, len(mixed)):
        out.write_bytes(mixed[:cut])
        (tmp_path / "out.jsonl.progress").write_bytes(about.read_bytes())
        seen = []
        work.to_file(prompts(*asked), out, tell=lambda now: seen.append(now.done))  # noqa: B023
        assert out.read_bytes() == whole.read_bytes()
        assert seen[0] == mixed[:cut].count(b"\n")


def test_a_long_one_holds_nobody_up_and_few_are_held(plain, tmp_path, monkeypatch):
    asked = [{"prompt": "the", "max_new_tokens": 90}, *({"prompt": w} for w in WORDS * 5)]
    came, most = [], 0
    step = Engine.step

    def watched(engine):
        nonlocal most
        most = max(most, len(engine.scheduler.waiting) + len(engine.scheduler.running))
        return step(engine)

    monkeypatch.setattr(Engine, "step", watched)
    config = ph.GenerationConfig(max_new_tokens=2, temperature=0)
    run(plain, config, rows=3).stream(prompts(*asked), lambda record: came.append(record["line"]))
    assert sorted(came) == list(range(1, len(asked) + 1))
    assert came.index(1) > 20
    assert most <= 6


def test_a_line_has_settings_of_its_own(plain):
    own = [
        {"temperature": 0, "max_new_tokens": 4},
        {"seed": 9},
        {"seed": 9},
        {"temperature": 0, "num_beams": 3, "num_return_sequences": 2},
        {"logprobs": 1, "stop": "e"},
        {"seed": None},
    ]
    found = streamed(run(plain), *({"prompt": "lazy", "id": n, **s} for n, s in enumerate(own)))
    generator = ph.TextGenerator(*plain)
    fixed = {"max_new_tokens": 9, "seed": 5}
    for row, settings in zip(found[:4], own, strict=False):
        config = ph.GenerationConfig(**{**fixed, **settings})
        (wanted,) = generator.generate_all(["lazy"], [config])
        assert [t["text"] for t in row.get("texts", [row])] == wanted
    assert [row["id"] for row in found] == list(range(6))
    assert not {"temperature", "seed", "stop"} & found[0].keys()
    assert found[1]["text"] == found[2]["text"]
    assert found[3]["texts"][0]["score"] > found[3]["texts"][1]["score"]
    assert len(found[4]["logprobs"]) == found[4]["tokens"]


def test_conversations(chatty):
    config = ph.GenerationConfig(max_new_tokens=6, temperature=0)
    turns = [{"role": "user", "content": "the quick"}]
    brief, kind = ({"role": "system", "content": text} for text in ("be brief", "be kind"))
    rows = [
        {"prompt": "the quick", "custom_id": "a"},
        {"messages": turns},
        {"messages": turns, "system": "be kind"},
        {"messages": [kind, *turns]},
    ]
    found = streamed(run(chatty, config, system="be brief"), *rows)
    said = [[brief, *turns], [brief, *turns], [kind, *turns], [kind, *turns]]
    generator = ph.TextGenerator(*chatty)
    for row, messages, asked in zip(found, said, rows, strict=True):
        assert row["text"] == generator.generate([encode_chat(messages, chatty[1])], config)[0]
        assert asked.items() <= row.items()
    raw = streamed(run(chatty, config, raw=True), rows[0])
    assert raw[0]["text"] == generator.generate("the quick", config)


def test_the_lines_that_the_docs_show(chatty):
    page = (Path(__file__).parents[2] / "docs" / "generation.md").read_text(encoding="utf-8")
    body = page.split("```json\n")[1].split("```")[0]
    found = streamed(run(chatty, ph.GenerationConfig(max_new_tokens=3)), *body.splitlines())
    assert [row.get("id", row.get("topic")) for row in found] == ["q1", None, "greetings"]
    assert not any("error" in row for row in found)


def test_lines_of_text_and_what_is_zipped(plain):
    config = ph.GenerationConfig(max_new_tokens=2, temperature=0)
    text = '\ufeffthe "quick"\r\n\r\n  \n{fox\n'.encode()
    for raw, name in ((text, "a.txt"), (gzip.compress(text), "a.txt.gz"), (text, "-")):
        found = []
        run(plain, config).stream(PromptFile(io.BytesIO(raw), name), found.append)
        asked = {row["line"]: row["prompt"] for row in found}
        assert asked == {1: 'the "quick"', 4: "{fox"}
    zipped = gzip.compress(b'{"prompt": "fox"}\n')
    for raw, name in ((zipped, "a.jsonl.gz"), (b'\n {"prompt": "fox"}', "-")):
        assert [asked.prompt for asked in PromptFile(io.BytesIO(raw), name)] == ["fox"]
    with pytest.raises(FileError, match=r"cannot read a\.txt\.gz"):
        list(PromptFile(io.BytesIO(zipped[:-9]), "a.txt.gz"))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{'prompt'", "not JSON"),
        ("[1]", "write an object"),
        ("{}", "neither prompt nor messages"),
        ('{"prompt": null}', "neither prompt nor messages"),
        ('{"prompt": "a", "messages": [{"role": "user"}]}', "both prompt and messages"),
        ('{"prompt": 3}', "prompt is 3; it must be text"),
        ('{"prompt": "a", "system": 3}', "system is 3"),
        ('{"messages": "hello"}', "must be a list of objects"),
        ('{"messages": []}', "must be a list of objects"),
        ('{"messages": [{"content": "a"}]}', 'no "role"'),
        ('{"messages": [{"role": "system"}], "system": "b"}', "system message twice"),
        ('{"prompt": "a", "temperature": "hot"}', "temperature='hot' must be"),
        ('{"prompt": "a", "num_beams": 2}', "beams are not drawn"),
        ('{"prompt": "a", "negative_prompt": "b"}', "does nothing at guidance_scale=1"),
        ('{"prompt": "a", "trie": [[1]]}', "give a Trie"),
        ('{"prompt": "a", "temprature": 0}', "'temprature' is no setting; write temperature"),
        ('{"prompt": "a", "max_tokens": 9}', "write max_new_tokens"),
        ('{"prompt": "a", "text": "b"}', "'text' is a field of answers"),
        ('{"prompt": "\\ud800"}', "half a character"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "need a chat template"),
        ('{"prompt": "a", "system": "b"}', "need a chat template"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_written(plain, tmp_path, row, said):
    out = tmp_path / "a.jsonl"
    with pytest.raises(DataError) as error:
        run(plain).to_file(prompts('{"prompt": "fine"}', "", row), out)
    assert said in str(error.value)
    assert "prompts.jsonl, line 3" in str(error.value)
    assert "\n" not in str(error.value)
    assert not out.exists()


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.parquet", "a.json.gz"])
def test_tables_are_no_prompts(name):
    with pytest.raises(DataError, match="no file of prompts"):
        prompts("a", name=name)


def test_no_prompts(plain):
    with pytest.raises(DataError, match="holds no prompts"):
        streamed(run(plain), "", name="p.txt")


def test_what_does_not_fit_is_an_error_of_its_own(plain, chatty, tmp_path):
    out = tmp_path / "a.jsonl"
    asked = ["the", "lazy dog " * 99, "fox", "quick brown " * 99]
    made = run(plain).to_file(prompts(*asked, name="p.txt"), out)
    assert (made.prompts, made.done, made.failed) == (4, 4, 2)
    found = read(out)
    assert ["error" in row for row in found] == [False, True, False, True]
    assert "the model takes 128; shorten it" in found[1]["error"]
    assert "text" not in found[1]
    assert found[2]["text"] == ph.TextGenerator(*plain).generate("fox", DRAWN)
    # What is taken out is asked again.
    out.write_text("".join(f"{json.dumps(row)}\n" for row in found if "error" not in row))
    again = run(plain).to_file(prompts(*asked, name="p.txt"), out)
    assert (again.done, again.failed) == (4, 2)
    assert read(out) == found
    refused = streamed(run(chatty), {"messages": [{"role": "user", "content": {"no": "text"}}]})
    assert len(refused) == 1


def test_a_full_context_and_an_empty_prompt(chatty, plain):
    full = " ".join(WORDS * 40)
    ids = plain[1].encode(full)[:128]
    text = plain[1].decode(ids)
    assert len(plain[1].encode(text)) == 128
    (found,) = streamed(run(plain), {"prompt": text})
    assert (found["finish_reason"], found["tokens"]) == ("length", 0)
    (found,) = streamed(run(chatty), {"prompt": ""})
    assert found["tokens"] > 0


def test_there_is_room_for_long_prompts(plain):
    sizes = {"d_model": 8, "num_layers": 1, "num_heads": 1, "max_seq_len": 20000, "d_ff": 8}
    model = ph.build("llama", vocab_size=plain[1].vocab_size, **sizes)
    config = ph.GenerationConfig(
        max_new_tokens=40, seed=1, ignore_eos=True, num_return_sequences=3, stop_token_ids=()
    )
    found = streamed(run((model, plain[1]), config, rows=1), {"prompt": "z#" * 8000})
    texts = found[0]["texts"]
    assert texts[0]["prompt_tokens"] == 16000
    assert [text["tokens"] for text in texts] == [40] * 3
    # Guided texts share no prompt.
    for own in ({}, {"negative_prompt": "#z" * 7000}):
        found = streamed(
            run((model, plain[1]), config, rows=1),
            {"prompt": "z#" * 3000, "guidance_scale": 1.5, "max_new_tokens": 3, **own},
        )
        assert [text["tokens"] for text in found[0]["texts"]] == [3] * 3


def test_other_work_is_not_gone_on_with(plain, chatty, tmp_path):
    out = tmp_path / "a.jsonl"
    asked = [{"prompt": word} for word in WORDS]
    run(plain).to_file(prompts(*asked), out)
    before = out.read_bytes()
    others = [
        (run(plain, ph.GenerationConfig(max_new_tokens=8, seed=5)), asked, "max_new_tokens"),
        (run(plain, ph.GenerationConfig(max_new_tokens=9, seed=6)), asked, "seed"),
        (run(plain, raw=True), asked, "raw"),
        (run((ph.first_layers(plain[0], 1), plain[1])), asked, "model"),
        (run(chatty), asked, "tokenizer"),
        (run(plain), asked[1:], "prompts"),
        (run(plain), [*asked[:-1], {"prompt": "dog", "max_new_tokens": 10**12}], "prompts"),
    ]
    for work, rows, what in others:
        with pytest.raises(FileError, match=rf"of another run \(.*{what}"):
            work.to_file(prompts(*rows), out)
        assert out.read_bytes() == before
    # How many are written together is no other work.
    run(plain, rows=2).to_file(prompts(*asked), out)
    assert out.read_bytes() == before
    run(plain).to_file(prompts(*asked[:2]), out, force=True)
    assert [row["prompt"] for row in read(out)] == WORDS[:2]


def test_what_is_not_ours_stays(plain, tmp_path):
    out = tmp_path / "a.jsonl"
    out.write_text('{"dear": "diary"}\n')
    for force in (False, True):
        with pytest.raises(FileError, match="no file of answers"):
            run(plain).to_file(prompts('{"prompt": "a"}'), out, force=force)
        assert out.read_text() == '{"dear": "diary"}\n'
    with pytest.raises(FileError, match="is a directory"):
        run(plain).to_file(prompts('{"prompt": "a"}'), tmp_path)
    with pytest.raises(FileError, match="cannot write"):
        run(plain).to_file(prompts('{"prompt": "a"}'), tmp_path / "no" / "a.jsonl")


def test_one_run_at_a_time(plain, tmp_path):
    out = tmp_path / "a.jsonl"
    run(plain).to_file(prompts('{"prompt": "a"}'), out)
    with locked(out, "being read"), pytest.raises(FileError, match="by another process"):
        run(plain).to_file(prompts('{"prompt": "a"}'), out)


def test_settings_of_the_run_that_cannot_be(plain):
    with pytest.raises(ConfigError, match="rows=0"):
        run(plain, rows=0)
    with pytest.raises(DataError, match="needs a chat template"):
        run(plain, system="be brief")


def test_a_file_is_read_as_it_is_answered(plain):
    many = prompts(*({"prompt": "fox"} for _ in range(1000)))
    assert [asked.line for asked in islice(many, 3)] == [1, 2, 3]
    assert many.file.tell() < 200
