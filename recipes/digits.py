"""Handwritten digits of 8 x 8 pixels with a small ViT and a small Swin.

scikit-learn's 1,797 images; a quarter is held out, drawn by class. Accuracy on it. The images to
learn from come as they are, moved by a pixel each way, and turned by ten degrees each way.
"""

import time

import numpy as np
import torch
from recipes.common import arguments, best_of, tell
from scipy.ndimage import rotate
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
                 num_heads=(2, 4), window=4, path_dropout=0.0),
}  # fmt: skip


EPOCHS = {"vit": 10, "swin": 30}


def main() -> None:
    given = arguments(__doc__, "digits", epochs=1.0)
    began = time.perf_counter()
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    split = train_test_split(
        pixels, digits.target, test_size=0.25, random_state=0, stratify=digits.target
    )
    train_x, test_x, train_y, test_y = split
    accuracy = {}
    for family, sizes in MODELS.items():
        model = ph.build(family, head="classify", seed=0, labels=LABELS, init_std=0.1, **sizes)
        processor = Processor(size=None, mean=(0.5,), std=(0.5,))
        config = TrainConfig(
            epochs=given.epochs * EPOCHS[family], batch_size=64, lr=2e-3, warmup=100,
            weight_decay=0.05, validate_every=250, checkpoint_every=250, validate_batches=0,
            out=f"{given.out}/{family}",
        )  # fmt: skip
        trainer = ph.Trainer(model, processor, config, objective="image-classify")
        rows = [
            {"image": image, "label": str(label)}
            for one, label in zip(train_x, train_y, strict=True)
            for image in moved(one)
        ]
        fitted = trainer.fit(rows, force=given.force)
        best = ph.load(best_of(fitted))
        with torch.inference_mode():
            found = best(processor(list(test_x))).argmax(-1).numpy()
        accuracy[family] = float((found == test_y).mean())
    tell("digits", began, **accuracy, images=len(train_x), held_out=len(test_x))


def moved(image: np.ndarray) -> list[np.ndarray]:
    """An image, its four neighbours, and two that are turned."""
    padded = np.pad(image, 1)
    steps = [(1, 1), (0, 1), (2, 1), (1, 0), (1, 2)]
    shifted = [padded[row : row + 8, column : column + 8] for row, column in steps]
    return [*shifted, *(rotate(image, angle, reshape=False, order=1) for angle in (-10, 10))]


if __name__ == "__main__":
    main()
