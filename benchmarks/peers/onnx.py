"""onnxruntime on a graph that torch exports, with weights and products in eight bits.

What stands around a session, sentence-transformers' users write themselves: sentences sorted by
length in batches of 32, the mean over the tokens, and length 1.
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from benchmarks.peers.job import Job, timed

_BATCH = 32


def versions() -> dict[str, str]:
    """Of what computes here."""
    return {"onnxruntime": onnxruntime.__version__}


def graph(model: str, form: str, folder: str) -> Path:
    """An encoder's hidden states as a graph, made once; form: "fp32", or "int8": dynamic."""
    plain = Path(folder) / f"{Path(model).name}-fp32.onnx"
    if not plain.exists():
        _export(model, plain)
    if form == "fp32":
        return plain
    small = plain.with_name(f"{Path(model).name}-int8.onnx")
    if not small.exists():
        from onnxruntime.quantization import QuantType, quantize_dynamic

        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh = Path(scratch) / small.name
            quantize_dynamic(plain, fresh, weight_type=QuantType.QInt8, per_channel=True)
            fresh.replace(small)
    return small


def _export(model: str, path: Path) -> None:
    import torch
    from transformers import AutoModel

    made = AutoModel.from_pretrained(model, attn_implementation="eager").eval()

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = made

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids, attention_mask=attention_mask)[0]

    # Two tensors that differ: the exporter takes the same one given twice for one input.
    ids, mask = torch.arange(100, 116).view(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    sizes = {0: torch.export.Dim("rows", max=4096), 1: torch.export.Dim("tokens", max=512)}
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        fresh = Path(scratch) / path.name
        torch.onnx.export(
            Hidden(), (ids, mask), str(fresh), dynamo=True, external_data=False,
            input_names=["input_ids", "attention_mask"], output_names=["hidden"],
            dynamic_shapes=(sizes, sizes),
        )  # fmt: skip
        fresh.replace(path)


def embed(model: str, form: str, folder: str, texts: list[str]) -> Job:
    """Sentences to vectors, from strings."""
    from tokenizers import Tokenizer

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    session = onnxruntime.InferenceSession(
        graph(model, form, folder), settings, providers=["CPUExecutionProvider"]
    )
    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    tokenizer.no_padding()
    said = json.loads((Path(model) / "sentence_bert_config.json").read_text(encoding="utf-8"))
    tokenizer.enable_truncation(said["max_seq_length"])

    def vectors() -> np.ndarray:
        rows = [row.ids for row in tokenizer.encode_batch_fast(texts)]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        found = np.empty((len(rows), 0), dtype=np.float32)
        for start in range(0, len(order), _BATCH):
            some = order[start : start + _BATCH]
            width = max(len(rows[i]) for i in some)
            mask = np.array([[int(t < len(rows[i])) for t in range(width)] for i in some])
            ids = np.array([rows[i] + [0] * (width - len(rows[i])) for i in some])
            (hidden,) = session.run(None, {"input_ids": ids, "attention_mask": mask})
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
            if not found.size:
                found = np.empty((len(rows), pooled.shape[1]), dtype=np.float32)
            found[some] = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
        return found

    return Job(lambda: timed(vectors), lambda: vectors()[:200].tolist())


JOBS: dict[str, Callable[..., Job]] = {"embed": embed}
