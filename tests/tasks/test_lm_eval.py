"""The adapter against lm-eval's own model over transformers."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import polyhead as ph
from polyhead.errors import ConfigError, DataError
from polyhead.tasks.evaluate.intervals import wilson
from polyhead.tasks.evaluate.run import compare

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)

WORDS = "hello world some more text the quick brown fox the lazy dog wörld".split()


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def saved(request, tmp_path_factory) -> Path:
    """A tiny model that both libraries load."""
    text = "hello world, some more text. the quick brown fox; wörld 日本 the lazy dog. " * 6
    special = {"bos": "<s>", "eos": "</s>"} if request.param == "llama" else None
    tokenizer = ph.Tokenizer.train(
        [text], kind="bpe", vocab_size=300, special_tokens=special, add_bos=special is not None
    )
    sizes = {"vocab_size": 300, "d_model": 32, "num_layers": 2, "num_heads": 4, "max_seq_len": 48}
    more = {"d_ff": 48, "num_kv_heads": 2} if request.param == "llama" else {}
    model = ph.build(request.param, seed=0, init_std=0.3, **sizes, **more)
    folder = tmp_path_factory.mktemp(request.param)
    model.save(folder)
    tokenizer.save(folder, force=True)
    return folder


@pytest.fixture(scope="module")
def both(saved):
    from lm_eval.models.huggingface import HFLM

    from polyhead.tasks.lm_eval import PolyheadLM

    theirs = HFLM(pretrained=str(saved), device="cpu", dtype="float32", batch_size=3)
    return PolyheadLM(str(saved), dtype="float32", most_tokens=200), theirs


def instances(kind: str, rows: list[tuple]) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, row, number) for number, row in enumerate(rows)]


def test_log_likelihoods(both):
    rows = [
        (context, continuation)
        for context in ("", "hello", "the quick brown ", " ".join(WORDS * 5), "wörld 日本\n")
        for continuation in (" fox", " the lazy dog", "x", "\nhello", " " + " ".join(WORDS))
    ]
    ours, theirs = (lm.loglikelihood(instances("loglikelihood", rows)) for lm in both)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-4)
        assert mine[1] == other[1]


def test_rolling_log_likelihoods(both):
    texts = [(" ".join(WORDS),), (" ".join(WORDS * 12),), ("x",), ("",)]
    ours, theirs = (
        lm.loglikelihood_rolling(instances("loglikelihood_rolling", texts)) for lm in both
    )
    assert ours == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize("until", [["e"], ["</s>", "\n\n"], "the"])
def test_texts(both, until):
    settings = {"until": until, "max_gen_toks": 7, "do_sample": False}
    rows = [(text, settings) for text in ("hello", "the quick", " ".join(WORDS * 6), "wörld")]
    ours, theirs = (lm.generate_until(instances("generate_until", rows)) for lm in both)
    assert ours == theirs


def test_chat_templates(saved):
    from polyhead.tasks.lm_eval import PolyheadLM

    tokenizer = ph.tokenizer(saved)
    tokenizer.chat_templates["default"] = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    lm = PolyheadLM(ph.load(saved), tokenizer)
    asked = [{"role": "user", "content": "hi"}]
    assert lm.apply_chat_template(asked) == "<user>hi</user><assistant>"
    begun = [*asked, {"role": "assistant", "content": "It is "}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False).endswith("<assistant>It is")
    assert lm.chat_template(True) == tokenizer.chat_template
    assert lm.tokenizer_name


def test_it_is_known_by_name(saved):
    from lm_eval.api.registry import get_model

    from polyhead.tasks.lm_eval import PolyheadLM

    assert get_model("polyhead") is PolyheadLM
    lm = get_model("polyhead").create_from_arg_string(
        f"model={saved},dtype=float32", {"batch_size": "auto", "device": "cuda:0"}
    )
    assert lm.max_length == 48
    assert lm.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: {kind}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
{more}
"""
CHOICES = """\
doc_to_choice: choices
metric_list:
  - metric: acc
  - metric: acc_norm
  - metric: acc_bytes
"""
MATCH = """\
generation_kwargs:
  until: ["."]
  max_gen_toks: 4
metric_list:
  - metric: exact_match
"""
ROLLING = """\
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> Path:
    """Tasks over local files, in lm-eval's own way."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    rows = [
        {
            "question": f"the quick brown {word}",
            "choices": ["fox", "lazy dog", "wörld 日本"],
            "answer": number % 3,
            "text": "dog",
        }
        for number, word in enumerate(WORDS)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, kind, target, more in (
        ("tiny_quiz", "multiple_choice", "answer", CHOICES),
        ("tiny_match", "generate_until", "text", MATCH),
        ("tiny_text", "loglikelihood_rolling", '"{{question}}"', ROLLING),
    ):
        page = TASK.format(name=name, data=data, kind=kind, target=target, more=more)
        (folder / f"{name}.yaml").write_text(page)
    return folder


