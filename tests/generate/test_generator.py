import copy
import pickle
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

import polyhead as ph
from polyhead.errors import ConfigError, DataError
from polyhead.generate.config import GenerationConfig
from polyhead.generate.generator import TextGenerator
from polyhead.text.tokenizer import Tokenizer

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


@dataclass(frozen=True)
class Oracle:
    kind: str
    options: dict[str, Any] = field(default_factory=dict)


ORACLES = {
    "gpt2": Oracle(
        "GPT2", {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    ),
    "llama": Oracle("Llama", SIZES),
    "mistral": Oracle("Mistral", SIZES | {"sliding_window": 6}),
}
PROMPTS = [[5, 9, 3, 44, 17, 20, 8, 31], [7], [12, 40, 13], [60, 1, 25, 33, 6]]


@pytest.fixture(scope="module", params=ORACLES)
def pair(request, tmp_path_factory, tokenizer):
    """A tiny random model of transformers, and the same weights loaded here."""
    tf = pytest.importorskip("transformers")
    oracle, folder = ORACLES[request.param], tmp_path_factory.mktemp(request.param)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(tf, oracle.kind + "Config")(**oracle.options, **ids)
    suffix = "LMHeadModel" if oracle.kind == "GPT2" else "ForCausalLM"
    torch.manual_seed(3)
    theirs = getattr(tf, oracle.kind + suffix)(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    theirs.save_pretrained(folder)
    return theirs, TextGenerator(ph.load(folder), tokenizer)


def theirs_greedy(model, prompts, new_tokens, eos=None, **options) -> list[list[int]]:
    """What transformers generates from prompts padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    model.generation_config.eos_token_id = eos
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    return out[:, width:].tolist()


def greedy(**fields) -> GenerationConfig:
    return GenerationConfig(**{"temperature": 0, "ignore_eos": True, "max_new_tokens": 24} | fields)


def test_greedy_tokens_of_a_ragged_batch_equal_transformers(pair):
    theirs, ours = pair
    got = ours.generate(PROMPTS, greedy())
    assert [list(g.token_ids) for g in got] == theirs_greedy(theirs, PROMPTS, 24)
    assert {g.finish_reason for g in got} == {"length"}
    assert [g.prompt_tokens for g in got] == [8, 1, 3, 5]
    assert len({g.token_ids[3:] for g in got}) > 1


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_penalized_greedy_tokens_equal_transformers(pair, penalty):
    theirs, ours = pair
    for prompt in PROMPTS:  # one by one: transformers would count its padding as seen
        got = ours.generate([prompt], greedy(repetition_penalty=penalty))[0]
        expected = theirs_greedy(theirs, [prompt], 24, repetition_penalty=penalty)[0]
        assert list(got.token_ids) == expected


def test_rows_end_at_end_tokens_as_in_transformers(pair, tokenizer):
    theirs, ours = pair
    # Tokens that the rows write at different times end them.
    free = theirs_greedy(theirs, PROMPTS, 24)
    ends = (free[0][2], free[1][9], free[2][5])
    config = greedy(stop_token_ids=ends, ignore_eos=False)
    got = ours.generate(PROMPTS, config)
    expected = theirs_greedy(theirs, PROMPTS, 24, eos=[*ends, *tokenizer.eos_ids])
    for ours_row, row in zip(got, expected, strict=True):
        assert list(ours_row.token_ids) == row[: len(ours_row.token_ids)]
        assert set(row[len(ours_row.token_ids) :]) <= {0}
        ended = ours_row.token_ids[-1] in (*ends, *tokenizer.eos_ids)
        assert ours_row.finish_reason == ("stop" if ended else "length")
    assert len({len(g.token_ids) for g in got}) > 2


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("batch_size", [2, 32])
def test_a_row_is_what_it_is_alone(pair, static, batch_size):
    ours = TextGenerator(pair[1].model, pair[1].tokenizer, static=static)
    free = ours.generate(PROMPTS, greedy())
    configs = [
        greedy(stop_token_ids=free[0].token_ids[3:4], ignore_eos=False),
        GenerationConfig(seed=4, max_new_tokens=40, top_p=0.8),
        GenerationConfig(seed=5, max_new_tokens=7, temperature=2.0, top_k=9),
        greedy(max_new_tokens=40, presence_penalty=1.0, frequency_penalty=0.5),
    ]
    together = ours.generate(PROMPTS, configs, batch_size=batch_size)
    alone = [pair[1].generate([p], [c])[0] for p, c in zip(PROMPTS, configs, strict=True)]
    assert [g.token_ids for g in together] == [g.token_ids for g in alone]
    assert together == alone
    assert [g.finish_reason for g in together] == [g.finish_reason for g in alone]


@pytest.mark.parametrize("static", [False, True])
def test_a_row_that_ended_early_runs_on_unseen_past_the_context(pair, static):
    """One row fills the context to the last position while the longest prompt ended long before."""
    ours = TextGenerator(pair[1].model, pair[1].tokenizer, static=static)
    prompts = [[9] * 60, [7]]
    configs = [greedy(max_new_tokens=1), greedy(max_new_tokens=999)]
    long, short = ours.generate(prompts, configs)
    assert len(long.token_ids) == 1
    assert len(short.token_ids) == 63
    assert short.finish_reason == "length"
    assert short.token_ids == ours.generate([[7]], configs[1])[0].token_ids


def test_a_compiled_step_serves_every_token_and_text(pair, monkeypatch):
    """No step recompiles; rows that end, lengths and prompts are the step's data."""
    plain, compiler = pair[1], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compiler(f, backend="eager", **kw))
    ours = TextGenerator(plain.model, plain.tokenizer, compile=True)
    configs = [greedy(max_new_tokens=n) for n in (3, 20, 9, 1)]
    torch.compiler.reset()
    assert ours.generate(PROMPTS, configs) == plain.generate(PROMPTS, configs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert ours.generate(PROMPTS[::-1], configs) == plain.generate(PROMPTS[::-1], configs)


def test_logprobs_are_the_models_own(pair):
    theirs, ours = pair
    config = greedy(logprobs=3, max_new_tokens=6, repetition_penalty=1.7, presence_penalty=2.0)
    (got,) = ours.generate([PROMPTS[0]], config)
    assert got.logprobs is not None
    assert [entry.token_id for entry in got.logprobs] == list(got.token_ids)
    ids = torch.tensor([PROMPTS[0] + list(got.token_ids)])
    with torch.no_grad():
        expected = theirs(ids).logits[0, len(PROMPTS[0]) - 1 : -1].log_softmax(-1)
    for entry, row in zip(got.logprobs, expected, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        best = row.topk(3)
        assert [i for i, _ in entry.top] == best.indices.tolist()
        assert [p for _, p in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_logprobs_are_given_to_the_rows_that_ask(pair):
    configs = [greedy(logprobs=n, max_new_tokens=2) for n in (None, 0, 2)]
    none, chosen, two = pair[1].generate(PROMPTS[:3], configs)
    assert none.logprobs is None
    assert [len(e.top) for e in chosen.logprobs] == [0, 0]
    assert [len(e.top) for e in two.logprobs] == [2, 2]


@pytest.fixture(scope="module")
def small(tokenizer) -> TextGenerator:
    model = ph.build(
        "llama",
        seed=1,
        vocab_size=300,
        d_model=32,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        max_seq_len=96,
        init_std=0.3,
    )
    return TextGenerator(model, tokenizer)


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"seed": 3}, {"seed": 8, "top_p": 0.7}])
def test_a_stream_adds_up_to_what_generate_gives(small, fields):
    for prompt in ("the quick", "", "x"):
        config = GenerationConfig(max_new_tokens=50, **fields)
        whole = small.generate(prompt, config)
        returned = []

        def watched(stream, returned=returned):
            returned.append((yield from stream))

        assert "".join(watched(small.stream(prompt, config))) == whole == returned[0]
        assert returned[0].token_ids == whole.token_ids
        assert whole == small.tokenizer.decode(whole.token_ids)


def test_a_seed_repeats_and_no_seed_does_not(small):
    seeded = GenerationConfig(seed=7, max_new_tokens=20)
    assert small.generate("hello", seeded) == small.generate("hello", seeded)
    free = GenerationConfig(max_new_tokens=20)
    assert small.generate("hello", free) != small.generate("hello", free)


def test_one_prompt_asked_several_times_gives_several_texts(small):
    config = GenerationConfig(seed=7, max_new_tokens=20)
    texts = small.generate(["hello"] * 4, config)
    assert len(set(texts)) == 4
    assert texts[0] == small.generate("hello", config)
    assert texts == small.generate(["hello"] * 4, config, batch_size=1)


def test_generation_leaves_the_global_random_state_alone(small):
    before = torch.get_rng_state()
    small.generate("hello", GenerationConfig(seed=7, max_new_tokens=3))
    small.generate("hello", GenerationConfig(max_new_tokens=3))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_forms_of_prompts(small):
    config = GenerationConfig(temperature=0, max_new_tokens=4)
    text = "the lazy dog"
    ids = small.tokenizer.encode(text)
    one = small.generate(text, config)
    assert isinstance(one, str)
    assert small.generate([text], config) == [one]
    assert small.generate(ids, config) == one
    assert small.generate([ids, text], config) == [one, one]
    assert small.generate([], config) == []


def test_training_mode_and_frozen_parts_are_as_before(small):
    model = small.model
    model.train()
    model.backbone.layers[0].eval()
    before = [m.training for m in model.modules()]
    config = GenerationConfig(temperature=0, max_new_tokens=3)
    first = small.generate("hello", config)
    assert [m.training for m in model.modules()] == before
    stream = small.stream("hello", config)
    next(stream)
    assert not torch.is_inference_mode_enabled()
    stream.close()
    assert [m.training for m in model.modules()] == before
    assert all(p.grad is None and not p.is_inference() for p in model.parameters())
    model.eval()
    assert small.generate("hello", config) == first


def test_prefill_asks_the_head_for_last_tokens_only(small):
    seen = []
    hook = small.model.head.register_forward_hook(lambda m, x, y: seen.append(tuple(y.shape)))
    try:
        small.generate([[5] * 30, [6] * 4], GenerationConfig(temperature=0, max_new_tokens=3))
    finally:
        hook.remove()
    assert seen == [(2, 300)] * 3


def test_a_generation_copies_and_pickles(small):
    got = small.generate("hello", GenerationConfig(seed=1, max_new_tokens=4, logprobs=1))
    for twin in (copy.deepcopy(got), pickle.loads(pickle.dumps(got))):
        assert twin == got
        assert vars(twin) == vars(got)


class TestErrors:
    def test_a_prompt_longer_than_the_model(self, small):
        with pytest.raises(DataError, match=r"97 tokens.* 96"):
            small.generate([[5] * 97])

    def test_a_prompt_as_long_as_the_model_has_no_room(self, small):
        (got,) = small.generate([[5] * 96])
        assert (got, got.token_ids, got.finish_reason) == ("", (), "length")

    @pytest.mark.parametrize("bad", [-1, 300])
    def test_ids_out_of_range(self, small, bad):
        with pytest.raises(DataError, match=rf"{bad}.*300"):
            small.generate([[5, bad]])

    def test_a_prompt_of_another_type(self, small):
        with pytest.raises(DataError, match="list of token ids"):
            small.generate([[1.5, 2.0]])

    def test_errors_of_a_stream_come_before_it_starts(self, small):
        with pytest.raises(DataError):
            small.stream([300])

    def test_an_empty_prompt_starts_from_bos_or_eos(self, small):
        bare = Tokenizer.train(["abc abd"], kind="bytes", special_tokens={"bos": None, "eos": None})
        config = GenerationConfig(temperature=0, max_new_tokens=2)
        assert bare.bos_id is None
        assert bare.eos_id is None
        with pytest.raises(DataError, match="empty"):
            TextGenerator(small.model, bare).generate("", config)
        assert small.generate("", config) == small.generate([small.tokenizer.bos_id], config)

    def test_as_many_configs_as_prompts(self, small):
        with pytest.raises(ConfigError, match="1 configs for 2 prompts"):
            small.generate(["a", "b"], [GenerationConfig()])

    def test_logits_that_are_not_numbers(self, small):
        broken = copy.deepcopy(small.model)
        with torch.no_grad():
            broken.head.weight[3] = float("nan")
        with pytest.raises(DataError, match="not finite after"):
            TextGenerator(broken, small.tokenizer).generate("hello")

    def test_a_model_without_a_head(self, small):
        headless = copy.deepcopy(small.model)
        headless.head = None
        with pytest.raises(ConfigError, match="head"):
            TextGenerator(headless, small.tokenizer)


TEXT = "hello world, wörld the END of some text"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("END",), "hello world, wörld the "),
        (("world", "END"), "hello "),
        (("o w", "ello"), "h"),
        (("ö",), "hello world, w"),
        (("xyz", "texts"), TEXT),
        (("hello worldly", "d, wörld"), "hello worl"),
        ((TEXT[-3:],), TEXT[:-3]),
    ],
)
def test_stop_strings_end_the_text_before_them(scripted, tokenizer, stop, expected):
    generator = scripted([9, *tokenizer.encode(TEXT, add_special_tokens=False), tokenizer.eos_id])
    config = GenerationConfig(temperature=0, stop=stop, max_new_tokens=90)
    got = generator.generate([[9]], config)[0]
    assert got == expected
    assert got.finish_reason == "stop"
    pieces = list(generator.stream([9], config))
    assert "".join(pieces) == expected
    assert "".join(tokenizer.decode([i]) for i in got.token_ids).startswith(expected[:5])


