"""Pages of every family: what they show is what the model computed."""

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.explain.models import TEXT, VISION, WINDOWS
from tests.models import test_clip, test_llava
from tests.nn.parts import shaken

import polyhead as ph
from polyhead.explain.heads import head_scores, repeated
from polyhead.explain.images import image_maps
from polyhead.explain.page import Page, page_of
from polyhead.tasks.looking import reader_of
from polyhead.text.pieces import pieces

SAID = "the cat sat on the mat. the cat ran."
TOKENIZER = ph.Tokenizer.train(["abcdefghijklmnopqrstuvwxyz .?!<>&'/\n"], kind="chars")
SHORT = ph.Tokenizer.train([SAID], kind="chars")  # models of few tokens read it
SIZES = {**TEXT, "vocab_size": TOKENIZER.vocab_size, "max_seq_len": 64}
EDGE = 16
PROCESSOR = ph.Processor(size=None)
PICTURE = (np.random.default_rng(0).random((EDGE, EDGE, 3)) * 255).astype(np.uint8)
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", SIZES, {"text": SAID}),
    "mixtral": ("mixtral", {**SIZES, "num_experts": 4, "top_k": 2}, {"text": SAID}),
    "bert": ("bert", SIZES, {"text": SAID, "second": "it did."}),
    "albert": ("albert", {**SIZES, "embedding_width": 8}, {"text": SAID}),
    "deberta": ("deberta-v2", {**SIZES, "head": "classify", "position_buckets": 8}, {"text": SAID}),
    "t5": ("t5", {k: v for k, v in SIZES.items() if k != "max_seq_len"} | {"head_dim": 4},
           {"text": SAID, "second": "el gato."}),
    "written": ("transformer", {**SIZES, "kind": "encoder-decoder"}, {"text": SAID}),
    "vit": ("vit", {**VISION, "num_layers": 2, "d_ff": 24}, {"image": PICTURE}),
    "swin": ("swin", {**VISION, **WINDOWS}, {"image": PICTURE}),
}  # fmt: skip


def model_of(name: str) -> Any:
    family, options, _ = FAMILIES[name]
    model = shaken(ph.build(family, seed=0, **options), 0.2, 0).eval()
    model.generation = {"decoder_start_token_id": 0, "eos_token_id": 1}
    return model


def page(name: str, **more: Any) -> tuple[Any, Page]:
    model = model_of(name)
    given = {**FAMILIES[name][2], **more}
    return model, ph.inside(model, TOKENIZER, processor=PROCESSOR, **given)


def shares_of(stack: dict[str, Any], sides: list[dict[str, Any]]) -> torch.Tensor:
    """As the component unpacks them: `[L, H, Q, K]`."""
    raw = np.frombuffer(gzip.decompress(base64.b64decode(stack["weights"])), np.uint8)
    layers, heads = len(stack["layers"]), stack["heads"]
    queries, keys = (len(sides[stack[side]]["tokens"]) for side in ("queries", "keys"))
    flat = torch.from_numpy((raw.astype(np.float32) / 255) ** 2)
    if "windows" not in stack:
        return flat.view(layers, heads, queries, keys)
    area, found = stack["windows"]["area"], torch.zeros(layers, heads, queries, keys)
    windows = flat.view(layers, heads, -1, area, area)
    for layer, places in enumerate(torch.tensor(stack["windows"]["places"])):
        window, row = places // area, places % area
        same = window[:, None] == window
        each = windows[layer][:, window[:, None], row[:, None], row[None]]
        found[layer] = each * same
    return found


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_page_shows_the_weights_of_every_layer(name: str) -> None:
    model, found = page(name)
    data = json.loads(json.dumps(found.data(), allow_nan=False))
    reader = reader_of(
        model, TOKENIZER, *(FAMILIES[name][2].get(key) for key in ("text", "second", "image")),
        PROCESSOR,
    )  # fmt: skip
    with ph.capture(model) as seen:
        model(reader.inputs) if isinstance(reader.inputs, torch.Tensor) else model(**reader.inputs)
    shown = {}
    for stack in data["stacks"]:
        shown |= dict(zip(stack["layers"], shares_of(stack, data["sides"]), strict=True))
        for values in stack["measures"].values():
            assert len(values) == len(stack["layers"])
            assert all(len(row) == stack["heads"] for row in values)
    assert set(shown) == set(seen)
    for layer, weights in seen.items():
        if name == "swin":
            continue  # below, against maps
        assert (shown[layer].sqrt() - weights[0].sqrt()).abs().max() <= 0.5 / 255 + 1e-6
    if name == "swin":
        edge = EDGE // 2
        for layer in list(seen)[:2]:
            for query in ((0, 0), (3, 5), (edge - 1, edge - 1)):
                maps = image_maps(model, reader.inputs, query, layer)[layer][0].flatten(1)
                own = shown[layer][:, query[0] * edge + query[1]]
                assert (own.sqrt() - maps.sqrt()).abs().max() <= 0.5 / 255 + 1e-6
    for finding in found.findings:
        stack = found.stacks[finding.stack]
        for (layer, head), named in zip(finding.heads, finding.names, strict=True):
            assert stack.layers[layer] == named
            assert head < stack.weights.shape[1]


