"""What a CUDA device alone can show: `pytest -m gpu`."""

from pathlib import Path

import pytest
import torch

import polyhead as ph
from polyhead.generate import graphs
from polyhead.generate.graphs import GraphSteps
from polyhead.generate.seq2seq import Seq2Seq
from polyhead.nn.moe import MixtureOfExperts

pytestmark = pytest.mark.gpu

SIZES = dict(vocab_size=97, d_model=64, d_ff=128, num_layers=2, num_heads=4, max_seq_len=128)
TEXTS = ["the quick brown fox jumps over the lazy dog\n" * 40]


def test_grouped_products_equal_the_loop_over_experts() -> None:
    moe = MixtureOfExperts(64, 128, num_experts=8, top_k=2).cuda().bfloat16()
    x = torch.randn(4, 33, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grouped = moe(x)
    grouped.sum().backward()
    plain = moe.cpu().float()(x.detach().cpu().float())
    assert (grouped.cpu().float() - plain).abs().max() <= 3e-2 * plain.abs().max()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_greedy_tokens_equal_the_cpu(family: str) -> None:
    tokenizer = ph.Tokenizer.train(TEXTS, kind="bytes")
    model = ph.build(family, seed=0, **{**SIZES, "vocab_size": tokenizer.vocab_size}).eval()
    settings = ph.GenerationConfig(max_new_tokens=24, temperature=0, ignore_eos=True)
    prompts = ["the quick", "lazy dog jumps over", "a"]
    on_cpu = ph.TextGenerator(model, tokenizer).generate(prompts, settings)
    on_gpu = ph.TextGenerator(model.cuda(), tokenizer).generate(prompts, settings)
    static = ph.TextGenerator(model, tokenizer, static=True).generate(prompts, settings)
    ids = [[list(answer.token_ids) for answer in run] for run in (on_cpu, on_gpu, static)]
    assert ids[0] == ids[1] == ids[2]


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "t5"])
def test_captured_steps_answer_what_the_model_does(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.bfloat16 if family == "mixtral" else torch.float32  # experts in one product
    model = ph.build(family, seed=0, **SIZES).cuda().to(dtype).eval()
    settings = ph.GenerationConfig(
        max_new_tokens=24, temperature=0.0, ignore_eos=True, decoder_start_token_id=1
    )
    prompts = [[5, 6, 7], [8] * 11, [9]]

    def written() -> list[list[int]]:
        if family == "t5":
            answers = Seq2Seq(model).generate(prompts, settings)
            return [list(answer[0].ids) for answer in answers]
        engine = ph.Engine(model, None, ph.EngineConfig(max_rows=4, cache_tokens=400))
        requests = [engine.add(prompt, settings, ends=()) for prompt in prompts]
        engine.run()
        steps = engine.runner._recorded
        assert isinstance(steps, GraphSteps)
        assert not steps.reason
        assert bool(steps._steps) == (graphs.TRIES == 2)
        return [list(request.outcome()[0].token_ids) for request in requests]

    captured = written()
    monkeypatch.setattr(graphs, "TRIES", 10**9)
    plain = written()
    if dtype == torch.float32:
        assert captured == plain
    else:  # a last bit may choose another token, and all that follow it
        assert [one[:4] for one in captured] == [one[:4] for one in plain]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trains(dtype: str, tmp_path: Path) -> None:
    tokenizer = ph.Tokenizer.train(TEXTS, kind="chars")
    model = ph.build("llama", seed=0, **{**SIZES, "vocab_size": tokenizer.vocab_size})
    settings = ph.TrainConfig(
        steps=30, batch_size=8, context=32, dtype=dtype, device="cuda", out=str(tmp_path / "run")
    )
    figures = ph.Trainer(model, tokenizer, settings, quiet=True).fit(TEXTS)
    assert figures["loss"] < 2.5
