"""Whole heads, neurons and experts go: what stays is the old model whose others say nothing."""

import copy

import pytest
import torch

import polyhead as ph
from polyhead.compress.importance import Importance, magnitude
from polyhead.compress.parts import least_parts
from polyhead.errors import ConfigError
from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.feedforward import FeedForward, GatedFeedForward
from polyhead.nn.moe import Experts, MixtureOfExperts

from .families import CASES, WORDS, Case

by_family = pytest.mark.parametrize("name", CASES)
CLOSE = 2e-5


def parts(model, kind):
    return [(name, part) for name, part in model.backbone.named_modules() if isinstance(part, kind)]


def drawn(model, seed=0):
    """Scores by chance, so that no rule of the library's own is believed."""
    random = torch.Generator().manual_seed(seed)

    def some(*shape):
        return torch.rand(shape, generator=random)

    return Importance(
        {name: some(part.num_heads) for name, part in parts(model, MultiHeadAttention)},
        {
            **{n: some(p.up.out_features) for n, p in parts(model, FeedForward | GatedFeedForward)},
            **{name: some(*part.gate.shape[:2]) for name, part in parts(model, Experts)},
        },
        {name: some(part.num_experts) for name, part in parts(model, MixtureOfExperts)},
    )


def least(scores, left):
    """Numbers of those that are not among the `left` largest."""
    order = sorted(range(len(scores)), key=lambda number: -scores[number])
    return sorted(order[left:])


def sharing(model, name):
    """The names of the attentions whose heads read one table of positions with this one's."""
    kind = getattr(model.config, "position", model.config.model_type)
    if kind == "alibi" and "cross" not in name:
        return [n for n, _ in parts(model, MultiHeadAttention) if "cross" not in n]
    if kind == "t5" and "cross" not in name:
        stack = name.partition(".")[0]
        return [n for n, _ in parts(model, MultiHeadAttention)
                if n.startswith(stack) and "cross" not in n]  # fmt: skip
    return [name]


def silenced(model, small, scores):
    """A copy of the model whose heads and neurons that `small` lacks write nothing."""
    found = copy.deepcopy(model)
    for name, part in parts(found, MultiHeadAttention):
        left = small.backbone.get_submodule(name)
        alike = sharing(model, name)
        own = sum(scores.heads[n] / scores.heads[n].sum() for n in alike)
        by_key = own.view(part.num_kv_heads, -1).tolist()
        readers = left.num_heads // left.num_kv_heads
        gone = [least(some, readers) for some in by_key]
        worth = [sum(s for h, s in enumerate(some) if h not in out)
                 for some, out in zip(by_key, gone, strict=True)]  # fmt: skip
        for key in least(worth, left.num_kv_heads):
            gone[key] = list(range(len(by_key[key])))
        for key, some in enumerate(gone):
            for head in some:
                at = (key * len(by_key[0]) + head) * part.head_dim
                part.out.weight.data[:, at : at + part.head_dim] = 0
    for name, part in parts(found, FeedForward | GatedFeedForward):
        left = small.backbone.get_submodule(name).up.out_features
        part.down.weight.data[:, least(scores.neurons[name].tolist(), left)] = 0
    for name, part in parts(found, Experts):
        left = small.backbone.get_submodule(name).gate.shape[1]
        for expert, some in enumerate(scores.neurons[name].tolist()):
            part.down.data[expert][:, least(some, left)] = 0
    for name, part in parts(found, MixtureOfExperts):
        left = small.backbone.get_submodule(name).num_experts
        gone = least(scores.experts[name].tolist(), left)
        part.router.register_forward_hook(
            lambda _, __, logits, gone=gone: logits.index_fill(
                1, torch.tensor(gone, dtype=torch.long), float("-inf")
            )
        )
    return found


def difference(a, b):
    return (a - b).abs().max().item()


ASKED = [
    (name, what)
    for name in CASES
    for what in ("heads", "kv_heads", "neurons", "all")
    if (name, what) != ("mqa", "kv_heads")  # one head of keys serves all queries
]


@pytest.mark.parametrize(("name", "what"), ASKED)
@torch.no_grad()
def test_what_stays_is_the_old_model_whose_others_say_nothing(tmp_path, name, what):
    model, given = CASES[name].build(), CASES[name].given()
    has_experts = bool(parts(model, MixtureOfExperts))
    asked = {"heads": 0.5, "neurons": 0.3, "experts": 0.3 * has_experts}
    asked = asked if what == "all" else {what: 0.5}
    scores, before = drawn(model), copy.deepcopy(model.state_dict())
    small = ph.shrink(model, **asked, importance=scores)
    expected = silenced(model, small, scores)(**given)
    assert difference(small(**given), expected) <= CLOSE * max(1, expected.abs().max().item())
    assert difference(expected, model(**given)) > 1e-3  # what goes was heard
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert small.num_parameters() < model.num_parameters()
    small.save(tmp_path)
    again = ph.load(tmp_path, head=small.head_kind)
    assert again.config == small.config
    state = again.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in small.state_dict().items())
    # Where a file holds a matrix may change the order of a sum.
    assert difference(again(**given), small(**given)) <= CLOSE


