"""Patching, alignment, similarity, experts' load and maps over images, each by what is known."""

import pytest
import torch
from tests.explain.models import IDS, IMAGES, OTHER, answer, made
from tests.nn.parts import shaken
from torch import Tensor

import polyhead as ph
from polyhead.explain.alignment import alignment, alignment_error_rate, hard_alignment, of_words
from polyhead.explain.experts import expert_load
from polyhead.explain.heads import head_scores
from polyhead.explain.images import image_maps, over_image
from polyhead.explain.inputs import logit
from polyhead.explain.patching import patching_grid
from polyhead.explain.similar import cka, layer_similarity


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_the_place_that_differs_brings_everything_back(name: str) -> None:
    model, other = made(name), IDS.clone()
    other[:, 4] = (IDS[:, 4] + 5) % 28 + 3
    target = logit(7)
    grid = patching_grid(model, IDS, other, target, "residual_in")
    assert grid.effect.shape == (3, 9)
    torch.testing.assert_close(grid.effect[0, 4], torch.tensor(1.0), atol=1e-4, rtol=0.0)
    assert grid.effect[:, :4].abs().max() < 1e-5
    last = patching_grid(model, IDS, other, target)
    torch.testing.assert_close(last.effect[2, 8], torch.tensor(1.0), atol=1e-4, rtol=0.0)
    assert last.effect[2, :8].abs().max() < 1e-5
    assert last.clean == pytest.approx(float(target(answer(model, IDS)).mean()), abs=1e-5)
    heads = patching_grid(model, IDS, other, target, "heads", "layers.1")
    assert heads.effect.shape == (1, 4)
    with ph.capture(model, "layers.1", "heads") as seen:
        answer(model, IDS)
    (found,) = seen.values()

    def second(x: Tensor) -> Tensor:
        return torch.cat([x[:, :2], found[:, 2:3], x[:, 3:]], 1)

    with ph.replace(model, "layers.1", "heads", second):
        value = float(target(answer(model, other)).mean())
    expected = (value - heads.corrupted) / (heads.clean - heads.corrupted)
    assert float(heads.effect[0, 2]) == pytest.approx(expected, abs=1e-4)


def test_depths_of_a_shared_layer_are_patched_apart() -> None:
    model, other = made("albert"), IDS.clone()
    other[:, 4] = 3
    grid = patching_grid(model, IDS, other, logit(7), "residual")
    assert grid.names == [f"backbone.layers.0.0{run}" for run in ("", "@1", "@2")]
    torch.testing.assert_close(grid.effect[2, 8], torch.tensor(1.0), atol=1e-4, rtol=0.0)
    assert grid.effect[2, :8].abs().max() < 1e-5
    assert grid.effect[0].ne(grid.effect[1]).any()


def test_runs_that_cannot_be_patched() -> None:
    model = made("llama")
    with pytest.raises(ph.ConfigError, match="wants as many of both"):
        patching_grid(model, IDS, IDS[:, :5], logit(7))
    with pytest.raises(ph.ConfigError, match="nothing to explain"):
        patching_grid(model, IDS, IDS, logit(7))


def test_weights_on_the_source_are_the_alignment() -> None:
    model = made("transformer")
    wanted = torch.zeros(7, 9)
    for target, source in enumerate([2, 0, 8, 3, 3, 4, 1]):
        wanted[target, source] = 1.0
    with ph.replace(model, "decoder.layers.1.cross", "weights", wanted):
        found = alignment(model, IDS, OTHER, where="decoder.layers.1.cross")
        both = alignment(model, IDS, OTHER, where="decoder.layers.1.cross", heads=[0, 3])
    torch.testing.assert_close(found, wanted.expand(2, 7, 9))
    torch.testing.assert_close(both, found)
    links = hard_alignment(found[0])
    assert links == {(2, 0), (0, 1), (8, 2), (3, 3), (3, 4), (4, 5), (1, 6)}
    assert hard_alignment(found[0], both_ways=True) == links - {(3, 4)}
    assert alignment(model, IDS, OTHER).shape == (2, 7, 9)
    words = of_words(links, [0, 0, 1, 1, None, 2, 2, 2, 2], [0, 1, 1, 2, 2, 3, None])
    assert words == {(1, 0), (0, 1), (2, 1), (1, 2)}
    with pytest.raises(ph.ConfigError, match="means no cross-attention"):
        alignment(model, IDS, OTHER, where="encoder")


def test_alignment_error_rate() -> None:
    sure, possible = [{(0, 0), (1, 1)}], [{(2, 1)}]
    assert alignment_error_rate(sure, sure) == 0.0
    assert alignment_error_rate([{(5, 5)}], sure) == 1.0
    assert alignment_error_rate([{(0, 0), (2, 1)}], sure, possible) == pytest.approx(0.25)
    assert alignment_error_rate([{(0, 0)}, {(1, 1)}], [{(0, 0)}, {(0, 1)}]) == 0.5


