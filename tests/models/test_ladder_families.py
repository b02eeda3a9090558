"""What every rung of the ladder owes: padding, caches and generation change no answer."""

import pytest
import torch

from polyhead.generate.config import GenerationConfig
from polyhead.generate.generator import TextGenerator
from polyhead.models.assemble import build
from polyhead.text.tokenizer import Tokenizer
from polyhead.train.config import TrainConfig
from polyhead.train.loop import Trainer

TEXT = "the quick brown fox jumps over the lazy dog. " * 40
MODELS = {
    "window_mlp": {"d_model": 16, "embedding_width": 8, "window": 4},
    "window_mlp direct": {"d_model": 16, "embedding_width": 8, "window": 4, "direct": True},
    "lstm": {"d_model": 16, "num_layers": 2},
}
each = pytest.mark.parametrize("name", MODELS)


def make(name, vocab_size=30):
    family = name.split()[0]
    sizes = {"init_std": 0.3, "max_seq_len": 64, **MODELS[name]}
    return build(family, seed=0, vocab_size=vocab_size, **sizes).eval()


@each
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_answer(name, side):
    model = make(name)
    rows = [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10], [11]]
    ids, keep = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.bool)
    for r, row in enumerate(rows):
        where = slice(7 - len(row), 7) if side == "left" else slice(0, len(row))
        ids[r, where], keep[r, where] = torch.tensor(row), True
    answers = model(ids, attention_mask=keep)
    for r, row in enumerate(rows):
        torch.testing.assert_close(answers[r][keep[r]], model(torch.tensor([row]))[0])


@each
@pytest.mark.parametrize("max_len", [None, 16])
def test_pieces_give_what_the_whole_gives(name, max_len):
    model = make(name)
    rows = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 15]]
    lengths = torch.tensor([5, 2])
    caches = model.backbone.make_caches(2, max_len)
    ids = torch.tensor([row[:5] + [0] * (5 - len(row[:5])) for row in rows])
    got = [model(ids, attention_mask=torch.arange(5) < lengths[:, None], caches=caches)]
    for step in range(4):
        new = torch.tensor([[row[n + step]] for row, n in zip(rows, (5, 2), strict=True)])
        got.append(model(new, caches=caches))
    assert caches.lengths.tolist() == [9, 6]
    for r, row in enumerate(rows):
        said = torch.cat([got[0][r, : lengths[r]], *(one[r] for one in got[1:])])
        torch.testing.assert_close(said, model(torch.tensor([row]))[0, : len(said)])


@each
def test_generates_alone_what_it_generates_in_a_batch(name):
    words = Tokenizer.train([TEXT], kind="chars")
    writer = TextGenerator(make(name, words.vocab_size), words)
    config = GenerationConfig(max_new_tokens=12, temperature=0, ignore_eos=True)
    prompts = ["the quick", "fox", "over the lazy dog"]
    together = writer.generate(prompts, config)
    assert [str(writer.generate(p, config)) for p in prompts] == [str(t) for t in together]
    assert len(together[0].token_ids) == 12
    static = TextGenerator(writer.model, words, static=True).generate(prompts, config)
    assert [str(t) for t in static] == [str(t) for t in together]
    config = GenerationConfig(max_new_tokens=6, temperature=0)
    engine = writer.own_engine()
    for prompt in ("the qui", "the quick", "the q"):
        streamed = "".join(writer.stream(prompt, config, engine=engine))
        assert streamed == str(writer.generate(prompt, config))


@each
def test_trains_and_goes_on_where_it_stopped(name, tmp_path):
    words = Tokenizer.train([TEXT], kind="chars")

    def fit(out, steps, resume=False):
        config = TrainConfig(
            steps=steps, batch_size=4, context=16, lr=1e-2, schedule="constant", warmup=0,
            device="cpu", out=str(tmp_path / out), checkpoint_every=5,
        )  # fmt: skip
        model = make(name, words.vocab_size)
        trainer = Trainer(model, words, config, quiet=True)
        return trainer.fit([TEXT], resume=resume), model.state_dict()

    whole, weights = fit("whole", 20)
    first, _ = fit("parts", 10)
    again, resumed = fit("parts", 20, resume=True)
    assert whole["valid_loss"] == again["valid_loss"] < first["valid_loss"]
    assert all(torch.equal(weights[key], resumed[key]) for key in weights)
