"""Translator and Summarizer: any texts, in order, as the checkpoint says; and OPUS directories."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import polyhead as ph
from polyhead.cli.main import main
from polyhead.generate.seq2seq import Seq2Seq
from polyhead.models.model import TaskModel
from polyhead.text.tokenizer import Tokenizer

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards mix vexed potions".split()
TEXTS = [
    "the quick brown fox",
    "",
    "a lazy dog jumps over seven wizards while the fox",
    "dog",
    "mix potions \n mix",
    "the quick brown fox",
]


def tokenizer() -> Tokenizer:
    return Tokenizer.train(
        [" ".join(WORDS) + ". summarize: translate"] * 4, kind="unigram", vocab_size=90,
        special_tokens={"pad": "<pad>", "eos": "</s>"}, add_eos=True,
    )  # fmt: skip


def make(folder: Path, kind: str = "t5", **more: Any) -> tuple[TaskModel, Tokenizer]:
    words = tokenizer()
    sizes: dict[str, Any] = dict(vocab_size=words.vocab_size, d_model=32, d_ff=40, num_layers=2,
                                 num_heads=4, **more)  # fmt: skip
    if kind == "t5":
        sizes["head_dim"] = 8
    model = ph.build(kind, seed=1, **sizes).eval()
    model.save(folder)
    words.save(folder, force=True)
    return ph.load(folder), ph.tokenizer(folder)


def say(folder: Path, name: str, **values: Any) -> None:
    """Put entries into a JSON file of a model."""
    path = folder / name
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **values}))


@pytest.mark.parametrize("kind", ["t5", "marian", "transformer"])
def test_order_is_kept_and_a_text_is_as_alone(kind: str, tmp_path: Path) -> None:
    model, words = make(tmp_path, kind)
    translate = ph.Translator(model, words)
    found = translate(TEXTS, max_new_tokens=8)
    alone = [translate(text, max_new_tokens=8)[0] for text in TEXTS]
    assert found == alone
    assert found[1] == ""
    assert found[0] == found[5]
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in alone]
    assert found[0].score == pytest.approx(alone[0].score, abs=1e-5)
    assert found[0].score < 0


def test_the_answer_is_the_search_of_the_prefixed_ids(tmp_path: Path) -> None:
    model, words = make(tmp_path)
    writer = Seq2Seq(model, words)
    settings = writer.settings(num_beams=3, max_new_tokens=7, length_penalty=0.2)
    for prefix in ("", "translate: "):
        ids = words.encode(prefix + TEXTS[0])
        best = writer.generate([ids], settings)[0][0]
        translate = ph.Translator(model, words, prefix=prefix)
        found = translate(TEXTS[0], num_beams=3, max_new_tokens=7, length_penalty=0.2)
        assert found[0].token_ids == best.ids
        assert found[0] == words.decode(best.ids).strip()


def test_settings_come_from_the_call_the_task_and_the_checkpoint(tmp_path: Path) -> None:
    make(tmp_path)
    say(tmp_path, "generation_config.json", num_beams=2, max_length=10, decoder_start_token_id=0)
    tasks = {
        "summarization": {"max_length": 6, "num_beams": 3, "prefix": "summarize: "},
        "translation_en_to_de": {"max_length": 8, "prefix": "translate: "},
        "translation_en_to_fr": {"max_length": 9, "prefix": "traduis: "},
    }
    say(tmp_path, "config.json", task_specific_params=tasks)
    model, words = ph.load(tmp_path), ph.tokenizer(tmp_path)

    def length(writer: ph.Translator, **more: Any) -> int:
        return len(writer(TEXTS[0], min_new_tokens=5, **more)[0].token_ids)

    assert length(ph.Summarizer(model, words)) == 5
    assert ph.Summarizer(model, words).prefix == "summarize: "
    assert length(ph.Summarizer(model, words), max_new_tokens=7) <= 7
    assert ph.Translator(model, words, prefix="translate: ").said["max_length"] == 8
    # Two languages, and no word which: neither the prefix nor the lengths of one of them.
    either = ph.Translator(model, words)
    assert (either.prefix, either.said["max_length"], either.said["num_beams"]) == ("", 10, 2)


def test_long_texts_lose_their_end_and_keep_their_mark(tmp_path: Path) -> None:
    model, words = make(tmp_path, "marian", max_seq_len=16)
    long = " ".join(WORDS * 4)
    ids = words.encode(long)
    assert len(ids) > 16
    assert ids[-1] == words.eos_id
    writer = Seq2Seq(model, words)
    best = writer.generate([[*ids[:15], ids[-1]]], writer.settings(num_beams=4, max_new_tokens=6))
    found = ph.Translator(model, words)(long, max_new_tokens=6)
    assert found[0].token_ids == best[0][0].ids
    fitting = " ".join(WORDS * 4)[: len(words.decode(ids[:10]))]
    told = ph.Translator(model, words)([long, "", fitting], max_new_tokens=2)
    assert [one.is_cut for one in told] == [True, False, False]


def test_verbs_count_the_texts_that_lose_their_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "model", "marian", max_seq_len=16)
    asked = [str(tmp_path / "model"), " ".join(WORDS * 4), "fox", "--max-new-tokens", "2"]
    for verb in ("translate", "summarize"):
        assert main([verb, *asked, "--json"]) == 0
        seen = capsys.readouterr()
        assert [json.loads(line)["cut"] for line in seen.out.splitlines()] == [True, False]
        assert seen.err == "of 1 of 2 texts the end was not read: the model takes 16 tokens\n"
        assert main([verb, asked[0], *asked[2:]]) == 0
        assert capsys.readouterr().err == ""


def test_progress_is_told(tmp_path: Path) -> None:
    model, words = make(tmp_path)
    told: list[tuple[int, int]] = []
    ph.Translator(model, words)(
        TEXTS, max_new_tokens=2, progress=lambda done, every: told.append((done, every))
    )
    assert told[-1] == (5, 5)


def test_what_cannot_be_is_one_line(tmp_path: Path) -> None:
    model, words = make(tmp_path)
    with pytest.raises(ph.DataError, match="text 1 is a int"):
        ph.Translator(model, words)(["fox", 3])  # pyright: ignore[reportArgumentType]
    decoder = ph.build("gpt2", vocab_size=90, d_model=16, num_layers=1, num_heads=2)
    with pytest.raises(ph.ConfigError, match="gpt2 with head 'lm' is no encoder-decoder"):
        ph.Translator(decoder, words)


def test_the_verbs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, words = make(tmp_path / "model")
    lines = tmp_path / "lines.txt"
    lines.write_text("the quick brown fox\n\nlazy dog\n")
    asked = [str(tmp_path / "model"), "--max-new-tokens", "6", "--json"]
    assert main(["translate", asked[0], "dog", str(lines), *asked[1:], "--num-beams", "2"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    sources = ["dog", "the quick brown fox", "", "lazy dog"]
    expected = ph.Translator(model, words)(sources, num_beams=2, max_new_tokens=6)
    assert [record["source"] for record in found] == sources
    assert [record["text"] for record in found] == expected
    assert main(["summarize", asked[0], str(lines), *asked[1:]]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["source"] == lines.read_text()
    assert record["text"] == ph.Summarizer(model, words)(lines.read_text(), max_new_tokens=6)[0]
    copy = str(tmp_path / "copy")
    assert main(["convert", asked[0], copy, "--to", "hf", "--verify"]) == 0
    capsys.readouterr()
    assert main(["translate", asked[0]]) == 2
    assert "there is no text" in capsys.readouterr().err


@pytest.fixture(scope="module")
def opus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as OPUS' are: two SentencePiece models and one numbering of their pieces."""
    sentencepiece: Any = pytest.importorskip("sentencepiece")
    folder: Path = tmp_path_factory.mktemp("opus")
    chance = random.Random(0)
    source = [" ".join(chance.choices(WORDS, k=8)) + ", 3.5 times?" for _ in range(300)]
    target = [line.translate(str.maketrans("aeiou", "áéíóú")) + " ¡sí!" for line in source]
    pieces: list[str] = []
    for name, lines in (("source", source), ("target", target)):
        (folder / "text").write_text("\n".join(lines))
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "text"), model_prefix=str(folder / name), vocab_size=90,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        model = (folder / f"{name}.model").rename(folder / f"{name}.spm")
        read = sentencepiece.SentencePieceProcessor(str(model))
        pieces += [read.IdToPiece(i) for i in range(3, read.GetPieceSize())]
    pieces = list(dict.fromkeys(pieces))
    chance.shuffle(pieces)
    numbered = ["</s>", "<unk>", *pieces, ">>fra<<", "<pad>"]
    say(folder, "vocab.json", **{piece: number for number, piece in enumerate(numbered)})
    say(folder, "tokenizer_config.json", tokenizer_class="MarianTokenizer")
    return folder


