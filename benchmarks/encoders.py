"""Encoders beside the big libraries: sentences, DeBERTa, Swin and ViT.

Every contender has the same weights and inputs, runs on the same threads and is warm. Peers stand
at their default and at their best type; the ratio that counts is against the better one. Ours stand
as loaded and packed (`polyhead.kernels.pack`), the latter for inference alone. Peak memory is
measured by a process of its own for each contender (--memory).
"""

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.abba import Call, memory_of, product_gflops, ratio, slices, with_itself

import polyhead as ph
from polyhead.kernels import pack

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Work:
    """Contenders for one piece of work, how much of it a call does, and how far apart they are.

    goals: of ours (the fastest) against a contender. distance: largest one from the peer's fp32.
    """

    calls: dict[str, Call]
    amount: float
    unit: str
    goals: dict[str, float]
    distance: dict[str, float]


def ragged(count: int, log_words: float = 2.2) -> list[str]:
    """Texts of log-normal lengths; log_words: the mean of the logarithm of their words."""
    from pydoc_data.topics import topics

    words, draw = " ".join(topics.values()).split(), random.Random(0)
    texts: list[str] = []
    for _ in range(count):
        length = max(1, round(math.exp(draw.gauss(log_words, 0.75))))
        start = draw.randrange(len(words) - length)
        texts.append(" ".join(words[start : start + length]))
    return texts


def sentences() -> Work:
    """1000 ragged sentences through all-MiniLM-L6-v2."""
    from sentence_transformers import SentenceTransformer

    from polyhead.files.hub import resolve

    texts = ragged(1000)
    folder = str(resolve("minilm-l6"))
    tokenizer = ph.tokenizer(folder)
    peers = {
        f"sentence-transformers {name}": SentenceTransformer(
            folder, device="cpu", model_kwargs={"dtype": dtype}
        )
        for name, dtype in DTYPES.items()
    }
    ours = {f"polyhead {name}": ph.load(folder, dtype=dtype) for name, dtype in DTYPES.items()}
    ours |= {f"{name} packed": pack(model) for name, model in ours.items()}
    calls: dict[str, Call] = {
        name: lambda peer=peer: peer.encode(texts) for name, peer in peers.items()
    }
    calls |= {
        name: lambda model=model: ph.embed(model, tokenizer, texts) for name, model in ours.items()
    }
    exact = peers["sentence-transformers fp32"].encode(texts, convert_to_tensor=True)
    distance = {
        name: 1 - torch.cosine_similarity(ph.embed(model, tokenizer, texts), exact).min().item()
        for name, model in ours.items()
    }
    tokens = sum(map(len, tokenizer.encode_batch(texts)))
    print(f"{tokens / len(texts):.1f} tokens a sentence", file=sys.stderr)
    goals = {"sentence-transformers fp32": 2.5, "sentence-transformers bf16": 1.5}
    return Work(calls, len(texts), "sentences/s", goals, distance)


def from_transformers(
    peer_class: str,
    options: dict[str, Any],
    inputs: dict[str, torch.Tensor],
    amount: float,
    unit: str,
    goal: float,
    backward: bool = False,
) -> Work:
    """A random model of transformers, ours loaded from what it saves.

    backward: training mode, with the gradients; ours unpacked.
    """
    import transformers

    kind = getattr(transformers, peer_class)
    torch.manual_seed(0)
    made = kind(kind.config_class(**options)).eval()
    calls: dict[str, Call] = {}
    found: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        for name, dtype in DTYPES.items():
            peer = kind.from_pretrained(folder, dtype=dtype).eval()
            ours = ph.load(folder, dtype=dtype)
            cast = {
                key: value.to(dtype) if value.is_floating_point() else value
                for key, value in inputs.items()
            }
            models = {f"transformers {name}": peer, f"polyhead {name}": ours}
            if not backward:
                models[f"polyhead {name} packed"] = pack(ours)
            for who, model in models.items():
                with torch.no_grad():
                    found[who] = _first(model(**cast)).float()
                calls[who] = _runner(model.train(backward), cast, backward)
    exact = found["transformers fp32"]
    distance = {who: (answer - exact).abs().max().item() for who, answer in found.items()}
    goals = {f"transformers {name}": goal for name in DTYPES}
    return Work(calls, amount, unit, goals, distance)


