import pytest
import torch
import transformers

from polyhead.errors import ConfigError, DataError
from polyhead.train.loop import Trainer
from polyhead.train.records import read_table
from polyhead.train.registry import OBJECTIVES

from .tables import bert, sentences, settings, wordpiece

KIND = OBJECTIVES["answer"]


def rows_of(count, seed=0, longest=9, lacking=0):
    """Asked where an animal is, the answer is the two words from it on."""
    rows = []
    for number, words in enumerate(sentences(count, seed, longest)):
        words = [w for w in words if w not in ("cat", "dog")]
        at = len(words) // 2
        animal = ("cat", "dog")[number % 2]
        context = " ".join([*words[:at], animal, "naps", *words[at:]])
        answer = f"{animal} naps" if number >= lacking else ""
        question = f"{animal if answer else 'fish'} ?"
        rows.append({"question": question, "context": context, "answer": answer})
    return rows


def dataset_of(rows, tokenizer, model, out, stride=4, **more):
    table = read_table(rows, KIND.columns)
    config = settings(out, held_out=0.0, **more)
    return KIND.dataset(table, tokenizer, model, config, "train", stride=stride)


@pytest.mark.parametrize(("context", "stride"), [(64, 4), (16, 4), (11, 0), (12, 2)])
def test_windows_hold_the_answer_where_they_hold_it_whole(tmp_path, context, stride):
    tokenizer = wordpiece("naps ?")
    rows = rows_of(9, longest=14, lacking=2)
    rows[5] = {**rows[5], "context": "cat naps. " + rows[5]["context"]}
    model = bert(tokenizer, "answer")
    dataset = dataset_of(rows, tokenizer, model, tmp_path, stride, context=context)
    seen: dict[int, int] = {}
    covered: dict[int, set[int]] = {}
    for number in range(len(dataset.rows)):
        _, row, window = dataset.rows[number]
        batch = dataset.collate([dataset.rows[number]])
        text, answer = rows[row]["context"], rows[row]["answer"]
        ids = batch.inputs["input_ids"][0]
        assert len(ids) <= context
        # transformers' own windows: the same tokens in the same order.
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=type(tokenizer.backend).from_str(tokenizer.backend.to_str())
        )
        theirs = fast(
            rows[row]["question"], text, max_length=context, stride=stride,
            truncation="only_second", return_overflowing_tokens=True,
        )  # fmt: skip
        assert ids.tolist() == theirs["input_ids"][window]
        first, last = batch.labels[0].tolist()
        offsets = batch.offsets[0].tolist()
        inside = [t for t in range(len(ids)) if batch.in_context[0, t]]
        covered.setdefault(row, set()).update(
            c for t in inside for c in range(offsets[t][0], offsets[t][1])
        )
        start = text.find(answer)
        holds = (
            bool(answer)
            and offsets[inside[0]][0] <= start
            and (start + len(answer) <= offsets[inside[-1]][1])
        )
        if holds:
            assert text[offsets[first][0] : offsets[last][1]] == answer
            seen[row] = seen.get(row, 0) + 1
        else:
            assert (first, last) == (0, 0)
    spaces = [{i for i, c in enumerate(r["context"]) if c == " "} for r in rows]
    for row, text in enumerate(rows):
        assert covered[row] | spaces[row] == set(range(len(text["context"])))
    if context == 64:
        assert sorted(seen) == list(range(2, 9))
        assert len(dataset) == 9
    else:
        assert len(dataset) > 9


def test_the_loss_is_transformers_and_ignores_padding(tmp_path):
    tokenizer = wordpiece("naps ?")
    model = bert(tokenizer, "answer").eval()
    dataset = dataset_of(rows_of(6, longest=20), tokenizer, model, tmp_path)
    model.save(tmp_path / "model")
    theirs = transformers.BertForQuestionAnswering.from_pretrained(tmp_path / "model").eval()
    losses = []
    for row in range(len(dataset)):
        batch = dataset.collate([dataset.rows[row]])
        first, last = batch.labels.unbind(1)
        hf = theirs(**batch.inputs, start_positions=first, end_positions=last)
        losses.append(float(KIND.loss(model, batch).total))
        assert losses[-1] == pytest.approx(float(hf.loss), rel=1e-5)
    together = KIND.loss(model, dataset.collate([dataset.rows[i] for i in range(len(dataset))]))
    assert float(together.total) == pytest.approx(sum(losses), rel=1e-5)
    assert together.tokens == len(dataset)


