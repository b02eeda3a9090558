"""The published sizes are those that transformers makes of them, and that the papers count."""

import json
from pathlib import Path

import pytest
import torch

import polyhead as ph
from polyhead.models.presets import PRESETS

transformers = pytest.importorskip("transformers")

# Millions of parameters, with their heads, as published.
PUBLISHED = {
    "bert": 109.5, "roberta": 124.7, "distilbert": 67.0, "albert": 11.2, "gpt2": 124.4,
    "llama": 8030.3, "mistral": 7241.7, "qwen2": 494.0, "qwen3": 596.0, "mixtral": 46702.8,
    "t5": 222.9, "flan-t5": 247.6, "vit": 86.6, "deit": 87.3, "dinov2": 86.6, "swin": 28.3,
    "clip": 151.3, "llava": 7063.4, "deberta-v3": 184.8,
}  # fmt: skip
# Tables that transformers counts and that are computed here, or the other way round.
SINUSOIDS, PLACES = 2 * 512 * 512, 512 * 768
OFF = {"marian": -SINUSOIDS, "deberta": PLACES}
# Of these transformers has no class with the head, or ties what the checkpoint does not.
ALONE = {"deberta-v3", "flan-t5"}


@pytest.mark.parametrize("name", PRESETS)
def test_it_is_as_large_as_the_published_one(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = ph.build(**PRESETS[name].arguments())
    if name in PUBLISHED:
        assert model.num_parameters() / 1e6 == pytest.approx(PUBLISHED[name], abs=0.06)
    if name in ALONE:
        return
    (tmp_path / "config.json").write_text(json.dumps(model.hf_config()))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == PRESETS[name].model_type
    with torch.device("meta"):
        theirs = getattr(transformers, model.hf_config()["architectures"][0])(config)
        theirs.tie_weights()
    counted = sum(weight.numel() for weight in theirs.parameters())
    assert model.num_parameters() - OFF.get(name, 0) == counted
