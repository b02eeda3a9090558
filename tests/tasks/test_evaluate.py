import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import normalizers

import polyhead as ph
from polyhead.errors import ConfigError, DataError, FileError
from polyhead.tasks.evaluate import run as module
from polyhead.tasks.evaluate.intervals import paired_interval, ratio_interval, wilson
from polyhead.tasks.evaluate.run import compare, task_named

WORDS = "hello world some more text the quick brown fox the lazy dog".split()


def quiz(count: int) -> list[dict]:
    rows = []
    for number in range(count):
        choices = [" ".join(WORDS[number % 7 : number % 7 + size]) for size in (1, 2, 4)]
        rows.append(
            {
                "question": f"the quick brown {WORDS[number % len(WORDS)]}",
                "choices": choices,
                "answer": choices[number % 3] if number % 2 else number % 3,
            }
        )
    return rows


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def logprob(model, tokenizer, context: str, continuation: str) -> float:
    before, ids = tokenizer.encode(context), tokenizer.encode(context + continuation)
    with torch.no_grad():
        found = model(torch.tensor([ids]))[0].log_softmax(-1)
    return sum(float(found[i - 1, ids[i]]) for i in range(len(before), len(ids)))


@pytest.mark.parametrize("shots", [0, 2])
def test_choices(tmp_path, model, tokenizer, shots):
    rows = quiz(9)
    path = write(tmp_path / "quiz.jsonl", rows)
    found = ph.evaluate(model, tokenizer, ph.ChoicesTask(path, shots=shots), most_tokens=300)
    result = found[f"choices={path}"]
    right = right_norm = 0
    solved = []
    places = [
        row["choices"].index(row["answer"]) if isinstance(row["answer"], str) else row["answer"]
        for row in rows
    ]
    for row, place in list(zip(rows, places, strict=True))[:shots]:
        solved.append(f"{row['question']} {row['choices'][place]}")
    for number, (row, place) in list(enumerate(zip(rows, places, strict=True)))[shots:]:
        text = "\n\n".join([*solved, row["question"]])
        expected = [logprob(model, tokenizer, text, f" {choice}") for choice in row["choices"]]
        record = result.records[number - shots]
        assert record["logprobs"] == pytest.approx(expected, abs=1e-4)
        assert record["row"] == number
        by_byte = [p / len(c.encode()) for p, c in zip(expected, row["choices"], strict=True)]
        right += expected.index(max(expected)) == place
        right_norm += by_byte.index(max(by_byte)) == place
    count = len(rows) - shots
    assert result.samples == count
    assert result["accuracy"].value == right / count
    assert result["accuracy_norm"].value == right_norm / count
    assert result["accuracy"].interval == wilson(right, count)


def test_a_template_and_other_names_of_columns(tmp_path, model, tokenizer):
    rows = quiz(4)
    plain = write(tmp_path / "plain.jsonl", [{**r, "question": f"Q {r['question']}"} for r in rows])
    other = [{"ctx": r["question"], "ends": r["choices"], "label": r["answer"]} for r in rows]
    named = write(tmp_path / "named.jsonl", other)
    columns = {"question": "ctx", "choices": "ends", "answer": "label"}
    task = ph.ChoicesTask(named, prompt="Q {ctx}", columns=columns)
    found = ph.evaluate(model, tokenizer, f"choices={plain}", task)
    first, second = found.values()
    assert [r["logprobs"] for r in first.records] == [r["logprobs"] for r in second.records]


def test_choices_after_nothing(tmp_path, model, with_bos):
    path = write(tmp_path / "q.jsonl", [{"question": "", "choices": ["hello", "fox"], "answer": 0}])
    task = ph.ChoicesTask(path, prompt="", before="")
    (record,) = ph.evaluate(model, with_bos, task)[task.name].records
    for choice, found in zip(("hello", "fox"), record["logprobs"], strict=True):
        assert found == pytest.approx(logprob(model, with_bos, "", choice), abs=1e-4)


def test_perplexity_of_a_text_is_that_of_its_function(tmp_path, model, tokenizer, text):
    path = tmp_path / "text.txt"
    path.write_text(text)
    task = ph.PerplexityTask(path, context=20, stride=7)
    result = ph.evaluate(model, tokenizer, task)[task.name]
    expected = ph.perplexity(model, tokenizer, text, context=20, stride=7)
    assert result["perplexity"].value == pytest.approx(expected.perplexity, rel=1e-5)
    assert result["bits_per_byte"].value == pytest.approx(expected.bits_per_byte, rel=1e-5)
    low, high = result["perplexity"].interval
    assert low < expected.perplexity < high
    assert sum(record["tokens"] for record in result.records) == expected.tokens
    assert f"{result.samples} windows" in result.note


