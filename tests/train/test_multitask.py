import pytest
import torch

import polyhead as ph
from polyhead.errors import ConfigError, FileError
from polyhead.train.data import Examples, Mixed, once
from polyhead.train.loop import Trainer
from polyhead.train.multitask import OneTask, TaskSource, multitask, read_tasks, tasks_of
from polyhead.train.records import ExampleColumns
from polyhead.train.registry import OBJECTIVES, TASKS

from .tables import bert, classes, sentences, settings, wordpiece


def tagged(count, seed=0):
    return [
        {"tokens": w, "tags": ["B-A" if x in ("cat", "dog") else "O" for x in w]}
        for w in sentences(count, seed)
    ]


def measured(count, seed=0):
    return [
        {"text": " ".join(w), "label": sum(x in ("cat", "sky") for x in w) + 0.5}
        for w in sentences(count, seed)
    ]


def sources(count=60, seed=0):
    return {
        "kind": TaskSource(classes(count, seed), "classify"),
        "animals": TaskSource(tagged(2 * count, seed), "tag"),
        "amount": TaskSource(measured(count // 2, seed), "classify"),
    }


def model_for(some, tokenizer, **fields):
    return bert(tokenizer, "multitask", tasks=tasks_of(some, TASKS), **fields)


class Counted:
    """Rows that say which they are."""

    def __init__(self, rows):
        self.rows = rows

    def tokens(self):
        return len(self.rows)

    def to(self, device):
        return self


def counted(size, seed=0):
    return Examples(range(size), Counted, seed, "")


@pytest.mark.parametrize("sizes", [{"a": 40, "b": 13, "c": 1}, {"a": 8}])
def test_an_epoch_has_every_batch_of_every_task_once(sizes):
    mixed = Mixed({name: counted(size) for name, size in sizes.items()}, 3, "")
    counts = {name: -(-size // 4) for name, size in sizes.items()}
    whole = sum(counts.values())
    for epoch in range(3):
        batches = [mixed.batch(epoch * whole + i, 4) for i in range(whole)]
        for name, size in sizes.items():
            own = [batch for batch in batches if batch.task == name]
            assert len(own) == counts[name]
            rows = [row for batch in own for row in batch.batch.rows]
            if size % 4 == 0:
                assert sorted(rows) == list(range(size))
    again = [mixed.batch(i, 4) for i in range(whole)]
    assert [(b.task, b.batch.rows) for b in again] == [
        (b.task, b.batch.rows) for b in (mixed.batch(i, 4) for i in range(whole))
    ]
    if len(sizes) > 1:
        orders = [[mixed.batch(e * whole + i, 4).task for i in range(whole)] for e in range(4)]
        assert len(set(map(tuple, orders))) > 1
    seen = {name: [] for name in sizes}
    for batch in once(mixed, 4):
        seen[batch.task] += batch.batch.rows
        assert batch.rows == len(batch.batch.rows)
    assert {name: sorted(rows) for name, rows in seen.items()} == {
        name: list(range(size)) for name, size in sizes.items()
    }


@pytest.mark.parametrize("rows", [1, 3, 4, 7, 8, 30])
def test_once_is_every_row_once(rows):
    for size in (1, 4, 5):
        seen = [row for batch in once(counted(rows), size) for row in batch.rows]
        assert sorted(seen) == list(range(rows))
        first = [row for batch in once(counted(rows), size, 1) for row in batch.rows]
        assert first == seen[: min(size, rows)]


def test_a_batch_of_a_task_is_learned_as_by_a_model_of_that_task(tmp_path):
    tokenizer, some = wordpiece(), sources()
    model = model_for(some, tokenizer).eval()
    kind = OBJECTIVES["multitask"]
    mixed = kind.dataset(some, tokenizer, model, settings(tmp_path), "train")
    seen = set()
    for index in range(20):
        batch = mixed.batch(index, 4)
        seen.add(batch.task)
        head = model.config.tasks[batch.task]["head"]
        alone = bert(
            tokenizer, head, labels=tuple(model.config.tasks[batch.task]["labels"]),
            problem=model.config.tasks[batch.task]["problem"],
        ).eval()  # fmt: skip
        alone.backbone.load_state_dict(model.backbone.state_dict())
        alone.head.load_state_dict(model.head[batch.task].state_dict())
        if alone.pooler is not None:
            alone.pooler.load_state_dict(model.pooler.state_dict())
        with torch.no_grad():
            expected = TASKS[head].loss(alone, batch.batch)
            found = multitask(TASKS, model, batch)
        assert found.tokens == 4
        assert float(found.total) == pytest.approx(4 * float(expected.total) / expected.tokens)
    assert seen == set(some)


def test_several_heads_learn_together_and_are_saved(tmp_path):
    tokenizer, some = wordpiece(), sources(200)
    model = model_for(some, tokenizer)
    config = settings(tmp_path / "run", steps=300, lr=2e-3)
    trainer = Trainer(model, tokenizer, config, objective="multitask", quiet=True)
    result = trainer.fit(some)
    assert result["valid_kind_accuracy"] > 0.8
    assert result["valid_animals_entity_f1"] > 0.9
    assert result["valid_amount_pearson"] > 0.5
    firsts = ("kind_accuracy", "animals_entity_f1", "amount_pearson")
    assert result["valid_mean"] == pytest.approx(sum(result[f"valid_{f}"] for f in firsts) / 3)
    saved = ph.load(result["best"])
    assert saved.head_kind == "multitask"
    assert saved.config.tasks["animals"]["labels"] == ["O", "B-A"]
    ids = torch.tensor([tokenizer.encode("the cat sat")])
    with torch.no_grad():
        assert saved(ids, head="kind").shape == (1, 3)
        assert torch.equal(OneTask(saved, "kind")(input_ids=ids), saved(ids, head="kind"))
        assert saved(ids, head="animals").shape == (1, ids.shape[1], 2)


def test_tasks_of_a_file(tmp_path):
    (tmp_path / "a.tsv").write_text("mood\twords\n1\tup\n0\tdown\n")
    (tmp_path / "b.tsv").write_text("0.5\tup\n1\tdown\n")
    path = tmp_path / "tasks.toml"
    path.write_text(
        '[a]\ndata = "a.tsv"\nhead = "classify"\nroles = {text = "words", label = "mood"}\n'
        '[b]\ndata = "b.tsv"\nhead = "classify"\nproblem = "regression"\n'
        'columns = ["label", "text"]\n'
    )
    found = read_tasks(path)
    assert found["a"].columns == ExampleColumns({"text": "words", "label": "mood"})
    assert tasks_of(found, TASKS) == {
        "a": {
            "head": "classify", "labels": ["0", "1"], "problem": "single_label_classification",
        },
        "b": {"head": "classify", "labels": ["score"], "problem": "regression"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names no tasks"),
        ("[a]\nhead = 'tag'\n", "task 'a' has data and head"),
        ("[a]\nhead = 'tag'\ndata = 'x'\ncolour = 1\n", "may have problem"),
        ("[a\n", "is not TOML"),
        ("[a]\ndata = 3\nhead = 'tag'\n", "data of task 'a' is 3"),
        ("[a]\ndata = 'x'\nhead = 'tag'\nroles = 'text'\n", "roles of task 'a' is 'text'"),
        ("[a]\ndata = 'x'\nhead = 'tag'\ncolumns = 'a,b'\n", "columns of task 'a' is 'a,b'"),
    ],
)
def test_bad_files_of_tasks_are_one_line(tmp_path, text, says):
    (tmp_path / "tasks.toml").write_text(text)
    with pytest.raises((ConfigError, FileError), match=says):
        read_tasks(tmp_path / "tasks.toml")


def test_sources_that_are_not_the_models_tasks_are_said(tmp_path):
    tokenizer, some = wordpiece(), sources()
    model = model_for(some, tokenizer)
    trainer = Trainer(model, tokenizer, settings(tmp_path / "run"), objective="multitask")
    with pytest.raises(ConfigError, match="has the tasks kind, animals, amount"):
        trainer.fit({"kind": some["kind"]})
    with pytest.raises(ConfigError, match="head 'embed': choose one of classify, tag, answer"):
        tasks_of({"x": TaskSource([], "embed")}, TASKS)
    with pytest.raises(ConfigError, match="head 'lm': choose one of classify, tag"):
        tasks_of({"x": TaskSource([], "lm")}, TASKS)


def test_a_task_of_one_label_is_saved_as_the_measure_it_learned(tmp_path):
    tokenizer = wordpiece()
    tasks = {"amount": {"head": "classify", "labels": ["score"]}, "animals": {"head": "tag"}}
    tasks["animals"]["labels"] = ["O", "B-A"]
    model = bert(tokenizer, "multitask", tasks=tasks)
    some = {"amount": TaskSource(measured(20), "classify"), "animals": TaskSource(tagged(9), "tag")}
    config = settings(tmp_path / "run", steps=2)
    result = Trainer(model, tokenizer, config, objective="multitask", quiet=True).fit(some)
    saved = ph.load(result["best"])
    assert saved.config.tasks["amount"]["problem"] == "regression"
    assert "problem" not in saved.config.tasks["animals"]
    logits = saved(torch.tensor([tokenizer.encode("the cat")]), head="amount")
    (found,) = ph.Classifier(saved, tokenizer, "amount")("the cat")
    assert found.score == pytest.approx(float(logits), abs=1e-6)