@pytest.mark.filterwarnings("ignore")
def test_opus_tokenizers_are_those_of_transformers(opus: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.MarianTokenizer.from_pretrained(opus), ph.tokenizer(opus)
    chance = random.Random(1)
    texts = [" ".join(chance.choices([*WORDS, "fóx", "3.5", "日本", ">"], k=6)) for _ in range(60)]
    texts += ["  two   spaces ", "", ">>fra<< the fox", "unbelievable, 3?"]
    assert [ours.encode(text) for text in texts] == [theirs(text).input_ids for text in texts]
    for _ in range(60):
        ids = [chance.randrange(2, ours.vocab_size - 2) for _ in range(8)] + [0]
        decoded = theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids).strip() == decoded
    written = ours.encode_targets(texts)
    wanted = [theirs(text_target=text).input_ids for text in texts]
    is_known = [theirs.unk_token_id not in ids for ids in wanted]
    assert sum(is_known) > 10
    for ids, other, known in zip(written, wanted, is_known, strict=True):
        assert [*ids, 0] == other or not known
    assert written != [ids[:-1] for ids in map(ours.encode, texts)]
    ours.save(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert [again(text).input_ids for text in texts] == [ours.encode(text) for text in texts]
    assert ph.tokenizer(tmp_path).encode_targets(texts) == written
    ph.Tokenizer.train(texts).save(tmp_path, force=True)
    assert not (tmp_path / "target_tokenizer.json").exists()


def test_an_opus_directory_translates(opus: Path) -> None:
    words = ph.tokenizer(opus)
    model = ph.build("marian", seed=0, vocab_size=words.vocab_size, d_model=16, d_ff=24,
                     num_layers=1, num_heads=2, init_std=0.5)  # fmt: skip
    found = ph.Translator(model, words)(["the lazy dog", "fox"], max_new_tokens=5)
    assert all(isinstance(text, str) and "\U0010ffff" not in text for text in found)
    (opus / "target_vocab.json").write_text("{}")
    with pytest.raises(ph.FileError, match="a vocabulary for each language"):
        ph.tokenizer(opus)
    (opus / "target_vocab.json").unlink()


def test_an_opus_checkpoint_is_taught(opus: Path, tmp_path: Path) -> None:
    words = ph.tokenizer(opus)
    model = ph.build("marian", seed=0, vocab_size=words.vocab_size, d_model=32, d_ff=48,
                     init_std=0.2, num_layers=1, num_heads=2, pad_id=words.pad_id)  # fmt: skip
    rows = [{"source": f"the {word}", "target": f"{word} {word}"} for word in WORDS] * 4
    config = ph.TrainConfig.fine_tuning(
        steps=200, lr=5e-3, batch_size=16, out=str(tmp_path / "run")
    )
    trainer = ph.Trainer(model, words, config, objective="seq2seq", quiet=True)
    taught = trainer.fit(rows, rows[: len(WORDS)])
    assert taught["valid_loss"] < 1.0
    found = ph.Translator(ph.load(taught["best"]), ph.tokenizer(taught["best"]))(["the fox"])
    assert found == ["fox fox"]


def test_a_model_that_was_taught_translates(tmp_path: Path) -> None:
    """Copying words, learnt in a moment: start, end and prefix of training and search agree."""
    model, words = make(tmp_path, "t5", feed_forward="gated-gelu")
    torch.manual_seed(0)
    chance = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    lines = [" ".join(chance.sample(WORDS[:6], 2)) for _ in range(12)]
    batch = words(lines)
    start = Seq2Seq(model, words).start
    assert start is not None
    before = torch.cat([torch.full_like(batch.input_ids[:, :1], start), batch.input_ids], 1)[:, :-1]
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    model.train()
    for _ in range(80):
        logits = model(batch.input_ids, before, attention_mask=batch.attention_mask)
        torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert ph.Translator(model, words)(lines[:6], max_new_tokens=20) == lines[:6]
