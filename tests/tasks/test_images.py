"""Classes of images, as transformers' pipelines give them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tasks.tiny import make, wordpiece

import polyhead as ph
from polyhead.images import Processor
from polyhead.images.sizes import Exactly
from polyhead.models.clip_config import CLIPTextConfig, CLIPVisionConfig
from polyhead.models.model import TaskModel
from polyhead.tasks.classify import ImageClassifier, ZeroShotClassifier
from polyhead.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
pillow = pytest.importorskip("PIL.Image")

LABELS = ("a cat", "a dog", "the loom")
SIZES: dict[str, Any] = dict(d_model=16, d_ff=24, num_layers=2, num_heads=2)


def pictures(folder: Path, count: int = 5) -> list[str]:
    random = np.random.default_rng(0)
    paths: list[str] = []
    for number in range(count):
        shape = (20 + 7 * number, 31 + 3 * number, 3)
        path = folder / f"{number}.png"
        pillow.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(path)
        paths.append(str(path))
    return paths


def vision(folder: Path) -> tuple[TaskModel, Processor]:
    processor = Processor(size=Exactly(24, 24))
    model = ph.build("vit", seed=0, image_size=24, patch_size=8, labels=LABELS, init_std=0.4,
                     **SIZES)  # fmt: skip
    model.save(folder)
    processor.save(folder)
    return ph.load(folder), Processor.load(folder)


def clip(folder: Path) -> tuple[TaskModel, Tokenizer, Processor]:
    tokenizer = wordpiece()
    text = CLIPTextConfig.fresh(
        "clip_text_model", vocab_size=tokenizer.vocab_size, max_seq_len=24,
        eos_token_id=tokenizer.sep_id, projection_dim=12, **SIZES,
    )  # fmt: skip
    tower = CLIPVisionConfig.fresh(
        "clip_vision_model", image_size=24, patch_size=8, projection_dim=12, **SIZES
    )
    model = ph.build("clip", seed=0, text=text, vision=tower, projection_dim=12)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.mul_(15)
    model.save(folder)
    tokenizer.save(folder, force=True)
    Processor(size=Exactly(24, 24), stem="CLIP").save(folder)
    return ph.load(folder), ph.tokenizer(folder), Processor.load(folder)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_images_as_the_pipeline_classes_them(batch_size: int, tmp_path: Path) -> None:
    classify = ImageClassifier(*vision(tmp_path))
    paths = pictures(tmp_path)
    told: list[tuple[int, int]] = []
    found = classify(paths, batch_size=batch_size, progress=lambda *at: told.append(at))
    assert told[-1] == (5, 5)
    pipe = transformers.pipeline("image-classification", model=str(tmp_path), device="cpu")
    for path, ours in zip(paths, found, strict=True):
        expected = {one["label"]: one["score"] for one in pipe(path)}
        assert ours.scores == pytest.approx(expected, abs=5e-3)
        assert ours.label == max(expected, key=expected.__getitem__)
    alone = classify(pillow.open(paths[2]))[0]
    assert alone.scores == pytest.approx(found[2].scores, abs=1e-5)


def test_labels_of_one_s_own(tmp_path: Path) -> None:
    model, tokenizer, processor = clip(tmp_path)
    paths = pictures(tmp_path)
    found = ZeroShotClassifier(model, tokenizer, processor)(paths, LABELS)
    reference = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    assert len({one.label for one in found}) > 1
    for path, ours in zip(paths, found, strict=True):
        sentences = [f"This is a photo of {label}." for label in LABELS]
        logits = []
        for sentence in sentences:
            ids = torch.tensor([tokenizer.encode(sentence)])
            with torch.no_grad():
                out = reference(input_ids=ids, pixel_values=processor(path))
            logits.append(float(out.logits_per_image))
        expected = torch.tensor(logits).softmax(0).tolist()
        assert ours.scores == pytest.approx(dict(zip(LABELS, expected, strict=True)), abs=1e-5)


def test_what_cannot_be_classed(tmp_path: Path) -> None:
    model, processor = vision(tmp_path / "vit")
    (tmp_path / "letter.png").write_text("Dear Ada")
    with pytest.raises(ph.DataError, match=r"letter\.png"):
        ImageClassifier(model, processor)(tmp_path / "letter.png")
    texts, tokenizer = make(tmp_path / "bert", "classify")
    with pytest.raises(ph.ConfigError, match="reads texts; use Classifier"):
        ImageClassifier(texts, processor)
    with pytest.raises(ph.ConfigError, match="vit reads images; use ImageClassifier"):
        ph.Classifier(model, tokenizer)
    with pytest.raises(ph.ConfigError, match="need a clip"):
        ZeroShotClassifier(texts, tokenizer, processor)
    zero = ZeroShotClassifier(*clip(tmp_path / "clip"))
    with pytest.raises(ph.DataError, match="two or more labels"):
        zero([], ["a cat"])
    with pytest.raises(ph.ConfigError, match=r"has no \{\}"):
        zero([], LABELS, template="a photo")