def test_a_stream_gives_whole_characters_at_once(scripted, tokenizer):
    ids = tokenizer.encode("a 日本語 ö.", add_special_tokens=False)
    generator = scripted([9, *ids, tokenizer.eos_id])
    pieces = list(generator.stream([9], GenerationConfig(temperature=0)))
    assert "".join(pieces) == "a 日本語 ö."
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) > 4


def test_a_text_cut_off_keeps_what_waited_for_a_stop_string(scripted, tokenizer):
    ids = tokenizer.encode("the END", add_special_tokens=False)
    config = GenerationConfig(temperature=0, stop="END!", max_new_tokens=len(ids))
    got = scripted([9, *ids, *ids]).generate([[9]], config)[0]
    assert (got, got.finish_reason) == ("the END", "length")


def test_stops_wait_for_the_minimum_length(scripted, tokenizer):
    ids = tokenizer.encode("the dog the dog", add_special_tokens=False)
    config = GenerationConfig(temperature=0, stop=" dog", min_new_tokens=len(ids) // 2 + 1)
    got = scripted([9, *ids, tokenizer.eos_id]).generate([[9]], config)[0]
    assert got.startswith("the dog")
    assert len(got) < len("the dog the dog")


def test_a_special_token_as_a_stop_string(scripted, tokenizer):
    ids = tokenizer.encode("hello world", add_special_tokens=False)
    generator = scripted([9, *ids, tokenizer.bos_id, *ids])
    got = generator.generate([[9]], GenerationConfig(temperature=0, stop="<s>"))[0]
    assert (got, got.finish_reason, got.token_ids[-1]) == ("hello world", "stop", tokenizer.bos_id)


def test_end_tokens_are_ignored_when_asked(scripted, tokenizer):
    ids = tokenizer.encode("hello", add_special_tokens=False)
    generator = scripted([9, *ids, tokenizer.eos_id, *ids, 7])
    config = GenerationConfig(temperature=0, max_new_tokens=2 * len(ids) + 1)
    assert generator.generate([[9]], config)[0] == "hello"
    longer = replace(config, ignore_eos=True)
    assert generator.generate([[9]], longer)[0] == "hellohello"
    shown = replace(longer, skip_special_tokens=False)
    assert generator.generate([[9]], shown)[0] == "hello</s>hello"


def test_the_context_ends_a_text(scripted):
    generator = scripted("the quick brown fox jumps over the lazy dog", max_seq_len=6)
    got = generator.generate([[9, 9]], GenerationConfig(temperature=0))[0]
    assert (len(got.token_ids), got.finish_reason) == (4, "length")


def test_tokens_of_rows_that_ended_are_not_computed_forever(scripted):
    """The batch ends with its last row."""
    generator = scripted("the quick brown fox jumps over the lazy dog")
    configs = [GenerationConfig(temperature=0, max_new_tokens=n) for n in (1, 3)]
    generator.generate([[9], [9]], configs)
    # Each prompt, and two tokens more of the longer text.
    assert generator.model.backbone.fed == 2 + 2