@pytest.mark.parametrize("tokens", [6, 40])
def test_cka_is_the_kernels_alignment(tokens: int) -> None:
    x, y = torch.randn(tokens, 12), torch.randn(tokens, 9)
    centre = torch.eye(tokens) - 1 / tokens
    a, b = (centre @ (z @ z.T) @ centre for z in (x, y))
    expected = float((a * b).sum() / (a.norm() * b.norm()))
    assert cka(x, y) == pytest.approx(expected, abs=1e-5)
    turn = torch.linalg.qr(torch.randn(12, 12)).Q
    assert cka(x, 3 * x @ turn + 5) == pytest.approx(1.0, abs=1e-5)


def test_layers_are_like_themselves_and_padding_counts_for_nothing() -> None:
    model = made("bert")
    keep = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    with ph.capture(model, what="residual") as seen, torch.no_grad():
        model(IDS, keep)
    found = layer_similarity(seen, keep=keep)
    assert found.shape == (3, 3)
    torch.testing.assert_close(found.diagonal(), torch.ones(3))
    torch.testing.assert_close(found, found.T)
    spoilt = {name: torch.where(keep[..., None] > 0, x, 99.0) for name, x in seen.items()}
    torch.testing.assert_close(layer_similarity(spoilt, seen, keep), found)


def test_where_tokens_go() -> None:
    model = made("mixtral")
    keep = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    to_two = torch.tensor([0.0, 5.0, -5.0, 5.1])
    padding = torch.where(keep[..., None] > 0, to_two, to_two.flip(0))
    with ph.replace(model, "layers.1", "routing", padding):
        load = expert_load(model, {"input_ids": IDS, "attention_mask": keep})
    assert len(load.share) == 3
    share = load.share["backbone.layers.1.ffn"]
    torch.testing.assert_close(share, torch.tensor([0.0, 0.5, 0.0, 0.5]))
    assert load.imbalance()["backbone.layers.1.ffn"] == 2.0
    weight = load.weight["backbone.layers.1.ffn"]
    torch.testing.assert_close(weight, to_two.softmax(-1))
    chosen = load.chosen["backbone.layers.1.ffn"].tolist()
    assert chosen == [[[3, 1]] * 9, [[3, 1]] * 5 + [[0, 2]] * 4]
    with pytest.raises(ph.ConfigError, match="no mixture of experts"):
        expert_load(made("llama"), IDS)


def test_nothing_is_dropped_out_of_what_is_measured() -> None:
    model = ph.build("gpt2", vocab_size=31, d_model=16, num_layers=2, num_heads=2, dropout=0.5)
    still = head_scores(model.eval(), IDS).table("entropy")
    assert torch.equal(head_scores(model.train(), IDS).table("entropy"), still)
    assert model.training


def test_a_class_token_s_map_and_a_patch_s() -> None:
    model = made("vit")
    with ph.capture(model) as seen:
        answer(model, IMAGES)
    maps, one = image_maps(model, IMAGES), image_maps(model, IMAGES, (2, 1))
    for name, weights in seen.items():
        torch.testing.assert_close(maps[name].flatten(2), weights[:, :, 0, 1:])
        torch.testing.assert_close(one[name].flatten(2), weights[:, :, 1 + 2 * 4 + 1, 1:])
        assert over_image(maps[name], 16, 16).shape == (2, 4, 16, 16)
    with pytest.raises(ph.ConfigError, match=r"patch \(4, 0\) of a grid of 4 x 4"):
        image_maps(model, IMAGES, (4, 0))
    with pytest.raises(ph.ConfigError, match="llama reads no images"):
        image_maps(made("llama"), IMAGES)


@pytest.mark.parametrize(("size", "window"), [((16, 16), 2), ((16, 16), 3), ((18, 14), 4)])
def test_swin_s_windows_lie_where_they_were_cut(size: tuple[int, int], window: int) -> None:
    options = dict(d_model=8, num_heads=(2, 2), depths=(2, 2), patch_size=2, labels=tuple("ab"))
    model = shaken(ph.build("swin", window=window, image_size=16, **options), 0.2, 0).eval()
    images = torch.randn(2, 3, *size)
    grid, query = (size[0] // 2, size[1] // 2), (2, 3)
    edges = {"stages.0": min(window, *grid), "stages.1": min(window, -(-min(grid) // 2))}
    alone = torch.zeros(grid)
    alone[query] = 1.0
    for stage, edge in edges.items():
        with ph.replace(model, stage, "weights", torch.eye(edge**2)):
            for name, found in image_maps(model, images, query, f"{stage}").items():
                expected = alone[: found.shape[2], : found.shape[3]]
                torch.testing.assert_close(found, expected.expand_as(found), msg=name)
            for found in image_maps(model, images, None, f"{stage}").values():
                count = found.shape[2] * found.shape[3]
                torch.testing.assert_close(found, torch.full_like(found, 1 / count))
    whole = image_maps(model, images, query, "stages.0")
    assert all(found.sum((2, 3)).max() <= 1 + 1e-5 for found in whole.values())


def test_shifted_windows_lie_one_step_further() -> None:
    model = made("swin")
    first = torch.zeros(4, 4)
    first[:, 0] = 1.0  # each looks at the first of its window
    with ph.replace(model, "stages.0", "weights", first):
        straight, shifted = image_maps(model, IMAGES, (2, 3), "stages.0").values()
    for found, place in ((straight, (2, 2)), (shifted, (1, 3))):
        expected = torch.zeros(8, 8)
        expected[place] = 1.0
        torch.testing.assert_close(found, expected.expand_as(found))
