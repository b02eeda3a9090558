"""transformers, by `from_pretrained` and `generate`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmarks.peers.job import Job, timed, varied, writing
from benchmarks.peers.process import command
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
transformers.utils.logging.set_verbosity_error()


def versions() -> dict[str, str]:
    """Of what computes here."""
    return {"transformers": transformers.__version__, "torch": torch.__version__}


def opened(model: str, dtype: str, kind: Any = AutoModelForCausalLM) -> Any:
    """A model of a directory, without the settings for generating that it states."""
    made = kind.from_pretrained(model, dtype=DTYPES[dtype]).eval()
    made.generation_config.eos_token_id = None
    return made


def facts(model: Any) -> dict[str, Any]:
    """Its size, what is tied counted once."""
    return {"bytes": sum(p.numel() * p.element_size() for p in model.parameters())}


class _Watch(transformers.StoppingCriteria):
    """Calls back when every text has its first token: it is asked after each."""

    def __init__(self, all_have_one: Callable[[], None]) -> None:
        self.all_have_one, self.calls = all_have_one, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **others: Any) -> torch.Tensor:
        self.calls += 1
        if self.calls == 1:
            self.all_have_one()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def decode(model: str, dtype: str, prompts: list[list[int]], tokens: int) -> Job:
    """Prompts of one length gone on with greedily, all at once, by `generate`."""
    made = opened(model, dtype)

    def write(prompts: list[list[int]], all_have_one: Callable[[], None]) -> list[list[int]]:
        ids = torch.tensor(prompts)
        found = made.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
            stopping_criteria=[_Watch(all_have_one)], pad_token_id=0,
        )  # fmt: skip
        return found[:, ids.shape[1] :].tolist()

    return writing(write, prompts, facts(made))


def prefill(model: str, dtype: str, prompts: list[list[int]]) -> Job:
    """The first token after each of several prompts; a run reads one."""
    made, turn = opened(model, dtype), 0

    @torch.inference_mode()
    def first(prompt: list[int]) -> list[int]:
        return [int(made(torch.tensor([prompt]), logits_to_keep=1).logits[0, -1].argmax())]

    def run() -> float:
        nonlocal turn
        turn += 1
        (prompt,) = varied([prompts[turn % len(prompts)]], turn)
        return timed(partial(first, prompt))

    return Job(run, lambda: [first(prompt) for prompt in prompts], facts(made))


def load(model: str) -> Job:
    """A GGUF file read into a model that has read a token."""
    path = Path(model)

    @torch.inference_mode()
    def once() -> None:
        made = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
        made(torch.tensor([[1]]))

    return Job(lambda: timed(once))


def cold_start(model: str, prompt: str) -> Job:
    """One token by a directory's model and tokenizer, from the start of the process to its end."""
    program = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer; "
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1]); "
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
        "ids = tokenizer(sys.argv[2], return_tensors='pt'); "
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=1, do_sample=False)[0][-1:]))"
    )
    return command(["-c", program, model, prompt])


def translate(model: str, dtype: str, sources: list[list[int]], beams: int, tokens: int) -> Job:
    """Sources of one batch and length to texts of just so many tokens, by beams."""
    made = opened(model, dtype, AutoModelForSeq2SeqLM)
    ids = torch.tensor(sources)

    def write() -> list[list[int]]:
        found = made.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=beams, do_sample=False,
            max_new_tokens=tokens, min_new_tokens=tokens,
        )  # fmt: skip
        return found[:, 1:].tolist()

    return Job(lambda: timed(write), write, facts(made))


def forward(model: str, dtype: str, ids: list[int]) -> Job:
    """One row of ids to logits; answers those of the last place."""
    made, row = opened(model, dtype), torch.tensor([ids])

    @torch.inference_mode()
    def logits() -> torch.Tensor:
        return made(row, use_cache=False).logits

    return Job(lambda: timed(logits), lambda: logits()[:, -1].float().tolist(), facts(made))


JOBS: dict[str, Callable[..., Job]] = {
    job.__name__: job for job in (decode, prefill, load, cold_start, translate, forward)
}