@pytest.mark.parametrize("by", ["heads", "neurons"])
@by_family
@torch.no_grad()
def test_what_pruning_silences_is_what_shrinking_takes_away(name, by):
    """At once, and half of it first."""
    model, given = CASES[name].build(), CASES[name].given()
    silent = ph.prune(model, 0.5, by=by)
    small = ph.shrink(silent, **{by: 0.5})
    expected = silent(**given)
    assert difference(small(**given), expected) <= CLOSE * max(1, expected.abs().max().item())
    assert difference(expected, model(**given)) > 1e-3
    halfway, weights = copy.deepcopy(model), dict(model.named_parameters())
    some = least_parts(model, 0.5, by, 0.5)
    for key, goes in some.items():
        halfway.get_parameter(key)[goes] = 0
    then = least_parts(halfway, 0.5, by)
    assert some.keys() == then.keys()
    for key, goes in then.items():
        assert goes.shape == weights[key].shape
        assert goes[some[key]].all(), "what went came back"
    gone, all_gone = (sum(int(goes.sum()) for goes in found.values()) for found in (some, then))
    assert 0.4 * all_gone < gone < 0.9 * all_gone


@by_family
def test_the_config_says_every_shape(name):
    model = CASES[name].build()
    small = ph.shrink(model, heads=0.5, neurons=0.25)
    fresh = ph.models.assemble.assemble(
        ph.models.registry.family_of(small.config.model_type), small.config, small.head_kind
    )
    shapes = {key: value.shape for key, value in small.state_dict().items()}
    assert shapes == {
        key: value.shape for key, value in fresh.state_dict().items() if key in shapes
    }
    for (_, old), (_, new) in zip(
        parts(small, MultiHeadAttention), parts(fresh, MultiHeadAttention), strict=True
    ):
        assert (old.num_heads, old.num_kv_heads, old.head_dim, old.scale) == (
            new.num_heads, new.num_kv_heads, new.head_dim, new.scale,
        )  # fmt: skip


DECODERS = ["gpt2", "llama", "mqa", "mistral", "qwen3", "mixtral", "alibi", "rotary"]


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_a_smaller_decoder_writes_what_its_whole_forward_says(name):
    small = ph.shrink(CASES[name].build(), heads=0.5, neurons=0.25)
    ids = WORDS[:, :4]
    static, growing = small.backbone.make_caches(2, 16), small.backbone.make_caches(2)
    step = {True: ids, False: ids}
    for _ in range(5):
        whole = small(ids)[:, -1]
        for is_static, caches in ((True, static), (False, growing)):
            hidden = small.backbone(step[is_static], caches=caches)
            assert difference(small.head(hidden)[:, -1], whole) <= CLOSE * 10
        ids = torch.cat([ids, whole.argmax(-1)[:, None]], 1)
        step = {True: ids[:, -1:], False: ids[:, -1:]}


@pytest.mark.parametrize("name", ["t5", "marian", "alibi pairs"])
@torch.no_grad()
def test_a_smaller_encoder_decoder_writes_from_its_caches(name):
    small = ph.shrink(CASES[name].build(), heads=0.5, neurons=0.25)
    ids = WORDS[:, :1]
    memory, caches = small.backbone.encode(WORDS), small.backbone.make_caches(2)
    for _ in range(4):
        whole = small(WORDS, ids)[:, -1]
        hidden = small.backbone.decode(ids[:, -1:], memory, caches=caches)
        assert difference(small.head(hidden)[:, -1], whole) <= 1e-4 * whole.abs().max().item()
        ids = torch.cat([ids, whole.argmax(-1)[:, None]], 1)


WIDE = dict(d_model=64, num_layers=2, num_heads=6, head_dim=32, vocab_size=50, d_ff=96)
SMALLER = {
    "queries": ("llama", {"num_kv_heads": 2}, lambda m: ph.shrink(m, heads=0.3, neurons=0.3)),
    "keys": ("llama", {"num_kv_heads": 2}, lambda m: ph.shrink(m, kv_heads=0.5)),
    "gpt2": ("gpt2", {}, lambda m: ph.shrink(m, heads=0.5, neurons=0.3)),
    "experts": ("mixtral", dict(num_experts=4, top_k=2, num_kv_heads=6),
                lambda m: ph.shrink(m, heads=0.3, experts=0.5)),
    "low rank": ("llama", {"num_kv_heads": 2}, lambda m: ph.low_rank(m, keep=0.5)),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALLER)