@pytest.mark.parametrize("case", [*test_clip.CASES[:1], *test_llava.CASES], ids=lambda c: c.name)
@torch.no_grad()
def test_texts_with_images(case: Any, tmp_path: Path) -> None:
    case.make().save_pretrained(tmp_path)
    model, is_clip = ph.load(tmp_path), isinstance(case, test_clip.Case)
    edge = 12 if is_clip else test_llava.SIDE
    image = (np.random.default_rng(0).random((edge, edge, 3)) * 255).astype(np.uint8)
    said = SAID[:9]
    found = ph.inside(model, SHORT, said, image=image, processor=PROCESSOR)
    pixels = PROCESSOR(image)
    text = next(stack for stack in found.stacks if stack.name == "text")
    tower = next(stack for stack in found.stacks if stack.name == "image")
    ids = SHORT.encode(said)
    if not is_clip:
        ids = [test_llava.IMAGE] * case.num_features + ids
    with ph.capture(model) as seen:
        model(torch.tensor([ids]), pixels)
    for stack in (text, tower):
        for name, own in zip(stack.layers, stack.weights, strict=True):
            assert ((own / 255) - seen[name][0].sqrt()).abs().max() <= 0.5 / 255 + 1e-6
    side = found.sides[text.queries]
    assert "".join(side.tokens).endswith(said)
    if not is_clip:
        assert side.picture is not None
        assert side.tokens[side.picture.first] == "r0 c0"
        last = side.picture.first + side.picture.rows * side.picture.columns - 1
        assert side.tokens[last] == f"r{side.picture.rows - 1} c{side.picture.columns - 1}"
        assert side.tokens[last + 1] == said[0]
    assert found.sides[tower.keys].tokens[-1].startswith("r")
    assert len(found.sides[tower.keys].tokens) == tower.weights.shape[-1]


def test_sides_are_those_of_the_call() -> None:
    _, found = page("t5")
    names = [stack.name for stack in found.stacks]
    assert names == ["encoder", "decoder", "cross-attention"]
    cross = found.stacks[2]
    assert "".join(found.sides[cross.keys].tokens).startswith("the cat")
    assert "".join(found.sides[cross.queries].tokens).endswith("el gato.")
    _, found = page("vit")
    picture = found.sides[0].picture
    assert picture is not None
    assert (picture.rows, picture.columns, picture.first) == (4, 4, 1)
    assert len(found.sides[0].tokens) == 17
    assert picture.src.startswith("data:image/jpeg;base64,")


@torch.no_grad()
def test_the_lens_ends_at_the_answer() -> None:
    model, found = page("llama")
    assert found.lens is not None
    best = model(torch.tensor([TOKENIZER.encode(SAID)])).softmax(-1)[0].max(-1)
    last = [answers[0] for answers in found.lens.answers[-1]]
    assert [word for word, _ in last] == pieces(TOKENIZER, best.indices.tolist())
    assert [share for _, share in last] == pytest.approx(best.values.tolist(), abs=1e-3)
    assert len(found.lens.answers[-1][-1]) == 5


def test_induction_is_told_by_texts_written_twice_alone() -> None:
    assert "induction" not in page("bert")[1].stacks[0].measures
    model, found = page("llama")
    ids = torch.tensor([i for i in range(TOKENIZER.vocab_size) if i not in TOKENIZER.special_ids])
    begin = TOKENIZER.bos_id if TOKENIZER.bos_id is not None else TOKENIZER.eos_id
    expected = head_scores(model, repeated(ids, 31, 4, begin=begin)).table("induction")
    shown = torch.tensor(found.stacks[0].measures["induction"])
    assert (shown - expected).abs().max() < 1e-4


def test_a_part_of_the_layers() -> None:
    _, found = page("llama", where="layers.1")
    assert [stack.layers for stack in found.stacks] == [["backbone.layers.1.attention"]]


def test_a_long_text_loses_its_end_where_that_is_asked() -> None:
    _, found = page("llama", max_tokens=7)
    assert "".join(found.sides[0].tokens) == SAID[:7]


