import json
import os
import signal

import pytest
import torch
import transformers

import polyhead as ph
from polyhead.errors import ConfigError, DataError
from polyhead.text.tokenizer import Tokenizer
from polyhead.train import checkpoint
from polyhead.train.examples import REGRESSION, SEVERAL, SINGLE, labels_of
from polyhead.train.log import read_log
from polyhead.train.loop import Interrupted, Trainer
from polyhead.train.records import read_table
from polyhead.train.registry import OBJECTIVES
from polyhead.train.supervised import first_tokens

from .tables import bert, classes, sentences, settings, wordpiece

NAMES = ("high", "low", "middle")


def made(name, rows, model, tokenizer, out, **more):
    kind = OBJECTIVES[name]
    table = read_table(rows, kind.columns)
    return kind.dataset(table, tokenizer, model, settings(out, held_out=0.0, **more), "train")


def theirs(model, tmp_path, cls, **config):
    """The same weights in transformers."""
    model.save(tmp_path / "model", force=True)
    return cls.from_pretrained(tmp_path / "model", **config).eval()


@pytest.mark.parametrize("with_pairs", [False, True])
@pytest.mark.parametrize(
    ("problem", "names", "labels"),
    [
        (SINGLE, NAMES, ["low", "high", "high", "middle", "low"]),
        (SEVERAL, NAMES, [["low"], ["high", "low"], [], ["middle"], list(NAMES)]),
        (REGRESSION, ("score",), [0.5, -2, "3.5", 1e-1, 0]),
        (REGRESSION, ("x", "y"), [[0.5, 1], [2, 3], [0, -1], [1, 1], [0.0, 0.25]]),
    ],
)
def test_the_loss_is_transformers(tmp_path, problem, names, labels, with_pairs):
    tokenizer = wordpiece()
    texts = [" ".join(words) for words in sentences(5, 1)]
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    if with_pairs:
        rows = [{**row, "pair": text[::-1]} for row, text in zip(rows, texts[::-1], strict=True)]
    model = bert(tokenizer, "classify", labels=names, problem=problem).eval()
    dataset = made("classify", rows, model, tokenizer, tmp_path)
    batch = dataset.batch(0, 5)
    with torch.no_grad():
        found = OBJECTIVES["classify"].loss(model, batch)
    hf = theirs(model, tmp_path, transformers.BertForSequenceClassification)
    assert hf.config.problem_type == problem
    expected = hf(**batch.inputs, labels=batch.labels).loss
    assert found.tokens == 5
    assert float(found.total) / 5 == pytest.approx(float(expected), rel=1e-5)
    assert bool(batch.inputs["token_type_ids"].any()) == with_pairs
    # Each row carries its own label, whatever the order.
    chosen = dataset.order(0, 5).tolist()
    again = [OBJECTIVES["classify"].loss(model, dataset.collate([dataset.rows[i]])) for i in chosen]
    assert sum(float(one.total) for one in again) == pytest.approx(float(found.total), rel=1e-4)


def test_what_a_label_column_holds():
    assert labels_of(["b", "a", "b"]).names == ("a", "b")
    assert labels_of(["10", "9", "-1"]) == labels_of([10, 9, -1])
    assert labels_of(["10", "9", "-1"]).names == ("-1", "9", "10")
    assert labels_of(["1", "0.5"]).problem == labels_of([1.0, 2]).problem == REGRESSION
    assert labels_of(["1", "nan", "0.5"]).problem == REGRESSION  # refused where it is numbered
    assert labels_of(["nan", "gran"]).names == ("gran", "nan")
    assert labels_of(["1", "0.5"], SINGLE).names == ("0.5", "1")
    assert labels_of([["a", "c"], [], ["b"]]) == labels_of(["a, c", "", "b"], SEVERAL)
    with pytest.raises(DataError, match="every row has the label 'a'"):
        labels_of(["a", "a"])
    with pytest.raises(ConfigError, match="problem is 'ranking'"):
        labels_of(["a", "b"], "ranking")


