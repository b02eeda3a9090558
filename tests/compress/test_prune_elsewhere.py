"""Smaller models in other libraries and formats: they load where these can say the sizes."""

import pytest
import torch

import polyhead as ph
from polyhead.errors import ConfigError
from polyhead.models import gguf

from .families import CASES, Case

transformers = pytest.importorskip("transformers")

# Every family of theirs; masked-LM heads of DeBERTa are Microsoft's.
THEIRS = {name: case for name, case in CASES.items() if case.family != "transformer"}
HEADLESS = {"deberta", "deberta-v2", "deberta-v3"}
# Whose config.json can say that heads are not an equal share of the width.
READ_HEAD_DIM = {
    "llama", "mqa", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "t5", "flan",
    "vit", "deit", "dinov2", "dinov2 giant",
}  # fmt: skip


def built(name):
    case = THEIRS[name]
    fields = case.fields
    if "d_expert" in fields:
        fields = {**fields, "d_expert": 24}  # torch's kernel wants 16 bytes
    if name == "llama":
        fields = {**fields, "num_heads": 8}  # its class divides the width by heads, whatever it is
    head = "none" if name in HEADLESS else case.head
    return Case(case.family, {**fields}, case.takes, head).build()


def in_transformers(folder, model, given):
    kind = getattr(transformers, model.hf_config()["architectures"][0])
    theirs, said = kind.from_pretrained(folder, output_loading_info=True)
    assert not said["missing_keys"] - {"pooler.dense.weight", "pooler.dense.bias"}
    found = theirs.eval()(**given)
    names = ("logits", "logits_per_text", "last_hidden_state")
    return next(found[name] for name in names if name in found)


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("what", ["heads", "neurons", "experts"])
@torch.no_grad()
def test_transformers_loads_what_its_config_can_say(tmp_path, name, what):
    model, given = built(name), THEIRS[name].given()
    if what == "experts" and not getattr(model.config, "num_experts", 0):
        with pytest.raises(ConfigError, match="has none"):
            ph.shrink(model, experts=0.5)
        return
    share = {"heads": 0.5, "neurons": 0.5 if "dinov2" in name else 0.33, "experts": 0.5}[what]
    small = ph.shrink(model, **{what: share})
    small.save(tmp_path)
    if what == "heads" and name not in READ_HEAD_DIM:
        # Never loaded as another model.
        with pytest.raises(Exception, match=r"mismatched|validat"):
            in_transformers(tmp_path, small, given)
        return
    ours, theirs = small(**given), in_transformers(tmp_path, small, given)
    assert (ours - theirs).abs().max() <= 1e-4 * max(1, ours.abs().max())


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "qwen3_moe"])
@torch.no_grad()
def test_gguf_holds_a_smaller_model(tmp_path, name):
    model, given = built(name), THEIRS[name].given()
    small = ph.shrink(model, heads=0.5, neurons=0.33)
    gguf.write(tmp_path / "small.gguf", small.hf_config(), small.hf_tensors())
    again = ph.load(tmp_path / "small.gguf")
    assert again.config.num_heads == small.config.num_heads
    assert (again(**given) - small(**given)).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
@torch.no_grad()
def test_llama_cpp_takes_these_heads_for_as_wide_as_the_model(tmp_path, name):
    model = built(name)
    fewer = ph.shrink(model, heads=0.5)
    with pytest.raises(ConfigError, match="2 heads of 8 are 16 wide, and those of GGUF's"):
        gguf.write(tmp_path / "small.gguf", fewer.hf_config(), fewer.hf_tensors())
    narrower = ph.shrink(model, neurons=0.5)
    gguf.write(tmp_path / "small.gguf", narrower.hf_config(), narrower.hf_tensors())
    again = ph.load(tmp_path / "small.gguf")
    given = THEIRS[name].given()
    assert (again(**given) - narrower(**given)).abs().max() <= 1e-4