@torch.no_grad()
def test_the_engine_serves_a_smaller_model(name):
    family, fields, make = SMALLER[name]
    small = make(ph.build(family, seed=0, init_std=0.1, **WIDE, **fields).eval())
    tokenizer = ph.Tokenizer.train(["abcdefgh"], kind="chars")
    config = ph.GenerationConfig(max_new_tokens=4, temperature=0, ignore_eos=True)
    for served in (small, ph.pack(small)):
        found = ph.TextGenerator(served, tokenizer).generate("abc", config)
        ids = torch.tensor([tokenizer.encode("abc")])
        for _ in range(4):
            ids = torch.cat([ids, small(ids)[:, -1:].argmax(-1)], 1)
        assert list(found.token_ids) == ids[0, -4:].tolist()


@pytest.mark.parametrize(
    ("name", "asked", "said"),
    [
        ("gpt2", {"heads": 0.5}, {"num_heads": 2, "head_dim": 8}),
        ("llama", {"heads": 0.3}, {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}),
        ("llama", {"kv_heads": 0.5}, {"num_heads": 3, "num_kv_heads": 1, "head_dim": 8}),
        ("llama", {"heads": 0.3, "kv_heads": 0.5}, {"num_heads": 2, "num_kv_heads": 1}),
        ("mqa", {"heads": 0.25}, {"num_heads": 3, "num_kv_heads": 1, "head_dim": 8}),
        ("mixtral", {"experts": 0.5}, {"num_experts": 2, "top_k": 2}),
        ("qwen2_moe", {"neurons": 0.25}, {"d_ff": 18, "d_expert": 9, "shared_d_ff": 15}),
        ("marian", {"heads": 0.25}, {"num_heads": 3, "num_decoder_heads": 6,
                                     "head_dim": 8, "decoder_head_dim": 4}),
        ("swin", {"heads": 0.5, "neurons": 0.5}, {"num_heads": (1, 2), "head_dim": (8, 8),
                                                  "mlp_ratio": 2.0}),
        ("albert", {"heads": 0.25}, {"num_heads": 3, "num_groups": 1, "num_layers": 2}),
    ],
)  # fmt: skip
def test_shares_are_of_what_stands_side_by_side(name, asked, said):
    config = ph.shrink(CASES[name].build(), **asked).config
    assert {key: getattr(config, key) for key in said} == said


def test_wide_layers_stay_multiples_of_32():
    model = ph.build("llama", **{**CASES["llama"].fields, "d_ff": 1376})
    assert ph.shrink(model, neurons=0.3).config.d_ff == 960


def test_the_weights_alone_find_what_writes_nothing():
    model = CASES["mixtral"].build()
    first, second = model.backbone.layers
    with torch.no_grad():
        first.attention.out.weight[:, 8:16] = 0
        second.attention.v.weight[16:24] = 0
        first.ffn.experts.down[:, :, 3] = 0
        second.ffn.experts.up[2] = 0
        second.attention.v.bias, second.attention.out.bias = None, None
        small = ph.shrink(model, heads=0.25, neurons=1 / 24, experts=0.25)
    assert magnitude(model).heads["layers.0.attention"].argmin() == 1
    assert magnitude(model).heads["layers.1.attention"].argmin() == 2
    assert magnitude(model).experts["layers.1.ffn"].argmin() == 2
    assert small.num_parameters() < model.num_parameters()
    whole = first.attention.out.weight
    left = torch.cat([whole[:, :8], whole[:, 16:]], 1)
    assert torch.equal(small.backbone.layers[0].attention.out.weight, left)


