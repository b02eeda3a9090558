import dataclasses
import subprocess
import sys

import pytest

from polyhead.errors import ConfigError, FileError
from polyhead.train.config import TrainConfig


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": 1e-4, "min_lr": 1e-3}, "min_lr is 0.001"),
        ({"schedule": "step"}, "cosine, linear, constant, wsd"),
        ({"dtype": "float16"}, "float32, bfloat16"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"held_out": 1.0}, "held_out is 1.0"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(fields, says):
    with pytest.raises(ConfigError) as error:
        TrainConfig(**fields)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_toml_holds_every_field(tmp_path):
    config = TrainConfig(
        steps=7, lr=3e-5, betas=(0.8, 0.9), schedule="wsd", dtype="bfloat16",
        sample_prompt='a "quoted"\nline \x7f é \\', cache="there", min_lr=1e-6,
    )  # fmt: skip
    config.save(tmp_path / "config.toml")
    assert TrainConfig.load(tmp_path / "config.toml") == config
    TrainConfig().save(tmp_path / "config.toml")
    assert TrainConfig.load(tmp_path / "config.toml") == TrainConfig()


@pytest.mark.parametrize(
    ("toml", "kind", "says"),
    [
        ("stepz = 3", ConfigError, "unknown setting 'stepz'"),
        ("steps = '3'", ConfigError, "steps is '3'"),
        ("steps = 3.0", ConfigError, "steps is 3.0"),
        ("steps = true", ConfigError, "steps is True"),
        ("out = 3", ConfigError, "out is 3"),
        ("betas = 0.9", ConfigError, "betas is 0.9"),
        ("schedule = 'step'", ConfigError, "schedule is 'step'"),
        ("steps 3", FileError, "not TOML"),
    ],
)
def test_toml_that_cannot_be_says_where(tmp_path, toml, kind, says):
    path = tmp_path / "config.toml"
    path.write_text(toml)
    with pytest.raises(kind) as error:
        TrainConfig.load(path)
    assert says in str(error.value)
    assert str(path) in str(error.value)


def test_whole_numbers_do_for_real_ones(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("lr = 1\nclip = 0\nmin_lr = 1")
    assert TrainConfig.load(path) == TrainConfig(lr=1.0, clip=0.0, min_lr=1.0)


def test_a_missing_file_is_a_file_error(tmp_path):
    with pytest.raises(FileError, match="cannot read"):
        TrainConfig.load(tmp_path / "none.toml")


def test_every_field_has_a_default_and_help_needs_no_torch():
    assert all(f.default is not dataclasses.MISSING for f in dataclasses.fields(TrainConfig))
    code = "import sys, polyhead.train.config; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fine_tuning_is_gentle_and_epochs_are_positive(tmp_path):
    assert TrainConfig.fine_tuning(steps=7).epochs is None
    made = TrainConfig.fine_tuning(lr=1e-4)
    assert (made.lr, made.epochs, made.min_lr, made.schedule) == (1e-4, 3.0, 0.0, "linear")
    made.save(tmp_path / "config.toml")
    assert TrainConfig.load(tmp_path / "config.toml") == made
    for value in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="epochs is"):
            TrainConfig(epochs=value)


def test_steps_and_epochs_are_not_both_named():
    with pytest.raises(ConfigError, match="name one of them"):
        TrainConfig.fine_tuning(steps=7, epochs=2)