def test_perplexity_by_documents(tmp_path, model, tokenizer):
    texts = ["hello world, some more text", "the quick brown fox", "the lazy dog; wörld"]
    path = write(tmp_path / "docs.jsonl", [{"body": text} for text in texts])
    task = ph.PerplexityTask(path, columns={"text": "body"})
    result = ph.evaluate(model, tokenizer, task)[task.name]
    each = [ph.perplexity(model, tokenizer, text) for text in texts]
    nats, size = sum(p.loss * p.tokens for p in each), sum(p.bytes for p in each)
    assert result["bits_per_byte"].value == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    units = [(p.loss * p.tokens, p.tokens) for p in each]
    expected = ratio_interval(*zip(*units, strict=True))
    assert result["loss"].interval == pytest.approx(expected, rel=1e-5)
    assert "3 documents" in result.note


def test_exact_match(tmp_path, model, tokenizer):
    questions = ["hello world", "the quick", "some more", "lazy"]
    config = ph.GenerationConfig(max_new_tokens=5, temperature=0)
    said = ph.TextGenerator(model, tokenizer).generate(questions, config)
    answers = [str(said[0]), ["nothing", f"  {said[1].upper()} "], "wrong", str(said[3])]
    rows = [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)]
    path = write(tmp_path / "asks.jsonl", rows)
    task = ph.MatchTask(path, max_new_tokens=5, stop=())
    result = ph.evaluate(model, tokenizer, task)[task.name]
    assert [record["text"] for record in result.records] == said
    assert [record["right"] for record in result.records] == [True, False, False, True]
    assert result["exact_match"].value == 0.5
    loose = ph.MatchTask(path, max_new_tokens=5, stop=(), ignore=("case",))
    assert ph.evaluate(model, tokenizer, loose)[task.name]["exact_match"].value == 0.75


@pytest.mark.parametrize(
    ("ignore", "extract", "said", "answer", "right"),
    [
        ((), None, "  two \n words ", "two words", True),
        ((), None, "Two", "two", False),
        (("case", "punctuation", "articles"), None, "The cat!", "a Cat", True),
        (("numbers",), None, "7 cats", "cats", True),
        ((), r"-?\d+", "from 3 to -12.", "-12", True),
        ((), r"#### (\d+)", "3 + 4 #### 7", "7", True),
        ((), r"\d+", "none", "7", False),
    ],
)
def test_what_counts_as_a_match(monkeypatch, tmp_path, model, tokenizer, ignore, extract, said,
                                answer, right):  # fmt: skip
    monkeypatch.setattr("polyhead.tasks.evaluate.match.written", lambda *a, **k: [said])
    path = write(tmp_path / "q.jsonl", [{"question": "hello", "answer": answer}])
    task = ph.MatchTask(path, ignore=ignore, extract=extract)
    (record,) = ph.evaluate(model, tokenizer, task)[task.name].records
    assert record["right"] == right


def test_a_table_of_questions(tmp_path, model, tokenizer):
    path = tmp_path / "asks.tsv"
    path.write_text('question\tanswer\nhello "world"\t7\nthe fox\t8\n')
    result = ph.evaluate(model, tokenizer, ph.MatchTask(path, max_new_tokens=2))
    records = result[f"match={path}"].records
    assert [(r["prompt"], r["answers"]) for r in records] == [
        ('hello "world"', ["7"]),
        ("the fox", ["8"]),
    ]


def test_prompts_that_are_too_long_lose_their_beginning(tmp_path, model, tokenizer, text):
    row = {"question": text[:200], "choices": ["a", "b"], "answer": 0}
    path = write(tmp_path / "q.jsonl", [{**row, "question": "the"}, row])
    found = ph.evaluate(model, tokenizer, f"choices={path}", ph.MatchTask(path, max_new_tokens=4))
    assert [result.cut for result in found.values()] == [1, 1]


ROW = {"question": "the", "choices": ["a", "b"], "answer": 0}


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("choices", [], "has no rows"),
        ("choices", [ROW, {"question": "x", "answer": 0}], "row 2 has no 'choices'.*--columns"),
        ("choices", [{**ROW, "answer": 2}], "row 1: the answer is 2; places go from 0 to 1"),
        ("choices", [{**ROW, "answer": -1}], "row 1: the answer is -1"),
        ("choices", [{**ROW, "answer": "c"}], "'c' is none of the choices"),
        ("choices", [{**ROW, "answer": True}], "the answer is True"),
        ("choices", [{**ROW, "choices": ["a"]}], "list of 2"),
        ("choices", [{**ROW, "choices": ["a", " "]}], "choice 1 is empty"),
        ("choices", [{"q": "x"}], "has no 'choices', only q"),
        ("choices", ["word"], "line 1 is 'word'"),
        ("match", [{"question": "x", "answer": []}], "give a text, or a list"),
        ("match", [{"question": "x"}], "has no 'answer'"),
        ("perplexity", [{"body": "x"}], "row 1 has no 'text', only body"),
        ("perplexity", [{"text": "hello"}, {"text": ""}], "text 2: .*no token to score"),
    ],
)
def test_files_that_do_not_fit(tmp_path, model, tokenizer, kind, rows, message):
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=message):
        ph.evaluate(model, tokenizer, f"{kind}={path}")


