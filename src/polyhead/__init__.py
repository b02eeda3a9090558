"""Every transformer from one small set of readable parts."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Names are fetched when first used, so that `import polyhead` and `polyhead --help` cost little.
_HOMES = {
    "Answerer": "tasks.answer",
    "ChoicesTask": "tasks.evaluate.choices",
    "Classifier": "tasks.classify",
    "ConfigError": "errors",
    "DataError": "errors",
    "DraftModel": "generate.speculative",
    "Engine": "generate.engine",
    "EngineConfig": "generate.engine_config",
    "EngineThread": "generate.front",
    "FileError": "errors",
    "Filler": "tasks.fill",
    "GenerationConfig": "generate.config",
    "HarnessTask": "tasks.evaluate.harness",
    "ImageClassifier": "tasks.classify",
    "Jacobi": "generate.speculative",
    "LoraConfig": "adapt.lora",
    "Mask": "nn.mask",
    "MatchTask": "tasks.evaluate.match",
    "NgramLookup": "generate.speculative",
    "PerplexityTask": "tasks.evaluate.perplexity",
    "PolyheadError": "errors",
    "Processor": "images.processor",
    "PromptFile": "tasks.prompt_file.reading",
    "PromptRun": "tasks.prompt_file.run",
    "Scorer": "tasks.evaluate.scorer",
    "SearchConfig": "generate.config",
    "Similar": "tasks.similar",
    "Summarizer": "tasks.translate",
    "Tagger": "tasks.tag",
    "TextGenerator": "generate.generator",
    "Tokenizer": "text.tokenizer",
    "TrainConfig": "train.config",
    "Trainer": "train.loop",
    "Translator": "tasks.translate",
    "ZeroShotClassifier": "tasks.classify",
    "add_adapter": "adapt.adapters",
    "build": "models.assemble",
    "capture": "explain.capture",
    "capture_steps": "explain.capture",
    "embed": "tasks.embed",
    "evaluate": "tasks.evaluate.run",
    "export_aoti": "export.aoti",
    "export_onnx": "export.onnx",
    "families": "models.registry",
    "first_layers": "generate.speculative",
    "grpo_objective": "train.grpo",
    "importance": "compress.importance",
    "inside": "tasks.inside",
    "knock_out": "explain.replace",
    "load": "adapt.load",
    "load_adapter": "adapt.peft",
    "low_rank": "compress.low_rank",
    "merge_adapters": "adapt.adapters",
    "merge_low_rank": "compress.low_rank",
    "pack": "kernels.packing",
    "perplexity": "tasks.perplexity",
    "prepare": "train.prepare",
    "prune": "compress.prune",
    "quantize": "compress.quantize",
    "remove_adapters": "adapt.adapters",
    "replace": "explain.replace",
    "rounded": "compress.qat",
    "save_adapter": "adapt.peft",
    "second_moments": "compress.low_rank",
    "shrink": "compress.structures",
    "sparsity": "compress.prune",
    "tokenizer": "adapt.load",
    "unmerge_adapters": "adapt.adapters",
    "use_adapters": "adapt.adapters",
    "without_adapters": "adapt.adapters",
    "write_probes": "models.probes",
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'polyhead' has no attribute {name!r}")
    value = getattr(import_module(f"polyhead.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