def _runner(model: Any, inputs: dict[str, torch.Tensor], train: bool) -> Call:
    def forward() -> None:
        with torch.inference_mode():
            model(**inputs)

    def both() -> None:
        _first(model(**inputs)).float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    return both if train else forward


def _first(answer: Any) -> torch.Tensor:
    """Peers answer with a record whose first field ours give alone."""
    return answer if isinstance(answer, torch.Tensor) else answer[0]


def deberta(backward: bool = False, dropout: float = 0.0) -> Work:
    """DeBERTa-v3-base's shapes, 4 texts of 512 tokens."""
    options = dict(
        vocab_size=8000, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
        intermediate_size=3072, relative_attention=True, position_buckets=256,
        norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"],
        type_vocab_size=0, position_biased_input=False, max_relative_positions=-1,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    inputs = {"input_ids": torch.randint(5, 8000, (4, 512))}
    return from_transformers("DebertaV2Model", options, inputs, 2048, "tokens/s", 1.5, backward)


def swin() -> Work:
    """Swin-T, 4 images."""
    pixels = {"pixel_values": torch.randn(4, 3, 224, 224)}
    return from_transformers("SwinForImageClassification", {}, pixels, 4, "images/s", 1.25)


def vit() -> Work:
    """ViT-S/16, 4 images."""
    options = dict(hidden_size=384, intermediate_size=1536, num_attention_heads=6)
    pixels = {"pixel_values": torch.randn(4, 3, 224, 224)}
    return from_transformers("ViTForImageClassification", options, pixels, 4, "images/s", 1.1)


WORKS: dict[str, Callable[[], Work]] = {
    "sentences": sentences,
    "deberta": deberta,
    "deberta-training": lambda: deberta(backward=True, dropout=0.1),
    "deberta-gradient": lambda: deberta(backward=True),
    "swin": swin,
    "vit": vit,
}


def measure(name: str, rounds: int, seconds: float) -> dict[str, Any]:
    work = WORKS[name]()
    times = slices(work.calls, rounds, seconds)
    speed = {key: work.amount / sorted(some)[len(some) // 2] for key, some in times.items()}
    best = max((key for key in speed if key.startswith("polyhead")), key=speed.__getitem__)
    peers = [key for key in speed if not key.startswith("polyhead")]
    return {
        "work": name,
        "unit": work.unit,
        "speed": speed,
        "ours": best,
        "against": {
            peer: {"ratio": str(ratio(times[peer], times[best])), "goal": work.goals[peer]}
            for peer in peers
        },
        "noise": str(with_itself(times[best])),
        "distance": work.distance,
        "product_gflops": {key: product_gflops(dtype) for key, dtype in DTYPES.items()},
    }


def memory(name: str) -> dict[str, float]:
    """MiB that a call of each contender takes beside the weights, each in its own process."""
    found = {}
    for key in WORKS[name]().calls:
        command = [sys.executable, "-m", "benchmarks.encoders", name, "--alone", key]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[key] = float(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.encoders",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("works", nargs="*", default=list(WORKS), help=f"of {', '.join(WORKS)}")
    parser.add_argument("--rounds", type=int, default=10, help="slices of each (default 10)")
    parser.add_argument("--seconds", type=float, default=2.0, help="least length of a slice")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own)")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="also append JSON lines here")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    for name in given.works:
        if given.alone:
            print(memory_of(WORKS[name]().calls[given.alone]))
            continue
        found = memory(name) if given.memory else measure(name, given.rounds, given.seconds)
        print(json.dumps(found, indent=2))
        if given.out:
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