def test_a_choice_that_becomes_no_token(tmp_path, model, text):
    tokenizer = ph.Tokenizer.train([text], kind="bpe", vocab_size=300)
    tokenizer.backend.normalizer = normalizers.Replace("日本", "")
    path = write(tmp_path / "q.jsonl", [{**ROW, "choices": ["cat", "日本"]}])
    task = ph.ChoicesTask(path, before="")
    with pytest.raises(DataError, match="row 1: '日本' becomes no token"):
        ph.evaluate(model, tokenizer, task)


@pytest.mark.parametrize(
    ("tasks", "options", "error", "message"),
    [
        ((), {}, ConfigError, "name at least one task"),
        (("choices=q.jsonl",) * 2, {}, ConfigError, "two tasks are called choices.q"),
        (("guess=q.jsonl",), {}, ConfigError, "'guess' is none of perplexity, choices, match"),
        (("match=",), {}, ConfigError, "names no file"),
        (("choices=none.jsonl",), {}, FileError, "none.jsonl is no file"),
        (("choices=q.jsonl",), {"limit": 0}, ConfigError, "limit is 0"),
        (("choices=q.jsonl",), {"most_tokens": 0}, ConfigError, "most_tokens is 0"),
        (("choices=q.md",), {}, DataError, "no .jsonl"),
    ],
)
def test_calls_that_cannot_be(
    tmp_path, monkeypatch, model, tokenizer, tasks, options, error, message
):
    monkeypatch.chdir(tmp_path)
    for name in ("q.jsonl", "q.md"):
        write(tmp_path / name, [ROW])
    with pytest.raises(error, match=message):
        ph.evaluate(model, tokenizer, *tasks, **options)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("choices", {"columns": {"text": "x"}}, "'text'; choices reads question, choices, answer"),
        ("choices", {"shots": -1}, "shots=-1"),
        ("match", {"ignore": ("accents",)}, "'accents'; it can be"),
        ("match", {"extract": "("}, "no regular expression"),
        ("match", {"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_settings_that_cannot_be(kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        task_named(f"{kind}=q.jsonl", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shots": 1}, "shots=1 must be from 0 to 0"),
        ({"prompt": "{topic}"}, r"names \{topic\}, and the columns are question, choices, answer"),
        ({"chat": True}, "no chat template"),
    ],
)
def test_settings_that_do_not_fit_the_file(tmp_path, model, tokenizer, settings, message):
    path = write(tmp_path / "q.jsonl", [ROW])
    with pytest.raises(ConfigError, match=message):
        ph.evaluate(model, tokenizer, ph.ChoicesTask(path, **settings))


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch, model, tokenizer):
    path = write(tmp_path / "quiz.jsonl", quiz(12))
    task, out = f"choices={path}", tmp_path / "out"
    usual = ph.evaluate(model, tokenizer, task)[task]
    seen = []

    def stop(done: int, every: int) -> None:
        seen.append(done)
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ph.evaluate(model, tokenizer, task, out=out, most_tokens=60, progress=stop)
    lines = out / "choices.quiz.jsonl"
    kept = len(lines.read_text().splitlines())
    assert 4 <= kept < 12
    with lines.open("a") as file:
        file.write('{"row": 99, "torn')
    asked = []
    answer = ph.ChoicesTask.answer
    monkeypatch.setattr(
        ph.ChoicesTask, "answer", lambda *a: asked.extend(a[2]) or answer(*a), raising=True
    )
    again = ph.evaluate(model, tokenizer, task, out=out)[task]
    assert len(asked) == 12 - kept
    assert again["accuracy"] == usual["accuracy"]
    assert [r["row"] for r in again.records] == list(range(12))
    assert [json.loads(line) for line in lines.read_text().splitlines()] == list(again.records)
    # A finished one computes nothing, a smaller limit neither.
    asked.clear()
    assert ph.evaluate(model, tokenizer, task, out=out, limit=5)[task].samples == 5
    assert asked == []


