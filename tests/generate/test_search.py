"""Answers of tiny random models are those of transformers' `generate`, to the score."""

import copy
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import polyhead as ph
from polyhead.generate.config import SearchConfig
from polyhead.generate.engine import Engine
from polyhead.generate.engine_config import EngineConfig
from polyhead.generate.search import Hypothesis
from polyhead.generate.seq2seq import Seq2Seq
from polyhead.models.model import TaskModel

transformers = pytest.importorskip("transformers")

V = 23
SCORE = 5e-5
Options = dict[str, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`(theirs, ours)` of a kind and a seed."""

    @cache
    def pair(kind: str, seed: int) -> tuple[Any, TaskModel]:
        torch.manual_seed(seed)
        theirs = MAKERS[kind]().eval()
        folder: Path = tmp_path_factory.mktemp("model")
        theirs.save_pretrained(folder)
        return theirs, ph.load(folder)

    return pair


def marian() -> Any:
    sizes = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
                 decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24)  # fmt: skip
    config = transformers.MarianConfig(
        vocab_size=V, d_model=16, max_position_embeddings=64, init_std=0.5, eos_token_id=0,
        pad_token_id=V - 1, decoder_start_token_id=V - 1, forced_eos_token_id=None, **sizes,
    )  # fmt: skip
    model = transformers.MarianMTModel(config)
    model.final_logits_bias.normal_()
    model.generation_config.forced_eos_token_id = None
    return model


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=V, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.4,
        bos_token_id=1, eos_token_id=0, pad_token_id=V - 1,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


MAKERS = {"marian": marian, "t5": t5, "gpt2": gpt2}


def drawn(seed: int) -> tuple[list[list[int]], Options, list[int]]:
    """Ragged texts, options of a search, and its end tokens."""
    chance = random.Random(seed)
    texts = [
        [chance.randrange(2, V - 1) for _ in range(chance.randint(1, 9))]
        for _ in range(chance.randint(1, 4))
    ]
    most = chance.randint(2, 13)
    options: Options = {
        "num_beams": chance.choice([1, 2, 3, 4, 6]),
        "max_new_tokens": most,
        "length_penalty": chance.choice([0.0, 0.6, 1.0, 2.0, -0.5]),
        "early_stopping": chance.choice([False, True, "never"]),
    }
    if chance.random() < 0.3:
        options["no_repeat_ngram_size"] = chance.choice([1, 2, 3])
    if chance.random() < 0.3:
        options["min_new_tokens"] = chance.randint(1, most)
    if chance.random() < 0.3:
        options["bad_words_ids"] = [[chance.randrange(2, V)], [5, 6], [3, 4, 9]]
    if chance.random() < 0.2:
        options["forced_bos_token_id"] = chance.randrange(2, V)
    if chance.random() < 0.2:
        options["repetition_penalty"] = 1.3
    return texts, options, [0, 1] if chance.random() < 0.3 else [0]


def expected(model: Any, texts: Sequence[list[int]], options: Options, ends: list[int]) -> Any:
    """Each text's answers by transformers: ids up to the end token, and scores."""
    width = max(map(len, texts))
    both = model.config.is_encoder_decoder
    # Decoders go on from the right end, so they are padded on the left there.
    pads = [[V - 1] * (width - len(text)) for text in texts]
    rows = [[*t, *p] if both else [*p, *t] for t, p in zip(texts, pads, strict=True)]
    keep = [[1] * len(t) + [0] * len(p) for t, p in zip(texts, pads, strict=True)]
    mask = torch.tensor(keep if both else [row[::-1] for row in keep])
    beams = options["num_beams"]
    found = model.generate(
        input_ids=torch.tensor(rows), attention_mask=mask, do_sample=False, eos_token_id=ends,
        num_return_sequences=beams, return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    written = found.sequences[:, 1 if both else width :].tolist()
    scores = found.sequences_scores.tolist() if beams > 1 else [0.0] * len(written)
    answers = [
        Hypothesis(tuple(_up_to_end(ids, ends)), score)
        for ids, score in zip(written, scores, strict=True)
    ]
    return [answers[i : i + beams] for i in range(0, len(answers), beams)]


def _up_to_end(ids: list[int], ends: list[int]) -> list[int]:
    stops = [place for place, token in enumerate(ids) if token in ends]
    return ids[: stops[0] + 1] if stops else ids


def check(ours: list[list[Hypothesis]], theirs: list[list[Hypothesis]]) -> int:
    """The same ids in the same order, and scores; how many were compared."""
    compared = 0
    for mine, other in zip(ours, theirs, strict=True):
        # What was never finished is filled up there with copies that score nothing.
        real = [answer for answer in other if answer.score > -1e8]
        assert [answer.ids for answer in mine] == [answer.ids for answer in real]
        for a, b in zip(mine, real, strict=True):
            assert abs(a.score - b.score) <= SCORE
        compared += len(real)
    return compared


def ours_of(
    model: TaskModel, texts: Sequence[list[int]], options: Options, ends: list[int]
) -> list[list[Hypothesis]]:
    writer = Seq2Seq(model)
    writer.ends = frozenset(ends)
    return writer.generate(texts, SearchConfig(**options))


@pytest.mark.parametrize("kind", ["marian", "t5"])
@pytest.mark.parametrize("seed", range(24))
def test_answers_and_scores_are_transformers(models: Any, kind: str, seed: int) -> None:
    theirs, ours = models(kind, seed % 4)
    texts, options, ends = drawn(seed * 2 + (kind == "t5"))
    if seed % 3 == 0:
        options["forced_eos_token_id"] = 0
    assert check(ours_of(ours, texts, options, ends), expected(theirs, texts, options, ends))


@pytest.mark.parametrize("seed", range(10))
def test_decoders_are_searched_alike(models: Any, seed: int) -> None:
    theirs, ours = models("gpt2", seed % 3)
    texts, options, ends = drawn(100 + seed)
    options["num_beams"] = max(2, options["num_beams"])
    # It is forced there only where a prompt has one token.
    options.pop("forced_bos_token_id", None)
    if len({len(text) for text in texts}) > 1:
        # Padding stands among the prompt's tokens there, and would be counted.
        for name in ("repetition_penalty", "no_repeat_ngram_size"):
            options.pop(name, None)
    engine = Engine(ours, None, EngineConfig(max_rows=40))
    config = SearchConfig(**options, num_return_sequences=options["num_beams"])
    requests = [engine.add(text, config, ends=ends) for text in texts]
    engine.run()
    found = [
        [Hypothesis(answer.token_ids, answer.score) for answer in request.results]
        for request in requests
    ]
    assert check(found, expected(theirs, texts, options, ends))


@pytest.mark.parametrize("beams", [1, 3])
def test_a_text_alone_gives_what_it_gives_in_a_batch(models: Any, beams: int) -> None:
    _, model = models("t5", 1)
    chance = random.Random(7)
    texts = [[chance.randrange(1, V) for _ in range(n)] for n in (3, 11, 1, 6, 6, 2, 9)]
    options: Options = dict(num_beams=beams, max_new_tokens=12, early_stopping=True)
    writer = Seq2Seq(model)
    writer.ends = frozenset(range(5))  # many, so that texts end at different steps
    together = writer.generate(texts, SearchConfig(**options))
    few = writer.generate(texts, SearchConfig(**options), tokens_at_once=14 * beams)
    alone = [writer.generate([text], SearchConfig(**options))[0] for text in texts]
    assert len({len(answers[0].ids) for answers in together}) > 1
    for one, two, three in zip(together, few, alone, strict=True):
        for a, b, c in zip(one, two, three, strict=True):
            assert a.ids == b.ids == c.ids
            assert max(abs(a.score - b.score), abs(a.score - c.score)) <= SCORE


def test_sources_are_encoded_once_and_no_prefix_is_read_again(models: Any) -> None:
    _, model = models("t5", 0)
    read: list[int] = []
    encoder, decoder = model.backbone.encoder, model.backbone.decoder
    encoded: list[int] = []
    hooks = [
        encoder.register_forward_pre_hook(lambda _, given: encoded.append(1)),
        decoder.register_forward_pre_hook(lambda _, given: read.append(given[0].shape[1])),
        decoder.layers[0].cross.k.register_forward_pre_hook(lambda _, given: encoded.append(2)),
    ]
    config = SearchConfig(num_beams=3, max_new_tokens=9, min_new_tokens=9)
    Seq2Seq(model).generate([[3, 4, 5], [6, 7]], config)
    for hook in hooks:
        hook.remove()
    assert encoded == [1, 2]
    assert read == [1] * 9


def test_drawn_answers_follow_seed_and_text_alone(models: Any) -> None:
    _, model = models("marian", 2)
    config = SearchConfig(temperature=1.0, top_k=9, seed=5, max_new_tokens=8)
    texts = [[4, 5, 6], [7, 8], [9, 3, 2, 1, 4]]
    together = Seq2Seq(model).generate(texts, config)
    assert together == [Seq2Seq(model).generate([text], config)[0] for text in texts]
    other = Seq2Seq(model).generate(texts, SearchConfig(temperature=1.0, seed=6, max_new_tokens=8))
    assert other != together


@pytest.mark.parametrize(
    ("asked", "answers"),
    [
        (dict(num_beams=3), 3),
        (dict(num_beams=3, num_return_sequences=2), 2),
        (dict(temperature=1.0, num_return_sequences=3), 3),
        (dict(temperature=1.0, best_of=3), 1),
        (dict(temperature=1.0, best_of=3, num_return_sequences=2), 2),
        (dict(penalty_alpha=0.5, top_k=3), 1),
    ],
)
def test_as_many_answers_as_are_asked_for(models: Any, asked: Options, answers: int) -> None:
    _, model = models("t5", 2)
    config = SearchConfig(seed=1, max_new_tokens=6, **asked)
    sources = [[4, 5, 6], [7] * 20, [8, 9]]
    found = Seq2Seq(model).generate(sources, config)
    assert [len(each) for each in found] == [answers] * 3
    for source, together in zip(sources, found, strict=True):
        (alone,) = Seq2Seq(model).generate([source], config)
        assert [answer.ids for answer in alone] == [answer.ids for answer in together]
        assert len({answer.ids for answer in alone}) > (answers > 1)


def test_the_checkpoint_recommends(models: Any, tmp_path: Path) -> None:
    theirs, _ = models("marian", 3)
    theirs.generation_config.update(num_beams=3, max_length=7, length_penalty=0.3)
    theirs.save_pretrained(tmp_path)
    ours = ph.load(tmp_path)
    texts = [[4, 5, 6, 7], [9, 8]]
    found = Seq2Seq(ours).generate(texts)
    ids = torch.tensor([[4, 5, 6, 7], [9, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    reference = theirs.generate(input_ids=ids, attention_mask=mask)[:, 1:].tolist()
    assert [list(a[0].ids) for a in found] == [_up_to_end(ids, [0]) for ids in reference]
    # Before there was such a file, config.json said it.
    (tmp_path / "generation_config.json").unlink()
    old = ph.load(tmp_path)
    old.config.source.update(num_beams=3, max_length=7, length_penalty=0.3)  # pyright: ignore
    assert Seq2Seq(old).generate(texts) == found


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (dict(num_beams=0), "num_beams=0 must be a whole number of at least 1"),
        (dict(num_beams=2, temperature=1.0), "beams are not drawn"),
        (dict(early_stopping="maybe"), "true, false or"),
        (dict(no_repeat_ngram_size=-1), "at least 0"),
    ],
)
def test_what_cannot_be_is_one_line(said: Options, why: str) -> None:
    with pytest.raises(ph.ConfigError, match=why):
        SearchConfig(**said)


def test_what_cannot_be_written_is_one_line(models: Any) -> None:
    _, model = models("t5", 0)
    with pytest.raises(ph.DataError, match="source 1 has no tokens"):
        Seq2Seq(model).generate([[3], []])
    with pytest.raises(ph.DataError, match="token id 99 is outside"):
        Seq2Seq(model).generate([[99]])
    with pytest.raises(ph.ConfigError, match="no encoder-decoder that writes"):
        Seq2Seq(models("gpt2", 0)[1])


def test_a_later_call_sees_the_model_as_it_is_then(models: Any) -> None:
    model = copy.deepcopy(models("marian", 0)[1])
    writer, sources = Seq2Seq(model), [[5, 6, 7], [8, 9, 10]]
    config = ph.GenerationConfig(num_beams=3, max_new_tokens=6, temperature=0.0)
    before = writer.generate(sources, config)
    check(writer.generate(sources, config), before)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(-1.5)
    changed = Seq2Seq(model).generate(sources, config)
    assert [best.ids for best, *_ in changed] != [best.ids for best, *_ in before]
    check(writer.generate(sources, config), changed)
    model.double()
    check(writer.generate(sources, config), Seq2Seq(model).generate(sources, config))
