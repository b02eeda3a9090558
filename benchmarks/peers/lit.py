"""LitGPT, by its `generate.base.generate`, on what its own script makes of a directory."""

import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from benchmarks.peers.job import Job, writing
from litgpt.config import Config
from litgpt.generate.base import generate_fn
from litgpt.model import GPT
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def versions() -> dict[str, str]:
    """Of what computes here."""
    return {"litgpt": version("litgpt"), "torch": torch.__version__}


def opened(model: str, folder: str, dtype: str) -> GPT:
    """A Hugging Face directory of SmolLM2-135M as LitGPT has it, converted once."""
    name = "SmolLM2-135M-Instruct"
    converted = Path(folder) / "litgpt" / name
    if not (converted / "lit_model.pth").exists():
        converted.mkdir(parents=True, exist_ok=True)
        for file in Path(model).glob("*.safetensors"):
            shutil.copy(file, converted)
        convert_hf_checkpoint(converted, model_name=name)
    made = GPT(Config.from_name(name))
    weights = torch.load(converted / "lit_model.pth", mmap=True, weights_only=True)
    made.load_state_dict(weights, assign=True)
    return made.to(DTYPES[dtype]).eval()


def decode(model: str, folder: str, dtype: str, prompts: list[list[int]], tokens: int) -> Job:
    """One prompt gone on with greedily."""
    made, end = opened(model, folder, dtype), len(prompts[0]) + tokens
    made.max_seq_length = end
    made.set_kv_cache(batch_size=1, dtype=DTYPES[dtype])

    def write(prompts: list[list[int]], all_have_one: Callable[[], None]) -> list[list[int]]:
        found: list[int] = []
        for token in generate_fn(
            made, torch.tensor(prompts[0]), end, temperature=0.0, top_p=0.0,
            include_prompt=False, include_eos=True,
        ):  # fmt: skip
            found.append(int(token))
            if len(found) == 1:
                all_have_one()
        return [found]

    size = sum(p.numel() * p.element_size() for p in made.parameters())
    return writing(write, prompts, {"bytes": size})


JOBS: dict[str, Callable[..., Job]] = {"decode": decode}
