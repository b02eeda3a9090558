"""A model that was opened, and what serves it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from polyhead.adapt.adapters import merge_adapters
from polyhead.adapt.load import tokenizer
from polyhead.adapt.peft import load_adapter
from polyhead.compress.formats import PackedWeight
from polyhead.compress.quantize import weight_bytes
from polyhead.errors import ConfigError
from polyhead.generate.engine_config import EngineConfig
from polyhead.images import Processor
from polyhead.kernels import pack
from polyhead.models.model import TaskModel
from polyhead.models.probes import check_probes
from polyhead.nn.sharing import with_same_weights
from polyhead.serve.looking import Looking
from polyhead.serve.messages import Sender, Service
from polyhead.serve.opening import Opening
from polyhead.serve.reading import Reading
from polyhead.serve.rewriting import Rewriting
from polyhead.serve.writing import Writing
from polyhead.tasks.fit import kind_of
from polyhead.tasks.looking import READ_IMAGES
from polyhead.text.tokenizer import Tokenizer

_CHANGES = ("dtype", "quantize", "adapter")
"""What of an `Opening` makes answers others."""


@dataclass(frozen=True)
class Opened:
    """A model with what reads for it. num_bytes: of the weights that no other model holds."""

    model: TaskModel
    tokenizer: Tokenizer | None
    processor: Processor | None
    num_bytes: int

    @classmethod
    def of(cls, source: str, opening: Mapping[str, Any], probes: bool = True) -> Self:
        """What `Opening` opens. probes: whether it must answer as it did when it was saved."""
        model, path = Opening(**opening).open_model(source, writes=True)
        kind = kind_of(model)
        processor = Processor.load(path) if kind in READ_IMAGES else None
        words = None if kind == "vision" else tokenizer(path)
        if probes:
            as_saved = all(opening.get(name) in (None, "auto") for name in _CHANGES)
            _check(path, source, model, words, as_saved)
        return cls(model, words, processor, weight_bytes(model))

    def adapted(self, folder: Path, probes: bool = True) -> "Opened":
        """The same model with an adapter: what that leaves as it is, both hold together.

        Weights that are floats take it in, and run as fast as before; others go beside it.
        """
        model = with_same_weights(self.model)
        load_adapter(model, folder)
        if probes:
            is_float = not any(isinstance(part, PackedWeight) for part in model.modules())
            _check(folder, folder.name, model, self.tokenizer, is_float)
        if not any(isinstance(part, PackedWeight) for part in model.modules()):
            merge_adapters(model, keep=False)
            model.requires_grad_(False)
        return replace(self, model=model, num_bytes=weight_bytes(model, beside=self.model))

    @property
    def writes(self) -> bool:
        """Whether it goes on from texts, or rewrites them."""
        kinds = ("decoder", "image-text", "encoder-decoder")
        return kind_of(self.model) in kinds and self.model.head_kind == "lm"

    def service(self, name: str, engine: Mapping[str, Any], say: Sender) -> Service:
        """What serves it by a name."""
        if not self.writes:
            laid_out = pack(self.model) if self.model.device.type == "cpu" else self.model
            if self.processor is not None:
                return Looking(laid_out, self.processor, self.tokenizer, say.flush)
            return Reading(laid_out, self._words, say.flush)
        if kind_of(self.model) == "encoder-decoder":
            return Rewriting(self.model, self._words, say.flush)
        config = EngineConfig(**engine)
        return Writing(name, self.model, self._words, config, say, self.processor)

    @property
    def _words(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ConfigError(f"{self.model.config.model_type} has no tokenizer to read texts with")
        return self.tokenizer


def _check(
    path: Path, name: str, model: TaskModel, words: Tokenizer | None, as_saved: bool
) -> None:
    """Errors: ConfigError for a model that answers otherwise than when it was saved."""
    wrong = check_probes(path, model, words, as_saved)
    if wrong:
        raise ConfigError(
            f"{name} is not what was saved: {'; '.join(wrong[:3])}; serve it all the same with "
            "--no-probes"
        )
