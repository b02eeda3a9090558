import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import polyhead as ph
from polyhead.errors import DataError
from polyhead.images import Processor
from polyhead.images.sizes import Exactly
from polyhead.train.contrastive import TextsAndImages, clip
from polyhead.train.loop import Trainer
from polyhead.train.records import read_table
from polyhead.train.registry import OBJECTIVES

from .tables import settings, wordpiece

COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}
PROCESSOR = Processor(size=Exactly(16, 16))


def pictures(count, seed=0):
    """Noise around a colour: arrays [12, 10, 3] and the colour's name."""
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        name = list(COLOURS)[number % 3]
        noise = draw.integers(-30, 30, size=(12, 10, 3))
        image = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
        rows.append({"image": image, "label": name})
    return rows


def vit(**fields):
    sizes = {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_ff": 64}
    shape = {"image_size": 16, "patch_size": 8, "labels": ("blue", "green", "red")}
    return ph.build("vit", head="classify", seed=0, **{**sizes, **shape, **fields})


def test_images_learn_their_classes_from_files_and_arrays(tmp_path):
    rows = pictures(60)
    for number, row in enumerate(rows):
        Image.fromarray(row["image"]).save(tmp_path / f"{number}.png")
    table = tmp_path / "images.jsonl"
    lines = [{"image": f"{n}.png", "label": row["label"]} for n, row in enumerate(rows)]
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = vit()
    config = settings(tmp_path / "run", steps=25)
    trainer = Trainer(model, PROCESSOR, config, objective="image-classify", quiet=True)
    result = trainer.fit(table)
    assert result["valid_accuracy"] == 1.0
    assert trainer.evaluate(pictures(9, 3))["accuracy"] == 1.0
    saved = ph.load(result["best"])
    assert saved.config.labels == ("blue", "green", "red")
    assert Processor.load(result["best"]) == PROCESSOR


def test_the_loss_is_transformers(tmp_path):
    model = vit().eval()
    kind = OBJECTIVES["image-classify"]
    table = read_table(pictures(5), kind.columns)
    dataset = kind.dataset(table, PROCESSOR, model, settings(tmp_path, held_out=0.0), "train")
    batch = dataset.batch(0, 5)
    model.save(tmp_path / "model")
    theirs = transformers.ViTForImageClassification.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        expected = theirs(batch.inputs["pixel_values"], labels=batch.labels).loss
        found = kind.loss(model, batch)
    assert float(found.total) / 5 == pytest.approx(float(expected), rel=1e-5)


def test_an_image_that_is_not_there_is_said_before_training(tmp_path):
    table = tmp_path / "images.csv"
    table.write_text("image,label\nnone.png,red\n")
    with pytest.raises(DataError, match=r"image of row 0 is not there: none\.png"):
        Trainer(
            vit(), PROCESSOR, settings(tmp_path / "run"), objective="image-classify", quiet=True
        ).fit(table)


def two_towers(tokenizer):
    tower = {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_ff": 64}
    cls = OBJECTIVES["clip"].head
    text = {**tower, "vocab_size": tokenizer.vocab_size, "max_seq_len": 12}
    text["eos_token_id"] = tokenizer.sep_id
    vision = {**tower, "image_size": 16, "patch_size": 8}
    return _clip(text, vision), cls


def _clip(text, vision):
    names = {"d_model": "hidden_size", "d_ff": "intermediate_size", "max_seq_len": None}
    names |= {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
    names["max_seq_len"] = "max_position_embeddings"
    text, vision = ({names.get(k, k): v for k, v in one.items()} for one in (text, vision))
    return transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)


@pytest.fixture
def clip_model(tmp_path):
    tokenizer = wordpiece("red green blue thing")
    torch.manual_seed(0)
    theirs = transformers.CLIPModel(two_towers(tokenizer)[0]).eval()
    theirs.save_pretrained(tmp_path / "clip")
    return theirs, ph.load(tmp_path / "clip"), TextsAndImages(tokenizer, PROCESSOR)


def captions(count, seed=0):
    rows = pictures(count, seed)
    return [{"image": row["image"], "text": f"a {row['label']} thing"} for row in rows]


def clip_dataset(rows, inputs, model, out):
    kind = OBJECTIVES["clip"]
    table = read_table(rows, kind.columns)
    return kind.dataset(table, inputs, model, settings(out, held_out=0.0), "train")


def test_clips_loss_is_transformers(tmp_path, clip_model):
    theirs, model, inputs = clip_model
    rows = [{**row, "text": f"{row['text']} {n}"} for n, row in enumerate(captions(3))]
    batch = clip_dataset(rows, inputs, model, tmp_path).batch(0, 3)
    assert not batch.same.any()
    texts, images = batch.sides
    with torch.no_grad():
        expected = theirs(**texts, **images, return_loss=True).loss
        found = clip(model, batch)
    assert float(found.total) / 3 == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_clips_cached_gradients_are_the_whole_batchs(tmp_path, clip_model, chunk):
    _, model, inputs = clip_model
    batch = clip_dataset(captions(6), inputs, model, tmp_path).batch(0, 6)
    assert batch.same.sum() == 6, "the same words twice"
    gradients = []
    for size in (0, chunk):
        model.zero_grad()
        clip(model, batch, chunk=size).total.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert gradients[0]["head.log_scale"] != 0
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5), name


def test_texts_find_their_images(tmp_path, clip_model):
    _, model, inputs = clip_model
    trainer = Trainer(
        model, inputs, settings(tmp_path / "run", steps=40), objective="clip", quiet=True
    )
    trainer.fit(captions(60))
    assert trainer.evaluate(captions(3, seed=4))["recall_at_1"] == 1.0
    assert Processor.load(tmp_path / "run" / "checkpoints" / "step-00000040") == PROCESSOR