def test_the_best_span_by_brute_force(tmp_path):
    tokenizer = wordpiece("naps ?")
    model = bert(tokenizer, "answer", init_std=1.0).eval()
    rows = rows_of(7, longest=12, lacking=3)
    dataset = dataset_of(rows, tokenizer, model, tmp_path, context=14)
    batches = [dataset.collate([dataset.rows[i]]) for i in range(len(dataset))]
    answers = [KIND.loss(model, batch).answers for batch in batches]
    best: dict[int, tuple[float, str]] = {}
    null: dict[int, float] = {}
    for number, batch in enumerate(batches):
        row = dataset.rows[number][1]
        with torch.no_grad():
            start, end = model(**batch.inputs)[0].unbind(-1)
        null[row] = min(null.get(row, 1e9), float(start[0] + end[0]))
        for i in range(len(start)):
            for j in range(i, len(start)):
                if batch.in_context[0, i] and batch.in_context[0, j]:
                    low, high = batch.offsets[0, i, 0], batch.offsets[0, j, 1]
                    text = rows[row]["context"][low:high]
                    best[row] = max(best.get(row, (-1e9, "")), (float(start[i] + end[j]), text))
    said = ["" if null[row] > best[row][0] else best[row][1] for row in range(7)]
    exact = [float(mine == row["answer"]) for mine, row in zip(said, rows, strict=True)]
    figures = KIND.metric(model, dataset, answers)
    assert figures["exact_match"] == pytest.approx(sum(exact) / 7)
    assert 0 <= figures["exact_match"] <= figures["f1"] <= 1


def test_a_model_learns_to_answer_and_to_pass(tmp_path):
    tokenizer = wordpiece("naps ?")
    model = bert(tokenizer, "answer")
    config = settings(tmp_path / "run", steps=120, context=24, batch_size=16)
    trainer = Trainer(model, tokenizer, config, objective="answer", quiet=True)
    result = trainer.fit(rows_of(200, lacking=60))
    assert result["valid_f1"] > 0.9
    assert trainer.evaluate(rows_of(20, seed=3))["exact_match"] > 0.8


def test_answers_as_squad_writes_them(tmp_path):
    tokenizer = wordpiece()
    model = bert(tokenizer, "answer")
    squad = {"question": "cat", "context": "a cat on a cat"}
    rows = [
        {**squad, "answers": {"text": ["cat"], "answer_start": [11]}},
        {**squad, "answers": {"text": [], "answer_start": []}},
    ]
    dataset = dataset_of(rows, tokenizer, model, tmp_path)
    assert dataset.rows.answers == [[("cat", 11)], []]
    lists = [{**squad, "answers": [{"text": "cat", "answer_start": 11}]}, {**squad, "answers": []}]
    assert dataset_of(lists, tokenizer, model, tmp_path).rows.answers == dataset.rows.answers
    # [CLS] cat [SEP] a cat on a cat [SEP]
    labels = dataset.collate([dataset.rows[0], dataset.rows[1]]).labels
    assert labels.tolist() == [[7, 7], [0, 0]]
    by_start = [{**squad, "answer": "cat", "start": "11"}, {**squad, "answer": "", "start": ""}]
    assert dataset_of(by_start, tokenizer, model, tmp_path).rows.answers == [[("cat", 11)], []]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"answer": "dog"}, "'dog' is not in its context"),
        ({"answer": "cat", "start": 3}, "'cat' is not at character 3"),
        ({"answer": "cat", "start": "x"}, "start is 'x'"),
        ({}, "row 0 has no answer"),
        ({"answer": 3}, "the answer is 3: it must be text"),
        ({"answer": "cat", "question": "a " * 29}, "row 0: the question has 29 tokens .* lower"),
        ({"context": None, "answer": "cat"}, "context of row 0 is missing"),
    ],
)
def test_bad_answers_are_one_line(tmp_path, row, says):
    tokenizer = wordpiece()
    row = {"question": "a", "context": "the cat sat", **row}
    with pytest.raises(DataError, match=says):
        dataset_of([row], tokenizer, bert(tokenizer, "answer"), tmp_path, context=32)
    with pytest.raises(ConfigError, match="stride is -1"):
        dataset_of(rows_of(3), tokenizer, bert(tokenizer, "answer"), tmp_path, stride=-1)