def test_another_evaluation_is_not_continued(tmp_path, model, tokenizer):
    path, out = write(tmp_path / "quiz.jsonl", quiz(4)), tmp_path / "out"
    ph.evaluate(model, tokenizer, f"choices={path}", out=out)
    with pytest.raises(FileError, match=r"another evaluation \(settings\)"):
        ph.evaluate(model, tokenizer, ph.ChoicesTask(path, shots=1), out=out)
    other = ph.build("gpt2", seed=5, vocab_size=300, d_model=16, num_layers=1, num_heads=2)
    with pytest.raises(FileError, match=r"another evaluation \(model\)"):
        ph.evaluate(other, tokenizer, f"choices={path}", out=out)
    write(path, quiz(5))
    with pytest.raises(FileError, match=r"another evaluation \(file\)"):
        ph.evaluate(model, tokenizer, f"choices={path}", out=out)
    found = ph.evaluate(model, tokenizer, f"choices={path}", out=out, force=True)
    assert found[f"choices={path}"].samples == 5


def test_two_models(tmp_path, tokenizer, text):
    sizes = {"vocab_size": 300, "d_model": 16, "num_layers": 1, "num_heads": 2, "max_seq_len": 48}
    models = [ph.build("gpt2", seed=seed, init_std=0.3, **sizes).eval() for seed in (0, 1)]
    (tmp_path / "text.txt").write_text(text)
    tasks = [
        task_named(f"choices={write(tmp_path / 'quiz.jsonl', quiz(9))}"),
        task_named(f"perplexity={tmp_path / 'text.txt'}", context=20),
    ]
    first, second = (ph.evaluate(model, tokenizer, *tasks) for model in models)
    for one in compare(tasks, first, second):
        expected = second[one.task][one.metric].value - first[one.task][one.metric].value
        assert one.value == pytest.approx(expected)
        if one.metric == "perplexity":
            assert one.interval is None
        else:
            low, high = one.interval
            assert low <= one.value <= high
    same = {one.metric: one for one in compare(tasks, first, first)}
    assert same["loss"].interval == (0, 0)
    # Pairs tell more than two intervals do: they leave out what both models find hard.
    single = first[tasks[1].name]["loss"].interval
    assert same["loss"].interval[1] < single[1] - single[0]


def test_windows_that_do_not_meet_are_no_pairs(tmp_path, model, tokenizer, text):
    path = tmp_path / "text.txt"
    path.write_text(text)
    tasks = [task_named(f"perplexity={path}", context=context) for context in (20, 30)]
    one, other = (ph.evaluate(model, tokenizer, task) for task in tasks)
    assert all(d.interval is None for d in compare(tasks[:1], one, other))


def test_an_encoder_decoder(tmp_path):
    from tests.tasks.test_translate import make

    model, tokenizer = make(tmp_path / "model")
    rows = [{"question": "a b", "choices": ["b a", "c"], "answer": 0}] * 2
    path = write(tmp_path / "q.jsonl", rows)
    match = ph.MatchTask(write(tmp_path / "m.jsonl", [{"question": "a b", "answer": "b a"}] * 2))
    found = ph.evaluate(model, tokenizer, f"choices={path}", match)
    assert [result.samples for result in found.values()] == [2, 2]
    with pytest.raises(ConfigError, match="decoder"):
        ph.evaluate(model, tokenizer, f"perplexity={path}")


@pytest.mark.parametrize(
    ("right", "every", "low", "high"),
    # R 4.3: prop.test(x, n, correct = FALSE)$conf.int
    [(0, 10, 0.0, 0.27753), (5, 10, 0.23659, 0.76341), (81, 263, 0.25531, 0.36620),
     (10, 10, 0.72247, 1.0)],
)  # fmt: skip
def test_wilson(right, every, low, high):
    assert wilson(right, every) == pytest.approx((low, high), abs=1e-4)


def test_bootstrap_intervals_are_those_of_theory():
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(400, generator=draw, dtype=torch.float64) * 3 + 10
    low, high = ratio_interval(values.tolist(), [1.0] * 400)
    spread = 1.96 * float(values.std()) / 20
    mean = float(values.mean())
    assert (low, high) == pytest.approx((mean - spread, mean + spread), abs=0.05)
    assert ratio_interval(values.tolist(), [1.0] * 400) == (low, high)
    assert ratio_interval([1.0], [1.0]) is None
    moved = [(v + 0.5, 1.0) for v in values.tolist()]
    paired = paired_interval([(v, 1.0) for v in values.tolist()], moved)
    assert paired == pytest.approx((0.5, 0.5))


def test_progress_reaches_the_end(tmp_path, model, tokenizer):
    path = write(tmp_path / "quiz.jsonl", quiz(6))
    seen = []
    ph.evaluate(
        model, tokenizer, f"choices={path}", most_tokens=50,
        progress=lambda done, every: seen.append((done, every)),
    )  # fmt: skip
    assert seen[0] == (0, 6)
    assert seen[-1] == (6, 6)
    assert len(seen) > 2
    assert module.file_name("choices=a/b c.jsonl") == "choices.b_c"
