"""Ours, by what is public: the one place that says how a model is made fast here."""

import platform
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.peers.job import Job, timed, varied, writing
from benchmarks.peers.process import command
from benchmarks.peers.rows import FEW_BITS

import polyhead as ph
from polyhead.generate.seq2seq import Seq2Seq

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def versions() -> dict[str, str]:
    """Of what computes here."""
    return {
        "polyhead": ph.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def opened(model: str, form: str) -> Any:
    """A model packed for this machine.

    form: fp32, bf16, or "plain": as loaded; int8, int4: `model` is in so few bits already, and
    never is anything else in memory.
    """
    if form in FEW_BITS:
        return ph.pack(ph.load(model, packed=model.endswith(".gguf")))
    made = ph.load(model, dtype=DTYPES.get(form, torch.float32))
    return made if form == "plain" else ph.pack(made)


def weight_bytes(model: torch.nn.Module) -> int:
    """What its weights take, those of another layout too, each counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    seen = {id(x) if x.is_mkldnn else x.data_ptr(): x for x in tensors}
    return sum(x.numel() * x.element_size() for x in seen.values())


def engine_for(model: Any, rows: int, tokens: int, kv: str = "model") -> ph.Engine:
    """An engine for so many texts of so many tokens each, and no room to remember others."""
    config = ph.EngineConfig(
        max_rows=rows, cache_tokens=rows * (tokens + 16), max_len=tokens, kv=kv
    )
    return ph.Engine(model, None, config)


def decode(model: str, form: str, prompts: list[list[int]], tokens: int) -> Job:
    """Prompts gone on with greedily, all at once. Where weights are in few bits, keys and values
    are in fp16, as llama.cpp has them."""
    made = opened(model, form)
    kv = "model" if form in {*DTYPES, "plain"} else "fp16"
    engine = engine_for(made, len(prompts), len(prompts[0]) + tokens, kv)
    config = ph.GenerationConfig(temperature=0.0, max_new_tokens=tokens, ignore_eos=True)

    def write(prompts: list[list[int]], all_have_one: Callable[[], None]) -> list[list[int]]:
        requests = [engine.add(prompt, config) for prompt in prompts]
        while not all(request.texts and request.texts[0].written for request in requests):
            engine.step()
        all_have_one()
        engine.run()
        return [list(request.results[0].token_ids) for request in requests]

    return writing(write, prompts, {"bytes": weight_bytes(made)})


def prefill(model: str, form: str, prompts: list[list[int]]) -> Job:
    """The first token after each of several prompts; a run reads one."""
    made = opened(model, form)
    engine = engine_for(made, 1, len(prompts[0]) + 1)
    config = ph.GenerationConfig(temperature=0.0, max_new_tokens=1, ignore_eos=True)
    turn = 0

    def first(prompt: list[int]) -> list[int]:
        request = engine.add(prompt, config)
        engine.run()
        return list(request.results[0].token_ids)

    def run() -> float:
        nonlocal turn
        turn += 1
        (prompt,) = varied([prompts[turn % len(prompts)]], turn)
        return timed(lambda: first(prompt))

    return Job(run, lambda: [first(prompt) for prompt in prompts], {"bytes": weight_bytes(made)})


def load(model: str) -> Job:
    """A file read into a model that has read a token."""

    @torch.inference_mode()
    def once() -> None:
        ph.load(model)(torch.tensor([[1]]))

    return Job(lambda: timed(once))


def cold_start(model: str, prompt: str) -> Job:
    """`polyhead generate` for one token, from the start of the process to its end."""
    return command(
        ["-m", "polyhead.cli.main", "generate", model, prompt, "--raw", "--max-new-tokens", "1",
         "--temperature", "0"]
    )  # fmt: skip


def judge(model: str, prompts: list[list[int]], written: dict[str, list[list[int]]]) -> Job:
    """What each contender wrote, beside what the model in fp32 holds likeliest.

    Answers by name: `same`, the first tokens that are fp32's own greedy ones, the mean over the
    texts, and `regret`, how much likelier (nats a token) fp32 holds its own choice at each place.
    """
    plain = ph.load(model, dtype=torch.float32)

    def one(prompt: list[int], ids: list[int]) -> tuple[int, float]:
        with torch.inference_mode():
            logits = plain(torch.tensor([prompt + ids[:-1]]))[0, len(prompt) - 1 :]
        chances = logits.log_softmax(-1)
        best, chosen = chances.max(-1), chances.gather(1, torch.tensor(ids)[:, None])[:, 0]
        is_same = best.indices == torch.tensor(ids)
        return int(is_same.cumprod(0).sum()), (best.values - chosen).mean().item()

    def answer() -> dict[str, dict[str, float]]:
        found = {}
        for name, texts in written.items():
            pairs = [one(*pair) for pair in zip(prompts, texts, strict=True)]
            found[name] = {
                "same": sum(same for same, _ in pairs) / len(pairs),
                "regret": sum(regret for _, regret in pairs) / len(pairs),
                "of": len(texts[0]),
            }
        return found

    return Job(lambda: timed(answer), answer)


def perplexity(model: str, form: str, windows: list[list[int]]) -> Job:
    """Nats a token over windows of ids, all but the first of each."""
    made = opened(model, form)

    def answer() -> float:
        total = 0.0
        with torch.inference_mode():
            for ids in windows:
                window = torch.tensor([ids])
                logits = made(window[:, :-1]).float()[0]
                total += torch.nn.functional.cross_entropy(
                    logits, window[0, 1:], reduction="sum"
                ).item()
        return total / sum(len(ids) - 1 for ids in windows)

    return Job(lambda: timed(answer), answer, {"bytes": weight_bytes(made)})


def translate(model: str, form: str, sources: list[list[int]], beams: int, tokens: int) -> Job:
    """Sources of one batch to texts of just so many tokens, by beams."""
    writer = Seq2Seq(opened(model, form))
    config = ph.GenerationConfig(
        num_beams=beams, max_new_tokens=tokens, ignore_eos=True, temperature=0.0
    )

    def write() -> list[list[int]]:
        return [list(best.ids) for best, *_ in writer.generate(sources, config)]

    return Job(lambda: timed(write), write)


def judge_translations(
    model: str, sources: list[list[int]], written: dict[str, list[list[int]]]
) -> Job:
    """How likely fp32 holds each contender's texts: nats a token, the mean over the texts."""
    plain = ph.load(model, dtype=torch.float32)
    start = Seq2Seq(plain).start

    def likelihood(source: list[int], ids: list[int]) -> float:
        with torch.inference_mode():
            logits = plain(torch.tensor([source]), torch.tensor([[start, *ids[:-1]]]))[0]
        return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).mean().item()

    def answer() -> dict[str, float]:
        return {
            name: sum(map(likelihood, sources, texts)) / len(sources)
            for name, texts in written.items()
        }

    return Job(lambda: timed(answer), answer)


def embed(model: str, form: str, texts: list[str]) -> Job:
    """Sentences to vectors, from strings."""
    made, tokenizer = opened(model, form), ph.tokenizer(model)

    def vectors() -> torch.Tensor:
        found = ph.embed(made, tokenizer, texts)
        assert isinstance(found, torch.Tensor)
        return found

    return Job(
        lambda: timed(vectors), lambda: vectors()[:200].tolist(), {"bytes": weight_bytes(made)}
    )


def forward(model: str, form: str, ids: list[int]) -> Job:
    """One row of ids to logits; answers those of the last place."""
    made, row = opened(model, form), torch.tensor([ids])

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            return made(row)

    return Job(
        lambda: timed(logits), lambda: logits()[:, -1].float().tolist(),
        {"bytes": weight_bytes(made)},
    )  # fmt: skip


JOBS: dict[str, Callable[..., Job]] = {
    job.__name__: job
    for job in (
        decode, prefill, load, cold_start, judge, perplexity, translate, judge_translations,
        embed, forward,
    )
}  # fmt: skip
