"""Steps of int4 that learn: the model answers more as it did, codes and the old model stay."""

from typing import Any

import pytest
import torch
from tests.compress.test_gptq import batches, read
from tests.compress.test_saved import made
from torch import Tensor

import polyhead as ph
from polyhead.compress.formats import Int4
from polyhead.compress.layers import PackedLayer
from polyhead.errors import ConfigError
from polyhead.models.model import TaskModel


def tuned(model: TaskModel, given: list[Any], passes: int, **named: Any) -> TaskModel:
    named = dict(method="gptq", calibration=given) | named
    return ph.quantize(model, "int4", tuning=passes, **named)


def apart(model: TaskModel, other: TaskModel, given: list[Any]) -> float:
    return float((read(model, given) - read(other, given)).square().mean())


def matrices(model: TaskModel) -> dict[str, Int4]:
    return {
        name: part.packed
        for name, part in model.backbone.named_modules()
        if isinstance(part, PackedLayer) and isinstance(part.packed, Int4)
    }


@pytest.mark.parametrize("name", ["llama", "mixtral", "bert-bare", "t5", "vit"])
@pytest.mark.parametrize("method", ["nearest", "gptq", "awq"])
def test_answers_come_nearer(name: str, method: str) -> None:
    model = made(name)
    given = batches(model)
    before, after = (tuned(model, given, n, method=method, group=32) for n in (0, 12))
    assert apart(after, model, given) < 0.985 * apart(before, model, given)


def test_what_was_not_read_comes_nearer_too() -> None:
    model = made("llama")
    drawn = [torch.randint(5, 70, (4, 24)) for _ in range(24)]
    before, after = (tuned(model, drawn[:16], n) for n in (0, 4))
    assert apart(after, model, drawn[16:]) < apart(before, model, drawn[16:])


def test_only_steps_move() -> None:
    model = made("llama")
    given = batches(model)
    old = {key: value.clone() for key, value in model.state_dict().items()}
    before, after = (tuned(model, given, n) for n in (0, 2))
    for name, packed in matrices(after).items():
        own = matrices(before)[name]
        assert torch.equal(packed.codes, own.codes)
        assert not torch.equal(packed.scales, own.scales)
        assert packed.scales.dtype == packed.least.dtype == torch.float16
        assert not packed.learning
        assert not any(x.requires_grad for x in packed.buffers())
    assert all(torch.equal(value, old[key]) for key, value in model.state_dict().items())


def test_it_saves_and_exports_as_it_is(tmp_path: Any) -> None:
    model = made("llama")
    found = tuned(model, batches(model), 2)
    found.save(tmp_path / "few")
    assert torch.equal(read(ph.load(tmp_path / "few"), batches(model)), read(found, batches(model)))


def test_few_rows_at_a_time() -> None:
    """A batch of many texts is several portions, and the whole is told of."""
    model = made("llama")
    told: list[tuple[int, int]] = []
    given: list[Any] = [torch.randint(5, 70, (50, 24)), {"input_ids": torch.randint(5, 70, (3, 9))}]
    tuned(model, given, 2, progress=lambda *at: told.append(at))
    assert told[-1] == (8, 8)  # 21, 21 and 8 rows, then 3, twice


def test_filling_is_not_learned() -> None:
    model = made("llama")
    ids = torch.randint(5, 70, (4, 24))
    mask = torch.arange(24) < torch.tensor([[24], [9], [5], [17]])
    others = torch.where(mask, ids, 7)
    one, two = (
        tuned(model, [{"input_ids": x, "attention_mask": mask}], 3, method="nearest")
        for x in (ids, others)
    )
    for name, packed in matrices(one).items():
        assert torch.allclose(packed.scales, matrices(two)[name].scales, rtol=2e-3), name


def test_inside_inference_mode() -> None:
    model = made("llama")
    given = batches(model)
    with torch.inference_mode():
        inside = tuned(model, given, 2)
    assert apart(inside, tuned(model, given, 2), given) < 1e-6


def test_an_interrupted_one_leaves_nothing_behind() -> None:
    model = made("llama")
    given = batches(model)
    found = tuned(model, given, 0)
    before = {name: part.scales.clone() for name, part in matrices(found).items()}

    def stop(done: int, every: int) -> None:
        raise KeyboardInterrupt

    from polyhead.compress.tune import tune

    with pytest.raises(KeyboardInterrupt):
        tune(found, model, given, 2, stop)
    for name, part in matrices(found).items():
        assert torch.equal(part.scales, before[name])
        assert not part.learning


@pytest.mark.parametrize(
    "named",
    [
        dict(form="int8", tuning=1, method="gptq", calibration=[torch.ones(1, 4).long()]),
        dict(form="int4", tuning=1),
        dict(form="int4", tuning=-1, calibration=[torch.ones(1, 4).long()]),
    ],
)
def test_what_cannot_be_is_refused(named: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"tuning is -?1 with form"):
        ph.quantize(made("llama"), **named)


def test_a_text_that_gives_no_number_teaches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from polyhead.compress import tune as module

    model = made("llama")
    given = batches(model)
    plain, seen = module._apart, []

    def broken(*args: Any) -> Tensor:
        seen.append(args)
        return plain(*args) * (torch.nan if len(seen) == 1 else 1.0)

    monkeypatch.setattr(module, "_apart", broken)
    found = tuned(model, given, 3)
    assert all(part.scales.isfinite().all() for part in matrices(found).values())
    assert read(found, given).isfinite().all()
