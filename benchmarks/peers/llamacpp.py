"""llama.cpp by its C API, as llama-cpp-python's wheel carries it: no torch in this process."""

import ctypes
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp as api
import numpy as np
from benchmarks.peers.job import Job, timed, varied, writing
from benchmarks.peers.process import command

_FILE_TYPES = {
    kind: getattr(api, f"LLAMA_FTYPE_MOSTLY_{kind}") for kind in ("Q4_0", "Q4_1", "Q8_0")
}
_THREADS = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
_QUIET = api.llama_log_callback(lambda level, text, data: None)
api.llama_log_set(_QUIET, ctypes.c_void_p())
api.llama_backend_init()


def versions() -> dict[str, str]:
    """Of what computes here."""
    return {"llama-cpp-python": api.__version__}


def file_of(model: str, kind: str, folder: str) -> str:
    """The GGUF file in another type, made once by llama.cpp itself; "as it is" is the file."""
    if kind == "as it is":
        return model
    made = Path(folder) / f"{Path(model).stem}-{kind}.gguf"
    if not made.exists():
        settings = api.llama_model_quantize_default_params()
        settings.ftype, settings.allow_requantize = _FILE_TYPES[kind], True
        fresh = made.with_suffix(f".{os.getpid()}")
        if api.llama_model_quantize(model.encode(), str(fresh).encode(), ctypes.byref(settings)):
            raise RuntimeError(f"{model} could not be made {kind}")
        fresh.replace(made)
    return str(made)


class Model:
    """A model and a context of `rows` texts of `tokens` each."""

    def __init__(self, path: str, rows: int, tokens: int) -> None:
        self.model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        if self.model is None:
            raise RuntimeError(f"{path} could not be read")
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = rows * (-(-tokens // 256) * 256), rows
        settings.n_outputs_max_per_seq = 0  # as many as are asked for
        settings.n_threads = settings.n_threads_batch = _THREADS
        self.context = api.llama_init_from_model(self.model, settings)
        self.batch = api.llama_batch_init(max(rows * tokens, 1), 0, rows)
        self.vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))

    def clear(self) -> None:
        """Forget all texts."""
        api.llama_memory_clear(api.llama_get_memory(self.context), True)

    def read(self, rows: Sequence[Sequence[int]], begin: int, every: bool = False) -> None:
        """The next tokens of each text, from the place `begin`; logits of the last, or of all."""
        batch, n = self.batch, 0
        for row, ids in enumerate(rows):
            for place, token in enumerate(ids):
                batch.token[n], batch.pos[n] = token, begin + place
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, row
                batch.logits[n] = every or place == len(ids) - 1
                n += 1
        batch.n_tokens = n
        if api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode failed on {n} tokens")

    def logits(self, index: int) -> np.ndarray:
        """Of a token of the last batch that asked for them; -1 is the last."""
        found = api.llama_get_logits_ith(self.context, index)
        return np.ctypeslib.as_array(found, (self.vocab_size,))

    def facts(self) -> dict[str, Any]:
        """Its size."""
        return {"bytes": api.llama_model_size(self.model)}

    def close(self) -> None:
        """Give its memory back."""
        api.llama_batch_free(self.batch)
        api.llama_free(self.context)
        api.llama_model_free(self.model)


def decode(model: str, kind: str, folder: str, prompts: list[list[int]], tokens: int) -> Job:
    """Prompts of one length gone on with greedily, all at once: llama_decode and argmax."""
    length = len(prompts[0])
    made = Model(file_of(model, kind, folder), len(prompts), length + tokens)

    def write(prompts: list[list[int]], all_have_one: Callable[[], None]) -> list[list[int]]:
        made.clear()
        made.read(prompts, 0)
        ends = [length * (row + 1) - 1 for row in range(len(prompts))]
        written: list[list[int]] = [[int(made.logits(end).argmax())] for end in ends]
        all_have_one()
        for step in range(tokens - 1):
            made.read([row[-1:] for row in written], length + step)
            for number, row in enumerate(written):
                row.append(int(made.logits(number).argmax()))
        return written

    return writing(write, prompts, made.facts())


def prefill(model: str, kind: str, folder: str, prompts: list[list[int]]) -> Job:
    """The first token after each of several prompts; a run reads one."""
    made, turn = Model(file_of(model, kind, folder), 1, len(prompts[0])), 0

    def first(prompt: list[int]) -> list[int]:
        made.clear()
        made.read([prompt], 0)
        return [int(made.logits(-1).argmax())]

    def run() -> float:
        nonlocal turn
        turn += 1
        (prompt,) = varied([prompts[turn % len(prompts)]], turn)
        return timed(partial(first, prompt))

    return Job(run, lambda: [first(prompt) for prompt in prompts], made.facts())


def load(model: str, kind: str, folder: str) -> Job:
    """A file read into a model that answers: one token, or the file is but mapped."""
    path = file_of(model, kind, folder)

    def once() -> None:
        made = Model(path, 1, 1)
        made.read([[1]], 0)
        made.close()

    return Job(lambda: timed(once))


def cold_start(model: str, prompt: str) -> Job:
    """One token by llama-cpp-python, from the start of the process to its end."""
    program = (
        "import sys; from llama_cpp import Llama; "
        f"made = Llama(sys.argv[1], n_threads={_THREADS}, verbose=False); "
        "print(made(sys.argv[2], max_tokens=1, temperature=0)['choices'][0]['text'])"
    )
    return command(["-c", program, model, prompt])


def perplexity(model: str, kind: str, folder: str, windows: list[list[int]]) -> Job:
    """Nats a token over windows of ids, all but the first of each."""
    made = Model(file_of(model, kind, folder), 1, max(map(len, windows)))

    def answer() -> float:
        total = 0.0
        for ids in windows:
            made.clear()
            made.read([ids[:-1]], 0, every=True)
            for place, token in enumerate(ids[1:]):
                logits = made.logits(place).astype(np.float64)
                most = logits.max()
                total += most + np.log(np.exp(logits - most).sum()) - logits[token]
        return total / sum(len(ids) - 1 for ids in windows)

    return Job(lambda: timed(answer), answer, made.facts())


JOBS: dict[str, Callable[..., Job]] = {
    job.__name__: job for job in (decode, prefill, load, cold_start, perplexity)
}
