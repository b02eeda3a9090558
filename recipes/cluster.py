"""A run on a cluster: Ray Train starts the workers, and each runs the loop of `polyhead.train`.

Ray makes the process group; batches are dealt out, weights sharded and checkpoints written as under
torchrun, and workers that were lost are started again and go on from the newest checkpoint. --out
has to be a directory that all machines see. Ray is no dependency: `pip install 'ray[train]'`.

    python -m recipes.cluster --workers 2 --parallel fsdp --out runs/cluster
    python -m recipes.cluster --workers 16 --gpus 1 --tensor 2 --out /shared/runs/cluster
"""

import json
import shutil
import sys
import time
from collections import ChainMap
from pathlib import Path
from typing import Any

from recipes.common import arguments, tell
from recipes.sources import corpus, tokenizer

import polyhead as ph
from polyhead.train.log import read_log

SIZES: dict[str, Any] = dict(d_model=128, d_ff=352, num_layers=4, num_heads=4, num_kv_heads=2)
FAILURES = 3  # starts after the first, before the run is given up


def train(told: dict[str, Any]) -> None:
    """What every worker does: the loop, in the process group that Ray has made."""
    from ray.train.torch import get_device

    words = ph.Tokenizer.load(f"{told['data']}/tokenizer")
    model = ph.build("llama", seed=0, vocab_size=words.vocab_size, **SIZES)
    config = ph.TrainConfig(**told["config"], device=str(get_device()))
    texts, held = (f"{told['data']}/{name}.jsonl" for name in ("train", "held"))
    ph.Trainer(model, words, config).fit(texts, held, resume=True)


def main() -> None:
    given = arguments(
        __doc__, "cluster", steps=200, workers=2, gpus=0, parallel="ddp", tensor=1, batch_size=8
    )
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError:
        sys.exit("this recipe needs Ray: pip install 'ray[train]'")
    began = time.perf_counter()
    out = Path(given.out).absolute()
    if (out / "log.jsonl").exists() and not given.force:
        sys.exit(f"{out} already holds a run: choose another --out, or use --force")
    shutil.rmtree(out, ignore_errors=True)
    config = dict(
        steps=given.steps, batch_size=given.batch_size, context=128, warmup=20, lr=2e-3,
        accumulate=given.workers // given.tensor, parallel=given.parallel, tensor=given.tensor,
        checkpoint_every=50, validate_every=50, out=str(out),
    )  # fmt: skip
    trainer = TorchTrainer(
        train,
        train_loop_config={"data": _data(out.with_name(f"{out.name}-data")), "config": config},
        # What stands on the CPU travels by gloo, also where weights are on GPUs.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if given.gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=given.workers, use_gpu=bool(given.gpus)),
        run_config=RunConfig(
            name=out.name, storage_path=str(out.parent / "ray"),
            failure_config=FailureConfig(max_failures=FAILURES),
        ),
    )  # fmt: skip
    trainer.fit()
    figures = dict(ChainMap(*reversed(read_log(out / "log.jsonl"))))
    kept = ("step", "loss", "valid_loss", "valid_bits_per_byte", "tokens_per_second")
    tell("cluster", began, workers=given.workers, **{name: figures[name] for name in kept})


def _data(folder: Path) -> str:
    """Texts and a tokenizer where every worker finds them."""
    texts, held = corpus()
    folder.mkdir(parents=True, exist_ok=True)
    for name, some in (("train", texts), ("held", held)):
        lines = (json.dumps({"text": text}) + "\n" for text in some)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    tokenizer(texts, 4000).save(folder / "tokenizer", force=True)
    return str(folder)


if __name__ == "__main__":
    main()