def test_magnitude_is_the_length_of_what_a_part_writes():
    model = CASES["llama"].build()
    attention = model.backbone.layers[0].attention
    found = magnitude(model)
    for head, counts in enumerate(found.heads["layers.0.attention"]):
        out = attention.out.weight[:, 8 * head : 8 * head + 8]
        values = attention.v.weight[8 * (head // 3) : 8 * (head // 3) + 8]
        assert counts == pytest.approx((out @ values).norm().item(), rel=1e-4)


def gated(model, ids, name, head):
    """What the loss gains a unit by a gate on one head, by finite differences."""
    attention = model.backbone.get_submodule(name)
    losses = []
    for gate in (1 + 1e-3, 1 - 1e-3):
        hook = attention.out.register_forward_pre_hook(
            lambda _, args, gate=gate: (
                torch.cat([
                    x * (gate if number == head else 1)
                    for number, x in enumerate(args[0].split(attention.head_dim, -1))
                ], -1),
            )
        )  # fmt: skip
        with torch.no_grad():
            logits = model(ids)[:, :-1].flatten(0, 1)
            losses.append(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).item())
        hook.remove()
    return abs(losses[0] - losses[1]) / 2e-3


def test_importance_is_the_gradient_by_a_gate():
    model = CASES["llama"].build().double()
    model.requires_grad_(False)
    found = ph.importance(model, WORDS)
    for name, scores in found.heads.items():
        for head, score in enumerate(scores.tolist()):
            expected = sum(gated(model, row[None], name, head) for row in WORDS)
            assert score == pytest.approx(expected, rel=1e-3, abs=1e-8)
    assert not any(weight.requires_grad for weight in model.parameters())
    assert all(weight.grad is None for weight in model.parameters())


def test_experts_count_by_what_tokens_give_them():
    model = CASES["mixtral"].build()
    found = ph.importance(model, WORDS)
    for name in ("layers.0.ffn", "layers.1.ffn"):
        assert found.experts[name].sum().item() == pytest.approx(WORDS.numel(), rel=1e-5)
    with torch.no_grad():
        model.backbone.layers[0].ffn.router.weight[3] = 0
        model.backbone.layers[0].ffn.router.weight[3, 0] = -1e4
        model.backbone.layers[0].ffn_norm.weight[0] = 1e4
    assert ph.importance(model, WORDS).experts["layers.0.ffn"].shape == (4,)


@by_family
def test_importance_speaks_of_every_part(name):
    model, given = CASES[name].build(), CASES[name].given()
    found = ph.importance(model, [given], lambda m, batch: m(**batch).square().mean())
    expected = drawn(model)
    for kind in ("heads", "neurons", "experts"):
        ours, there = getattr(found, kind), getattr(expected, kind)
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in there.items()}
    small = ph.shrink(model, heads=0.5, importance=found)
    assert small.num_parameters() < model.num_parameters()


def test_data_finds_what_the_loss_does_not_need():
    """A head that is loud, and whose words the head of the model does not read."""
    case = Case("gpt2", dict(d_model=32, num_layers=1, num_heads=4, vocab_size=50,
                             tie_embeddings=False))  # fmt: skip
    model = case.build()
    with torch.no_grad():
        attention = model.backbone.layers[0].attention
        attention.out.weight[:, 8:16] = 0
        attention.out.weight[5, 8:16] = 100
        for reader in (model.head.weight, model.backbone.layers[0].ffn.up.weight):
            reader[:, 5] = 0
        model.backbone.norm.weight.zero_()
        model.backbone.norm.bias.normal_()
    assert magnitude(model).heads["layers.0.attention"].argmax() == 1
    assert ph.importance(model, WORDS).heads["layers.0.attention"][1] < 1e-6


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda m: ph.shrink(m), "nothing is to go: give a share of heads, kv_heads, neurons"),
        (lambda m: ph.shrink(m, heads=1.0), "heads is 1.0: a share from 0 to below 1"),
        (lambda m: ph.shrink(m, neurons=-0.1), "neurons is -0.1: a share"),
        (lambda m: ph.shrink(m, heads=0.1), "of 3 side by side none would go; ask for 0.17"),
        (lambda m: ph.shrink(m, heads=0.9), "of 3 side by side none would stay"),
        (lambda m: ph.shrink(m, experts=0.5), "experts is 0.5, and llama has none"),
        (lambda m: ph.shrink(CASES["mixtral"].build(), experts=0.75), "1 would be left, and each"),
        (lambda m: ph.shrink(ph.build("bigram", vocab_size=9), heads=0.5), "bigram has none"),
        (lambda m: ph.shrink(ph.quantize(m), heads=0.3), "in few bits"),
        (lambda m: (ph.add_adapter(m), ph.shrink(m, heads=0.3)), "with adapters"),
        (lambda m: ph.shrink(m, heads=0.3, importance=Importance()), "importance says nothing of"),
        (
            lambda m: ph.shrink(ph.build("olmoe", **CASES["mixtral"].fields), heads=0.5),
            "olmoe norms all heads of a layer together",
        ),
        (
            lambda m: ph.importance(CASES["bert"].build(), WORDS),
            "bert with the head 'lm' has no loss",
        ),
        (lambda m: ph.importance(m, []), "of no batch at all"),
        (lambda m: ph.importance(ph.quantize(m), WORDS), "in few bits"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(ConfigError, match=said) as error:
        make(CASES["llama"].build())
    assert "\n" not in str(error.value)
