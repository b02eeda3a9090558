"""Run by a Python that has llama_cpp: logits and token ids of GGUF files, as JSON."""

import json
import sys

import llama_cpp

said = []
for job in json.load(sys.stdin):
    model = llama_cpp.Llama(
        job["path"],
        n_ctx=max(32, len(job["ids"])),
        n_threads=1,
        logits_all=True,
        verbose=False,
        flash_attn=False,
        type_k=0,  # float32, as ours
        type_v=0,
    )
    model.eval(job["ids"])
    said.append(
        {
            "logits": model.scores[: len(job["ids"])].tolist(),
            "tokens": [
                model.tokenize(text.encode(), add_bos=False, special=True) for text in job["texts"]
            ],
        }
    )
json.dump(said, sys.stdout)
