import pytest
import torch
import torch.nn.functional as F
import transformers

import polyhead as ph
from polyhead.errors import ConfigError, DataError
from polyhead.text.tokenizer import Tokenizer
from polyhead.train.loop import Trainer
from polyhead.train.objectives import IGNORE
from polyhead.train.records import read_table
from polyhead.train.registry import OBJECTIVES
from polyhead.train.seq2seq import seq2seq

from .tables import WORDS, bert, sentences, settings, wordpiece

KIND = OBJECTIVES["seq2seq"]
TURNED = dict(zip(WORDS, [w.upper() for w in WORDS], strict=True))


def rows_of(count, seed=0):
    return [
        {"source": " ".join(w), "target": " ".join(TURNED[x] for x in w)}
        for w in sentences(count, seed, 6)
    ]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [" ".join([*WORDS, *TURNED.values()])] * 4
    return Tokenizer.train(
        texts, kind="bpe", vocab_size=600, special_tokens={"bos": "<s>", "eos": "</s>"}
    )


def transformer(tokenizer, **fields):
    sizes = {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_ff": 64, "max_seq_len": 64}
    values = {"kind": "encoder-decoder", "vocab_size": tokenizer.vocab_size, "dropout": 0.0}
    return ph.build("transformer", seed=0, **{**sizes, **values, **fields})


def dataset_of(rows, tokenizer, model, out, **more):
    table = read_table(rows, KIND.columns)
    return KIND.dataset(table, tokenizer, model, settings(out, held_out=0.0, **more), "train")


def test_targets_end_and_the_decoder_reads_them_a_step_later(tmp_path, tokenizer):
    dataset = dataset_of(rows_of(5), tokenizer, transformer(tokenizer), tmp_path)
    batch = dataset.batch(0, 5)
    for at, row in enumerate(dataset.order(0, 5).tolist()):
        ids = tokenizer.encode(dataset.rows[row]["target"], add_special_tokens=False)
        labels = batch.labels[at]
        kept = labels[labels != IGNORE].tolist()
        assert kept == [*ids, tokenizer.eos_id]
        read = batch.inputs["decoder_input_ids"][at, : len(kept)].tolist()
        assert read == [tokenizer.bos_id, *ids]
        assert batch.inputs["decoder_attention_mask"][at].sum() == len(kept)
    assert batch.tokens() == int((batch.labels != IGNORE).sum())
    cut = dataset_of(rows_of(5), tokenizer, transformer(tokenizer), tmp_path, context=4)
    assert cut.batch(0, 5).labels.shape[1] == 4
    assert (cut.batch(0, 5).labels == tokenizer.eos_id).any(1).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_smoothing_is_torchs(tmp_path, tokenizer, smoothing):
    model = transformer(tokenizer).train()
    batch = dataset_of(rows_of(6), tokenizer, model, tmp_path).batch(0, 6)
    found = seq2seq(model, batch, smoothing=smoothing)
    with torch.no_grad():
        logits = model(**batch.inputs).flatten(0, 1)
        expected, plain = (
            F.cross_entropy(
                logits, batch.labels.flatten(), reduction="sum", label_smoothing=epsilon
            )
            for epsilon in (smoothing, 0.0)
        )
    assert float(found.total.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert float(found.parts["loss"]) == pytest.approx(float(plain), rel=1e-5)
    assert float(sum(found.parts.values())) == pytest.approx(float(expected), rel=1e-5)
    # What is validated is the plain one.
    assert float(seq2seq(model.eval(), batch, smoothing).total.detach()) == pytest.approx(
        float(plain), rel=1e-5
    )


def test_padding_changes_nothing(tmp_path, tokenizer):
    model = transformer(tokenizer).eval()
    dataset = dataset_of(rows_of(6), tokenizer, model, tmp_path)
    with torch.no_grad():
        together = float(seq2seq(model, dataset.collate([dataset.rows[i] for i in range(6)])).total)
        alone = sum(
            float(seq2seq(model, dataset.collate([dataset.rows[i]])).total) for i in range(6)
        )
    assert together == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(("family", "lr"), [("transformer", 1e-2), ("t5", 3e-3)])
def test_a_translator_learns_and_is_judged_by_what_it_writes(tmp_path, tokenizer, family, lr):
    sizes = {"d_model": 48, "num_layers": 1, "num_heads": 4, "d_ff": 96, "dropout": 0.0}
    if family == "transformer":
        model = transformer(tokenizer, **sizes)
    else:
        model = ph.build("t5", seed=0, vocab_size=tokenizer.vocab_size, **sizes)
    config = settings(tmp_path / "run", steps=150, batch_size=32, lr=lr)
    trainer = Trainer(model, tokenizer, config, objective="seq2seq", quiet=True)
    rows = rows_of(150)
    trainer.fit(rows, valid=rows_of(10, seed=1))
    found = trainer.evaluate(rows[:50])
    assert found["bleu"] > 60
    assert found["bleu_low"] <= found["bleu_high"]
    assert found["chrf"] > 60


def test_what_cannot_translate_is_said(tmp_path, tokenizer):
    rows = rows_of(3)
    with pytest.raises(ConfigError, match=r"needs an encoder-decoder.*bert is of the kind encoder"):
        Trainer(bert(wordpiece(), "lm"), wordpiece(), objective="seq2seq")
    endless = Tokenizer.train(["a b"], kind="chars", special_tokens={"eos": None, "bos": None})
    with pytest.raises(ConfigError, match="no token that"):
        dataset_of(rows, endless, transformer(endless), tmp_path)
    marians = Tokenizer.train(["a b"] * 3, kind="bpe", extra_tokens=["\U0010ffffab"])
    with pytest.raises(ConfigError, match=r"source texts alone: target\.spm"):
        dataset_of(rows, marians, transformer(marians), tmp_path)
    with pytest.raises(DataError, match="source of row 1 is empty"):
        dataset_of(
            [rows[0], {"source": " ", "target": "a"}], tokenizer, transformer(tokenizer), tmp_path
        )
    spoilt = [rows[0], {"source": "a", "target": None}]
    with pytest.raises(DataError, match="target of row 1 is missing"):
        dataset_of(spoilt, tokenizer, transformer(tokenizer), tmp_path)


def test_a_fresh_translator_writes_in_transformers_what_it_writes_here(tmp_path, tokenizer):
    sizes = {"d_model": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = ph.build("t5", seed=0, vocab_size=tokenizer.vocab_size, **sizes)
    config = settings(tmp_path / "run", steps=20, lr=1e-2)
    rows = rows_of(20)
    found = Trainer(model, tokenizer, config, objective="seq2seq", quiet=True).fit(rows)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(found["best"])
    assert theirs.generation_config.eos_token_id == tokenizer.eos_id
    saved = ph.load(found["best"])
    for row in rows[:4]:
        ids = torch.tensor([tokenizer.encode(row["source"])])
        out = theirs.generate(ids, max_new_tokens=6, do_sample=False)
        (ours,) = ph.Translator(saved, tokenizer)(row["source"], num_beams=1, max_new_tokens=6)
        assert out[0, 1:].tolist()[: len(ours.token_ids)] == list(ours.token_ids)