@pytest.mark.parametrize(
    ("rows", "fields", "error", "says"),
    [
        ([("a", "odd")], {"labels": NAMES}, DataError, "label 'odd', which .* knows 'high', 'low'"),
        ([("a", None)], {"labels": NAMES}, DataError, "label is None"),
        ([("a", ["low"])], {"labels": NAMES}, ConfigError, "load the model with problem="),
        ([("a", "x")], {"labels": ("s",), "problem": REGRESSION}, DataError, "'x', not a number"),
        ([("a", "nan")], {"labels": ("s",)}, DataError, "row 0 is 'nan'"),
        ([("a", [1, 2])], {"labels": ("s",), "problem": REGRESSION}, DataError, "2 numbers"),
        ([("a", "low"), (3, "low")], {"labels": NAMES}, DataError, "text of row 1 is a int"),
        ([(None, "low")], {"labels": NAMES}, DataError, "text of row 0 is missing"),
        ([("a", "low")], {"labels": NAMES, "problem": "odd"}, ConfigError, "problem is 'odd'"),
    ],
)
def test_rows_that_do_not_fit_are_one_line(tmp_path, rows, fields, error, says):
    tokenizer = wordpiece()
    rows = [{"text": text, "label": label} for text, label in rows]
    with pytest.raises(error, match=says) as raised:
        made("classify", rows, bert(tokenizer, "classify", **fields), tokenizer, tmp_path)
    assert "\n" not in str(raised.value)


def test_labels_unseen_in_training_are_said(tmp_path):
    tokenizer, rows = wordpiece(), classes(20)
    model = bert(tokenizer, "classify", labels=NAMES)
    trainer = Trainer(model, tokenizer, settings(tmp_path / "run"), objective="classify")
    with pytest.raises(DataError, match=r"'new'.*made for"):
        trainer.fit(rows, valid=[{"text": "a cat", "label": "new"}])


@pytest.mark.parametrize("names", [("LABEL_0",), ("a", "b", "c")])
def test_what_is_learned_is_what_transformers_reads(tmp_path, names):
    """A head of one label has learned a measure, and no pipeline may squash it to a share."""
    tokenizer = wordpiece()
    rows = classes(40) if len(names) > 1 else [
        {"text": " ".join(words), "label": 3.5 + len(words)} for words in sentences(40)
    ]  # fmt: skip
    labels = ("low", "middle", "high") if len(names) > 1 else names
    model = bert(tokenizer, "classify", labels=labels)
    run = settings(tmp_path / "run", steps=60, lr=1e-2)
    result = Trainer(model, tokenizer, run, objective="classify", quiet=True).fit(rows)
    texts = [row["text"] for row in rows[:5]]
    pipe = transformers.pipeline("text-classification", model=result["best"], device="cpu")
    theirs = [{one["label"]: one["score"] for one in row} for row in pipe(texts, top_k=None)]
    for one, expected in zip(ph.Classifier(model, tokenizer)(texts), theirs, strict=True):
        assert one.scores == pytest.approx(expected, abs=1e-5)
    if len(names) == 1:
        assert all(row["LABEL_0"] > 2 for row in theirs)


