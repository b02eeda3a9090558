"""The paper's encoder-decoder equals torch's with the same weights; every choice holds together."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

import polyhead as ph
from polyhead.models.transformer import Stack

CLOSE = 1e-5
SIZES = dict(vocab_size=37, d_model=32, d_ff=48, num_layers=2, num_heads=4, max_seq_len=40)


def shake(model: nn.Module) -> None:
    """Norms and biases away from one and zero, so that one not read would show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


def copy_stack(ours: Stack, theirs: nn.Module) -> None:
    """Our weights into torch's layers."""

    def attention(into: nn.MultiheadAttention, source: nn.Module) -> None:
        into.in_proj_weight.copy_(torch.cat([source.q.weight, source.k.weight, source.v.weight]))
        into.in_proj_bias.copy_(torch.cat([source.q.bias, source.k.bias, source.v.bias]))
        into.out_proj.load_state_dict(source.out.state_dict())

    with torch.no_grad():
        for mine, layer in zip(ours.layers, theirs.layers, strict=True):
            attention(layer.self_attn, mine.attention)
            layer.linear1.load_state_dict(mine.ffn.up.state_dict())
            layer.linear2.load_state_dict(mine.ffn.down.state_dict())
            norms = [mine.attention_norm, mine.ffn_norm]
            if mine.cross is not None:
                attention(layer.multihead_attn, mine.cross)
                norms.insert(1, mine.cross_norm)
            for number, norm in enumerate(norms, 1):
                getattr(layer, f"norm{number}").load_state_dict(norm.state_dict())
        if theirs.norm is not None:
            theirs.norm.load_state_dict(ours.norm.state_dict())


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_equals_torch(norm_first: bool, activation: str, tied: bool) -> None:
    model = ph.build(
        "transformer", norm_first=norm_first, activation=activation, tie_embeddings=tied, **SIZES
    ).eval()
    shake(model)
    body = model.backbone
    options = dict(activation=activation, norm_first=norm_first, batch_first=True, dropout=0.0)
    final = (lambda: nn.LayerNorm(32)) if norm_first else (lambda: None)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 48, **options), 2, final(), enable_nested_tensor=False
    )
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 48, **options), 2, final())
    theirs = nn.Transformer(
        32, 4, custom_encoder=encoder.eval(), custom_decoder=decoder.eval(), batch_first=True
    )
    # Only now: its constructor draws all weights anew.
    copy_stack(body.encoder, encoder)
    copy_stack(body.decoder, decoder)

    def embed(ids: torch.Tensor) -> torch.Tensor:
        table = torch.zeros(ids.shape[1], 32)
        for at, i in itertools.product(range(ids.shape[1]), range(16)):
            angle = at / 10000 ** (2 * i / 32)
            table[at, 2 * i] = torch.tensor(angle).sin()
            table[at, 2 * i + 1] = torch.tensor(angle).cos()
        return body.embedding.weight[ids] * 32**0.5 + table

    source, target = torch.randint(0, 37, (3, 11)), torch.randint(0, 37, (3, 8))
    padding = torch.arange(11) >= torch.tensor([11, 4, 7])[:, None]
    with torch.no_grad():
        hidden = theirs(
            embed(source),
            embed(target),
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(8),
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
        expected = hidden @ (body.embedding.weight if tied else model.head.weight).T
        ours = model(source, target, attention_mask=(~padding).long())
    assert (ours - expected).abs().max() <= CLOSE * max(1, expected.abs().max().item())


CHOICES = [
    dict(position="sinusoidal"),
    dict(position="learned", gated=True, activation="silu"),
    dict(position="rotary", norm="rms", norm_first=True, bias=False),
    dict(position="alibi", num_kv_heads=2, activation="relu2"),
    dict(position="t5", num_kv_heads=1, norm="layer_without_bias"),
    dict(position="shaw", max_distance=3),
    dict(position="none", window=4),
    dict(position="rotary", window=5, norm_first=True),
    dict(position="t5", pattern="strided", stride=3),
    dict(position="alibi", pattern="big_bird", window=3, num_random=1),
    dict(position="rotary", num_experts=4, top_k=2, shared_d_ff=16, activation="silu"),
    dict(position="learned", tie_embeddings=False, scale_embeddings=False),
]
by_choice = pytest.mark.parametrize("choice", CHOICES, ids=lambda c: "-".join(map(str, c.values())))


def fresh(choice: dict, kind: str):
    model = ph.build("transformer", kind=kind, **SIZES, **choice).eval()
    shake(model)
    return model


@by_choice
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_decoder_in_chunks_and_in_ragged_rows(choice: dict, static: bool) -> None:
    model = fresh(choice, "decoder")
    ids = torch.randint(0, 37, (2, 17))
    lengths = torch.tensor([9, 4])
    mask = torch.arange(9) < lengths[:, None]
    with torch.no_grad():
        whole = model(ids)
        scale = max(1.0, whole.abs().max().item())
        caches = model.backbone.make_caches(2, 20 if static else None)
        edges = [0, 6, 11, 12, 13, 14, 15, 16, 17]
        pieces = [model(ids[:, a:b], caches=caches) for a, b in itertools.pairwise(edges)]
        assert (torch.cat(pieces, 1) - whole).abs().max() <= CLOSE * scale
        caches = model.backbone.make_caches(2, 20 if static else None)
        model(ids[:, :9], mask, caches=caches)
        step = model(ids[:, 9:10], caches=caches)
        for row, length in enumerate(lengths.tolist()):
            alone = model(torch.cat([ids[row : row + 1, :length], ids[row : row + 1, 9:10]], 1))
            assert (step[row, 0] - alone[0, -1]).abs().max() <= CLOSE * scale


@by_choice
def test_encoder_decoder_with_padding_and_caches(choice: dict) -> None:
    model = fresh(choice, "encoder-decoder")
    source, target = torch.randint(0, 37, (2, 12)), torch.randint(0, 37, (2, 9))
    mask = torch.arange(12) < torch.tensor([12, 5])[:, None]
    with torch.no_grad():
        whole = model(source, target, attention_mask=mask)
        scale = max(1.0, whole.abs().max().item())
        alone = model(source[1:, :5], target[1:])
        assert (whole[1:] - alone).abs().max() <= CLOSE * scale
        body = model.backbone
        memory = body.encode(source, mask)
        caches = body.make_caches(2)
        steps = [
            model.head(body.decode(target[:, t : t + 1], memory, mask, caches=caches))
            for t in range(9)
        ]
        assert (torch.cat(steps, 1) - whole).abs().max() <= CLOSE * scale


@by_choice
def test_encoder_rows_alone(choice: dict) -> None:
    model = fresh(choice, "encoder")
    ids = torch.randint(0, 37, (2, 12))
    mask = torch.arange(12) < torch.tensor([12, 5])[:, None]
    with torch.no_grad():
        batch = model(ids, attention_mask=mask)
        alone = model(ids[1:, :5])
    assert (batch[1:, :5] - alone).abs().max() <= CLOSE * max(1, alone.abs().max().item())


@by_choice
@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder", "encoder"])
def test_saves_and_loads(choice: dict, kind: str, tmp_path: Path) -> None:
    model = fresh(choice, kind)
    model.save(tmp_path)
    again = ph.load(tmp_path)
    assert again.config == model.config
    states = model.state_dict(), again.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    with pytest.raises(ph.FileError, match="force"):
        model.save(tmp_path)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        (dict(kind="both"), "encoder-decoder"),
        (dict(position="rope"), "rotary"),
        (dict(num_heads=5), "divide"),
        (dict(num_kv_heads=3), "multiple"),
        (dict(heads=4), "no field"),
        (dict(pattern="big_bird"), "window"),
    ],
)
def test_impossible_choices_say_what_to_do(fields: dict, word: str) -> None:
    with pytest.raises(ph.ConfigError, match=word):
        ph.build("transformer", **{**SIZES, **fields})
