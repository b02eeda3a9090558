"""Handwritten digits of 8 x 8 pixels with a small ViT and a small Swin.

scikit-learn's 1,797 images; a quarter is held out, drawn by class. Accuracy on it.
"""

import time

import numpy as np
import torch
from recipes.common import arguments, best_of, tell
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import polyhead as ph
from polyhead.images import Processor
from polyhead.train.config import TrainConfig

LABELS = tuple("0123456789")
MODELS = {
    "vit": dict(image_size=8, patch_size=2, num_channels=1, d_model=64, d_ff=128, num_layers=4,
                num_heads=4),
    "swin": dict(image_size=8, patch_size=1, num_channels=1, d_model=32, depths=(2, 2),
                 num_heads=(2, 4), window=4),
}  # fmt: skip


def main() -> None:
    given = arguments(__doc__, "digits", epochs=40.0)
    began = time.perf_counter()
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    split = train_test_split(
        pixels, digits.target, test_size=0.25, random_state=0, stratify=digits.target
    )
    train_x, test_x, train_y, test_y = split
    accuracy = {}
    for family, sizes in MODELS.items():
        model = ph.build(family, head="classify", seed=0, labels=LABELS, **sizes)
        processor = Processor(size=None, mean=(0.5,), std=(0.5,))
        config = TrainConfig(
            epochs=given.epochs, batch_size=64, lr=1e-3, warmup=50, weight_decay=0.05,
            validate_every=100, checkpoint_every=100, validate_batches=0,
            out=f"{given.out}/{family}",
        )  # fmt: skip
        trainer = ph.Trainer(model, processor, config, objective="image-classify")
        rows = [
            {"image": image, "label": str(label)}
            for image, label in zip(train_x, train_y, strict=True)
        ]
        fitted = trainer.fit(rows, force=given.force)
        best = ph.load(best_of(fitted))
        with torch.inference_mode():
            found = best(processor(list(test_x))).argmax(-1).numpy()
        accuracy[family] = float((found == test_y).mean())
    tell("digits", began, **accuracy, images=len(train_x), held_out=len(test_x))


if __name__ == "__main__":
    main()
