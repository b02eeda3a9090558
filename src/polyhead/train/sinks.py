"""A run's figures sent elsewhere as well: TensorBoard, trackio, Weights & Biases."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from polyhead.errors import ConfigError

Sink = Callable[[Any, dict[str, Any]], None]
"""A callback of the trainer: `(trainer, record)`."""
_PACKAGES = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}


def sink(name: str, project: str = "polyhead") -> Sink:
    """A callback that writes each line of the log to a tracker, under the run's directory name.

    name: tensorboard (its files go into the run's directory), trackio or wandb. Errors: ConfigError
    for another name, and where the package is not installed.
    """
    if name not in _PACKAGES:
        raise ConfigError(f"sink {name!r} is not one of {', '.join(_PACKAGES)}")
    try:
        package = import_module(_PACKAGES[name])
    except ImportError:
        raise ConfigError(
            f"the sink {name} needs a package: pip install {_PACKAGES[name]}"
        ) from None
    return TensorBoard() if name == "tensorboard" else Tracker(package, project)


def figures(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line, without its step."""
    return {
        key: float(value)
        for key, value in record.items()
        if key != "step" and isinstance(value, int | float)
    }


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self) -> None:
        self.writer: Any = None

    def __call__(self, trainer: Any, record: dict[str, Any]) -> None:
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(Path(trainer.run) / "tensorboard"))
        for key, value in figures(record).items():
            self.writer.add_scalar(key, value, record["step"])
        if "sample" in record:
            self.writer.add_text("sample", record["sample"], record["step"])
        self.writer.flush()


class Tracker:
    """A package with wandb's `init` and `log`."""

    def __init__(self, package: Any, project: str) -> None:
        self.package, self.project, self.run = package, project, None

    def __call__(self, trainer: Any, record: dict[str, Any]) -> None:
        if self.run is None:
            name = Path(trainer.run).name
            config = trainer.config.to_dict()
            self.run = self.package.init(project=self.project, name=name, config=config)
        found: dict[str, Any] = dict(figures(record))
        if "sample" in record:
            found["sample"] = record["sample"]
        self.package.log(found, step=record["step"])
