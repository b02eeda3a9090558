"""sentence-transformers, by `encode`."""

from collections.abc import Callable

import sentence_transformers
import torch
from benchmarks.peers.job import Job, timed
from sentence_transformers import SentenceTransformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def versions() -> dict[str, str]:
    """Of what computes here."""
    return {"sentence-transformers": sentence_transformers.__version__}


def embed(model: str, dtype: str, texts: list[str]) -> Job:
    """Sentences to vectors, from strings; its own batches of 32."""
    made = SentenceTransformer(model, device="cpu", model_kwargs={"dtype": DTYPES[dtype]})

    def vectors() -> torch.Tensor:
        return made.encode(texts, convert_to_tensor=True, show_progress_bar=False)

    return Job(lambda: timed(vectors), lambda: vectors()[:200].float().tolist())


JOBS: dict[str, Callable[..., Job]] = {"embed": embed}
