"""Runs whose weights are rounded as they are read."""

import pytest
import torch

import polyhead as ph
from polyhead.errors import ConfigError
from polyhead.train.config import TrainConfig
from polyhead.train.evaluate import score_tokens

from .conftest import text, tiny
from .test_checkpoint import DROPOUT, SETTINGS, Stop, assert_same, final_state, stop_at


def begin(out, tokenizer, *, resume=False, model=None, callbacks=(), **settings):
    model = model or tiny(tokenizer.vocab_size, **DROPOUT)
    config = TrainConfig(out=str(out), **{**SETTINGS, **settings})
    trainer = ph.Trainer(model, tokenizer, config, callbacks=callbacks, quiet=True)
    return trainer, trainer.fit([text(60)], resume=resume)


@pytest.mark.parametrize("more", [{}, {"dtype": "bfloat16", "ema": 0.9}, {"recompute": "blocks"}])
def test_a_run_in_few_bits_goes_on_bit_for_bit(tmp_path, tokenizer, more):
    settings = {"qat": "int4", **more}
    begin(tmp_path / "whole", tokenizer, **settings)
    with pytest.raises(Stop):
        begin(tmp_path / "cut", tokenizer, callbacks=[stop_at(6)], **settings)
    begin(tmp_path / "cut", tokenizer, resume=True, **settings)
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))
    with pytest.raises(ConfigError, match="was trained with qat = int4, not none"):
        begin(tmp_path / "cut", tokenizer, resume=True, **{**more, "steps": 30})


def test_what_it_validates_is_what_quantize_makes(tmp_path, tokenizer):
    trainer, found = begin(tmp_path / "run", tokenizer, qat="int4", validate_batches=0)
    assert type(trainer.model.backbone.layers[0].ffn.up) is torch.nn.Linear
    saved = ph.load(found["checkpoint"])
    held = trainer._datasets([text(60)], None)[1]
    few, floats = (
        score_tokens(
            model, held.tokens, context=held.context, objective=trainer.objective, batch_size=2
        ).loss
        for model in (ph.quantize(saved, "int4"), saved)
    )
    assert found["valid_loss"] == pytest.approx(few, rel=1e-5)
    assert found["valid_loss"] != pytest.approx(floats, rel=1e-5)


def test_it_is_refused_before_a_run_begins(tmp_path, tokenizer):
    model = tiny(tokenizer.vocab_size)
    ph.add_adapter(model)
    with pytest.raises(ConfigError, match="with adapters is not rounded"):
        begin(tmp_path / "run", tokenizer, model=model, qat="int4")
    with pytest.raises(ConfigError, match="qat is 'int3': choose one of none, int8, int4"):
        TrainConfig(qat="int3")