@pytest.mark.parametrize(
    ("objective", "family", "head", "says"),
    [
        ("masked-lm", "gpt2", "lm", "masked-lm needs an encoder.*gpt2 is of the kind decoder"),
        ("span-corruption", "bert", "lm", "needs an encoder-decoder.*bert is of the kind encoder"),
        ("contrastive", "t5", "none", "t5 is of the kind encoder-decoder"),
    ],
)
def test_a_kind_of_model_that_cannot_learn_it_is_said(objective, family, head, says):
    sizes = {"vocab_size": 40, "d_model": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    with pytest.raises(ConfigError, match=says):
        Trainer(ph.build(family, head=head, **sizes), wordpiece(), objective=objective)


def test_long_texts_are_cut_and_padding_changes_nothing(tmp_path):
    tokenizer = wordpiece()
    rows = [{"text": "cat " * n, "label": "low"} for n in (1, 50, 7)]
    model = bert(tokenizer, "classify", labels=NAMES).eval()
    dataset = made("classify", rows, model, tokenizer, tmp_path, context=12)
    batch = dataset.batch(0, 3)
    assert batch.inputs["input_ids"].shape == (3, 12)
    answers = OBJECTIVES["classify"].loss(model, batch).answers[0]
    for at, row in enumerate(dataset.order(0, 3).tolist()):
        alone = OBJECTIVES["classify"].loss(model, dataset.collate([dataset.rows[row]])).answers[0]
        assert torch.allclose(alone[0], answers[at], atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_classifier_learns_is_kept_at_its_best_and_gives_its_labels_back(tmp_path, family):
    tokenizer = wordpiece()
    sizes = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 64, "max_seq_len": 64}
    sizes |= {"labels": NAMES, "vocab_size": tokenizer.vocab_size, "init_std": 0.1}
    model = ph.build(family, head="classify", seed=0, **sizes)
    config = settings(tmp_path / "run", epochs=4.0, validate_every=20, lr=2e-3)
    trainer = Trainer(model, tokenizer, config, objective="classify", quiet=True)
    result = trainer.fit(classes(300))
    assert trainer.config.steps == -(-4 * 270 // 8)
    assert result["valid_accuracy"] > 0.9
    lines = [r for r in read_log(tmp_path / "run" / "log.jsonl") if "valid_loss" in r]
    best = max(line["valid_accuracy"] for line in lines)
    saved = ph.load(result["best"])
    assert saved.config.labels == NAMES
    assert checkpoint.best_score(tmp_path / "run") == best
    first = next(line["step"] for line in lines if line["valid_accuracy"] == best)
    steps = [int(p.name[5:]) for p in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert first in steps
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["objective"] == "classify"
    unseen = Trainer(saved, tokenizer, config, objective="classify").evaluate(classes(60, 5))
    assert unseen["accuracy"] > 0.85
    assert set(unseen) == {"loss", "accuracy", "macro_f1"}


@pytest.mark.parametrize("stop", [5, 10])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, stop):
    tokenizer = wordpiece()
    weights, logs = [], []
    for name in ("whole", "parts"):
        model = bert(tokenizer, "classify", labels=NAMES, dropout=0.2)
        config = settings(tmp_path / name, steps=14, accumulate=2, validate_every=3)

        def halt(trainer, record):
            if record["step"] == stop and "grad_norm" in record:
                os.kill(os.getpid(), signal.SIGTERM)

        rows = classes(50)
        if name == "parts":
            with pytest.raises(Interrupted):
                Trainer(
                    model, tokenizer, config, objective="classify", callbacks=[halt], quiet=True
                ).fit(rows)
            model = bert(tokenizer, "classify", seed=7, labels=NAMES, dropout=0.2)
        Trainer(model, tokenizer, config, objective="classify", quiet=True).fit(
            rows, resume=name == "parts"
        )
        weights.append(model.state_dict())
        records = read_log(tmp_path / name / "log.jsonl")
        timed = ("seconds", "rows_per_second", "memory_bytes")
        logs.append([{k: v for k, v in r.items() if k not in timed} for r in records])
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert logs[0] == logs[1]


def test_a_run_is_not_resumed_on_other_rows_or_options(tmp_path):
    tokenizer = wordpiece()

    def trainer():
        model = bert(tokenizer, "classify", labels=NAMES)
        config = settings(tmp_path / "run", steps=2)
        return Trainer(model, tokenizer, config, objective="classify", quiet=True)

    trainer().fit(classes(30))
    with pytest.raises(ConfigError, match="another corpus"):
        trainer().fit(classes(31), resume=True)
    with pytest.raises(ConfigError, match="has no option 'depth'; it has none"):
        Trainer(bert(tokenizer, "classify"), tokenizer, objective="classify", options={"depth": 3})
    with pytest.raises(ConfigError, match=r"needs a model with the head 'classify'.*'lm'"):
        Trainer(bert(tokenizer, "lm"), tokenizer, objective="classify")
    with pytest.raises(ConfigError, match="objective 'sort' is not one of causal-lm"):
        Trainer(bert(tokenizer, "classify"), tokenizer, objective="sort")


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_tags_stand_on_each_words_first_token(tmp_path, kind):
    words = [["unbelievable", "cats", "(sat)", "on", "naïve", "mats."], ["a", "b"]]
    tags = [["B-X", "I-X", "O", "O", "B-Y", "I-Y"], ["O", "B-X"]]
    texts = [" ".join(row) for row in words]
    tokenizer = Tokenizer.train(["cat sat on mat " + t for t in texts], kind=kind, vocab_size=300)
    names = ("O", "B-X", "B-Y", "I-X", "I-Y")
    model = bert(tokenizer, "tag", labels=names)
    rows = [{"tokens": w, "tags": " ".join(t)} for w, t in zip(words, tags, strict=True)]
    dataset = made("tag", rows, model, tokenizer, tmp_path)
    for at, (row, theirs_) in enumerate(zip(words, tags, strict=True)):
        batch = dataset.collate([dataset.rows[at]])
        labels = batch.labels[0]
        assert [names[i] for i in labels[labels >= 0].tolist()] == theirs_
        found = batch.inputs["input_ids"][0, labels >= 0].tolist()
        # By the library: the first token of every word of the text split at its spaces.
        offsets = tokenizer([" ".join(row)]).offsets[0].tolist()
        starts = [sum(len(w) + 1 for w in row[:n]) for n in range(len(row))]
        by_hand = [
            next(t for t, (first, last) in enumerate(offsets) if first <= start < last)
            for start in starts
        ]
        assert found == [batch.inputs["input_ids"][0, t].item() for t in by_hand]


def test_words_without_a_token_and_words_cut_off():
    assert first_tokens(["ab", "c"], [(0, 0), (0, 1), (1, 2), (3, 4), (0, 0)]) == [1, 3]
    assert first_tokens(["ab", "c"], [(0, 0), (0, 2), (0, 0)]) == [1, None]
    assert first_tokens(["a", "", "b"], [(0, 1), (3, 4)]) == [0, None, 1]
    assert first_tokens(["a", "b"], [(0, 1), (1, 3)]) == [0, 1]  # a space before its word
    assert first_tokens(["a", "b", "c"], [(0, 3), (4, 5)]) == [0, None, 1]


def test_a_tagger_learns_and_its_loss_is_transformers(tmp_path):
    tokenizer = wordpiece()
    rows = [
        {"tokens": words, "tags": ["B-A" if w in ("cat", "dog") else "O" for w in words]}
        for words in sentences(80)
    ]
    names = OBJECTIVES["tag"].labels(read_table(rows, OBJECTIVES["tag"].columns), None).names
    assert names == ("O", "B-A")
    model = bert(tokenizer, "tag", labels=names)
    trainer = Trainer(
        model, tokenizer, settings(tmp_path / "run", steps=40), objective="tag", quiet=True
    )
    assert trainer.fit(rows)["valid_entity_f1"] > 0.95
    dataset = made("tag", rows, model, tokenizer, tmp_path)
    batch = dataset.batch(3, 6)
    hf = theirs(model, tmp_path, transformers.BertForTokenClassification)
    loss = OBJECTIVES["tag"].loss(model.eval(), batch)
    expected = hf(**batch.inputs, labels=batch.labels).loss
    assert loss.tokens == int((batch.labels >= 0).sum())
    assert float(loss.total) / loss.tokens == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "row 0 has 2 tokens and 1 tags"),
        ({"tokens": "", "tags": "O"}, "tokens of row 0 are ''"),
        ({"tokens": ["a", None], "tags": ["O", "O"]}, r"tokens of row 0 are \['a', None\]"),
        ({"tokens": "a", "tags": "B-Q"}, "label 'B-Q'"),
    ],
)
def test_bad_tags_are_one_line(tmp_path, row, says):
    tokenizer = wordpiece()
    with pytest.raises(DataError, match=says):
        made("tag", [row], bert(tokenizer, "tag", labels=("O", "B-A")), tokenizer, tmp_path)
