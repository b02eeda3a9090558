"""The public calls, and what it costs to reach them."""

import importlib
import subprocess
import sys

import pytest

import polyhead as ph

CALLS = {
    "Answerer": "polyhead.tasks.answer",
    "Classifier": "polyhead.tasks.classify",
    "ConfigError": "polyhead.errors",
    "DataError": "polyhead.errors",
    "FileError": "polyhead.errors",
    "Filler": "polyhead.tasks.fill",
    "GenerationConfig": "polyhead.generate.config",
    "Mask": "polyhead.nn.mask",
    "PolyheadError": "polyhead.errors",
    "Similar": "polyhead.tasks.similar",
    "Tagger": "polyhead.tasks.tag",
    "TextGenerator": "polyhead.generate.generator",
    "TrainConfig": "polyhead.train.config",
    "Trainer": "polyhead.train.loop",
    "build": "polyhead.models.assemble",
    "families": "polyhead.models.registry",
    "load": "polyhead.adapt.load",
    "pack": "polyhead.kernels.packing",
    "perplexity": "polyhead.tasks.perplexity",
    "tokenizer": "polyhead.adapt.load",
}
HEAVY = "torch numpy tokenizers transformers tyro rich jinja2 safetensors huggingface_hub gguf"


@pytest.mark.parametrize(("name", "home"), CALLS.items())
def test_a_public_call_is_what_its_home_says(name: str, home: str) -> None:
    assert getattr(ph, name) is getattr(importlib.import_module(home), name)


def test_all_lists_what_resolves() -> None:
    assert set(CALLS) <= set(ph.__all__)
    assert set(ph.__all__) <= set(dir(ph))
    for name in ph.__all__:
        assert getattr(ph, name) is not None, name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ph.nonsense  # noqa: B018


@pytest.mark.parametrize(
    "statement",
    [
        "import polyhead",
        "from polyhead import GenerationConfig, TrainConfig, PolyheadError",
    ],
)
def test_what_is_light_stays_light(statement: str) -> None:
    code = f"import sys; {statement}; print(*(set({HEAVY.split()!r}) & set(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.split() == []


def test_the_library_needs_neither_extras_nor_the_command_line_s_libraries() -> None:
    code = (
        "import sys\n"
        "for name in ('tyro', 'transformers', 'huggingface_hub', 'gguf', 'sentencepiece'):\n"
        "    sys.modules[name] = None\n"
        "import polyhead as ph, torch\n"
        "model = ph.build('llama', vocab_size=16, d_model=8, d_ff=8, num_layers=1, num_heads=2,"
        " max_seq_len=8)\n"
        "print(tuple(model(torch.zeros(1, 3, dtype=torch.long)).shape), len(ph.families()) > 0)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert found.stdout.strip() == "(1, 3, 16) True"


def test_the_version_is_the_installed_one() -> None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("polyhead")
    except PackageNotFoundError:
        pytest.skip("polyhead runs from its sources here, not installed")
    assert ph.__version__ == installed