def test_tasks_give_what_they_give_over_transformers(both, tasks):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    ours, theirs = both
    names = ["tiny_quiz", "tiny_match", "tiny_text"]
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    said = simple_evaluate(theirs, tasks=names, task_manager=manager, bootstrap_iters=0)
    chosen = [ph.HarnessTask(name, include_path=str(tasks)) for name in names]
    found = ph.evaluate(ours.model, ours.tokenizer, *chosen)
    for name, metric in (
        ("tiny_quiz", "acc"),
        ("tiny_quiz", "acc_norm"),
        ("tiny_match", "exact_match"),
        ("tiny_text", "word_perplexity"),
        ("tiny_text", "bits_per_byte"),
    ):
        expected = said["results"][name][f"{metric},none"]
        assert found[name][metric].value == pytest.approx(expected, rel=1e-4), (name, metric)
        assert found[name].samples == len(WORDS)
    # Ours over the same rows, without the package.
    (own,) = ph.evaluate(
        ours.model, ours.tokenizer, f"choices={tasks.parent / 'rows.jsonl'}"
    ).values()
    assert own["accuracy"].value == said["results"]["tiny_quiz"]["acc,none"]
    assert own["accuracy_norm"].value == said["results"]["tiny_quiz"]["acc_bytes,none"]


def test_a_task_of_lm_evals_is_kept_and_goes_on(saved, tasks, tmp_path, monkeypatch):
    from polyhead.tasks.lm_eval import PolyheadLM

    model, tokenizer = ph.load(saved), ph.tokenizer(saved)
    task, out = ph.HarnessTask("tiny_quiz", include_path=str(tasks)), tmp_path / "out"
    first = ph.evaluate(model, tokenizer, task, out=out)["tiny_quiz"]
    assert len((out / "tiny_quiz.jsonl").read_text().splitlines()) == len(WORDS)
    assert first["acc"].interval == wilson(round(first["acc"].value * len(WORDS)), len(WORDS))
    same = compare([task], {"tiny_quiz": first}, {"tiny_quiz": first})
    assert [one.interval for one in same] == [(0, 0)] * 3
    monkeypatch.setattr(PolyheadLM, "_scored", lambda *a: pytest.fail("asked again"))
    assert ph.evaluate(model, tokenizer, task, out=out)["tiny_quiz"]["acc"] == first["acc"]


def test_a_task_that_is_not_known(saved, monkeypatch):
    from lm_eval.tasks import TaskManager

    from polyhead.tasks.evaluate import harness

    manager = TaskManager(include_defaults=False)
    monkeypatch.setattr(harness, "_manager", lambda task: manager)
    model, tokenizer = ph.load(saved), ph.tokenizer(saved)
    with pytest.raises(DataError, match="lm-eval cannot run 'no_such_task'"):
        ph.evaluate(model, tokenizer, "no_such_task")


def test_a_model_needs_its_tokenizer(saved):
    from polyhead.tasks.lm_eval import PolyheadLM

    with pytest.raises(ConfigError, match="tokenizer"):
        PolyheadLM(ph.load(saved))


def test_its_command_line_knows_the_model(saved, tasks, monkeypatch, capsys):
    from polyhead.tasks.lm_eval import main

    def run(model: object) -> int:
        asked = ["--tasks", "tiny_quiz,tiny_text", "--include_path", str(tasks)]
        named = ["--model", "polyhead", "--model_args", f"model={model}"]
        monkeypatch.setattr("sys.argv", ["lm-eval", "run", *named, *asked])
        return main()

    assert run(saved) == 0
    said = capsys.readouterr().out
    assert "tiny_quiz" in said
    assert "word_perplexity" in said
    assert run(tasks / "nothing") == 2
    assert "no such file" in capsys.readouterr().err