def test_a_page_is_one_file_that_asks_for_nothing(tmp_path: Path) -> None:
    _, found = page("llama", text="a </script><b>&'\n is text.", title="<i>&mine")
    path = found.save(tmp_path / "page.html")
    text = path.read_text("utf-8")
    assert len(text) < 2_000_000
    assert "<i>" not in text
    assert "&lt;i&gt;&amp;mine" in text
    assert text.count("</script>") == 2
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(""", text)
    data = re.search(r"\.data = (.*);</script>", text)
    assert data
    assert "".join(json.loads(data[1])["sides"][0]["tokens"]) == "a </script><b>&'\n is text."
    with pytest.raises(ph.FileError, match="--force"):
        found.save(path)
    found.save(path, force=True)
    with pytest.raises(ph.FileError, match="cannot be written"):
        found.save(tmp_path / "no" / "page.html")
    assert "<polyhead-inside" in found._repr_html_()


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("llama", {"second": "no"}, "llama reads one text; leave the second out"),
        ("llama", {"image": PICTURE}, "leave the image out"),
        ("llama", {"text": None}, "give it a text"),
        ("llama", {"text": "  "}, "empty"),
        ("llama", {"text": "a"}, "one token"),
        ("llama", {"text": "ab" * 64}, "64"),
        ("llama", {"max_tokens": 1}, "max_tokens is 1"),
        ("llama", {"where": "layers.9"}, "no attention is called 'layers.9'"),
        ("vit", {"text": "no"}, "vit reads an image alone; leave the text out"),
        ("vit", {"image": None}, "give it an image"),
        ("bert", {"second": ""}, "empty"),
    ],
)
def test_bad_input_is_told(name: str, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ph.PolyheadError, match=re.escape(said)):
        page(name, **more)


def test_weights_of_ones_own() -> None:
    weights = torch.rand(2, 3, 4, 5).softmax(-1)
    found = page_of({"a": weights[:1, :, :, :], "b": weights[1]}, list("wxyz"), list("abcde"))
    data = found.data()
    shown = shares_of(data["stacks"][0], data["sides"])
    assert (shown.sqrt() - weights.sqrt()).abs().max() <= 0.5 / 255 + 1e-6
    assert data["stacks"][0]["layers"] == ["a", "b"]
    square = page_of(weights[0, 0, :, :4], list("wxyz"))
    assert square.stacks[0].queries == square.stacks[0].keys == 0
    with pytest.raises(ph.ConfigError, match=r"\(4, 5\)"):
        page_of(weights, list("wxyz"))
    with pytest.raises(ph.ConfigError, match="dimensions"):
        page_of(weights[None], list("wxyz"))
    with pytest.raises(ph.ConfigError, match="one shape"):
        page_of({"a": weights[0], "b": weights[0, :, :2]}, list("wxyz"), list("abcde"))


@pytest.mark.parametrize(
    ("family", "where", "names", "numbers"),
    [
        ("llama", "layers.2", ["backbone.layers.2.attention"], [2]),
        ("albert", "*@1", ["backbone.layers.0.0.attention@1"], [1]),
        (
            "albert",
            "*",
            [f"backbone.layers.0.0.attention{run}" for run in ("", "@1", "@2")],
            [0, 1, 2],
        ),
    ],
)
def test_layers_that_are_left_out_are_counted(
    family: str, where: str, names: list[str], numbers: list[int]
) -> None:
    tokenizer = ph.Tokenizer.train(["once upon a time"], kind="bytes")
    sizes = dict(vocab_size=tokenizer.vocab_size, d_model=16, d_ff=24, num_layers=3, num_heads=2)
    model = ph.build(family, seed=0, **sizes).eval()
    page = ph.inside(model, tokenizer, "once upon a time", where=where)
    (stack,) = page.stacks
    assert list(stack.layers) == names
    assert list(stack.numbers) == numbers
    assert page.data()["stacks"][0]["numbers"] == numbers
    told = [finding.text for finding in page.findings if "the most is" in finding.text]
    assert all(any(f"layer {number}," in text for number in numbers) for text in told)


def test_a_model_that_answers_nothing_says_so() -> None:
    tokenizer = ph.Tokenizer.train(["once upon a time"], kind="bytes")
    model = ph.build("gpt2", vocab_size=tokenizer.vocab_size, d_model=16, num_layers=1, num_heads=2)
    with torch.no_grad():
        next(iter(model.parameters())).fill_(torch.nan)
    with pytest.raises(ph.ConfigError, match="are not numbers"):
        ph.inside(model.eval(), tokenizer, "once upon")
