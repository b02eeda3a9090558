"""GGUF and Hugging Face name the same numbers: there and back, by transformers and gguf too."""

import json
import random
from pathlib import Path

import pytest
import torch

import polyhead
from polyhead.errors import ConfigError, PolyheadError
from polyhead.files.gguf import open_gguf
from polyhead.files.gguf_types import RawTensor
from polyhead.files.gguf_write import write_gguf
from polyhead.files.safetensors import open_checkpoint
from polyhead.files.safetensors_write import write_checkpoint
from polyhead.models import gguf as ours
from polyhead.models.gguf_config import (
    config_from_metadata,
    family_of_metadata,
    metadata_from_config,
)
from polyhead.models.gguf_rope import llama3_factors

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

SIZES = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 20000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "attention_factor": 1.25,
    "beta_fast": 24.0,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
# A name, the class, and what differs. `seen`: what transformers' own reader of GGUF understands.
MODELS = {
    "llama": ("LlamaConfig", {}, True),
    "llama tied, biased": (
        "LlamaConfig",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        False,
    ),
    "llama, head width": ("LlamaConfig", {"head_dim": 32}, True),
    "llama, llama3 rope": ("LlamaConfig", {"head_dim": 64, "rope_parameters": LLAMA3}, False),
    "llama, linear rope": ("LlamaConfig", {"rope_parameters": LINEAR}, False),
    "llama, yarn rope": ("LlamaConfig", {"rope_parameters": YARN}, False),
    "mistral, window": ("MistralConfig", {"sliding_window": 6, "head_dim": 16}, False),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}, False),
    "qwen2": ("Qwen2Config", {}, True),
    "qwen3": ("Qwen3Config", {"head_dim": 128}, True),
    "qwen3, head width": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}, False),
    "qwen2moe": (
        "Qwen2MoeConfig",
        EXPERTS | {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 80},
        False,
    ),
    "qwen2moe, as transformers reads it": (
        "Qwen2MoeConfig",
        EXPERTS | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
        True,
    ),
    "qwen3moe": (
        "Qwen3MoeConfig",
        EXPERTS | {"moe_intermediate_size": 768, "norm_topk_prob": True, "head_dim": 32},
        True,
    ),
    "olmoe": ("OlmoeConfig", EXPERTS | {"num_key_value_heads": 4}, False),
    "gpt2": ("GPT2Config", {"n_inner": 80}, False),
    "gpt2, as transformers reads it": ("GPT2Config", {"n_positions": 1024}, True),
}
GPT2_SIZES = {
    "vocab_size": 40,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENS = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [f"t{i}" for i in range(40)]}


def build(name: str, settings: dict):
    torch.manual_seed(0)
    sizes = GPT2_SIZES if name == "GPT2Config" else SIZES
    config = getattr(transformers, name)(**{**sizes, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, or their places are unproved
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def logits(model) -> torch.Tensor:
    ids = torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture(scope="module", params=MODELS)
def written(request, tmp_path_factory):
    """A model of transformers, and a folder with its directory and the GGUF file made from it."""
    name, settings, _ = MODELS[request.param]
    folder: Path = tmp_path_factory.mktemp("model")
    model = build(name, settings)
    model.save_pretrained(folder / "hf")
    config = json.loads((folder / "hf" / "config.json").read_text())
    ours.write(folder / "m.gguf", config, open_checkpoint(folder / "hf"), TOKENS)
    return model, folder


def test_there_and_back_is_the_same_model(written):
    model, folder = written
    config, tensors, _ = ours.read(folder / "m.gguf")
    original = dict(open_checkpoint(folder / "hf"))
    assert set(tensors) == set(original)
    for name, tensor in original.items():
        assert torch.equal(tensors[name], tensor), name
    write_checkpoint(folder / "back", tensors)
    (folder / "back" / "config.json").write_text(json.dumps(config))
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "back").eval()
    assert type(again) is type(model)
    assert torch.equal(logits(again), logits(model))


def test_gguf_to_hf_to_gguf_is_bit_identical(written):
    _, folder = written
    config, tensors, file = ours.read(folder / "m.gguf")
    ours.write(folder / "again.gguf", config, tensors, file.metadata, force=True)
    again = open_gguf(folder / "again.gguf")
    assert again.metadata == file.metadata
    assert again.names == file.names
    for name in file.names:
        assert torch.equal(again.raw(name), file.raw(name)), name


def test_the_names_are_those_of_the_gguf_package(written):
    _, folder = written
    reader = gguf.GGUFReader(folder / "m.gguf")
    arch = reader.fields["general.architecture"].contents()
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    known = {gguf.TENSOR_NAMES[t].format(bid=i) for t in gguf.MODEL_TENSORS[kind] for i in (0, 1)}
    assert {t.name.rpartition(".")[0] for t in reader.tensors} <= known
    keys = vars(gguf.Keys.LLM) | vars(gguf.Keys.Attention) | vars(gguf.Keys.Rope)
    texts = [value for value in keys.values() if isinstance(value, str)]
    templates = {text.replace("{arch}", arch) for text in texts}
    assert {key for key in reader.fields if key.startswith(f"{arch}.")} <= templates


@pytest.mark.parametrize("written", [key for key, row in MODELS.items() if row[2]], indirect=True)
def test_transformers_reads_the_file_with_equal_logits(written):
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model, folder = written
    path = str(folder / "m.gguf")
    config = load_gguf_checkpoint(path)["config"]
    config = transformers.AutoConfig.for_model(**config)
    again = transformers.AutoModelForCausalLM.from_config(config).eval()
    found = load_gguf_checkpoint(path, return_tensors=True, model_to_load=again)["tensors"]
    missing, unexpected = again.load_state_dict(found, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)


def test_from_pretrained_reads_the_file(tmp_path):
    pytest.importorskip("accelerate")
    model = build("LlamaConfig", {})
    config = model.config.to_dict()
    ours.write(tmp_path / "m.gguf", config, model.state_dict(), TOKENS)
    load = transformers.AutoModelForCausalLM.from_pretrained
    again = load(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)


def test_halves_stay_halves_and_vectors_become_floats(tmp_path):
    model = build("LlamaConfig", {}).bfloat16()
    ours.write(tmp_path / "m.gguf", model.config.to_dict(), model.state_dict())
    file = open_gguf(tmp_path / "m.gguf")
    assert file.type_of("blk.0.attn_q.weight") == "BF16"
    assert file.type_of("blk.0.attn_norm.weight") == "F32"
    assert file.metadata["general.file_type"] == 32
    _, tensors, _ = ours.read(tmp_path / "m.gguf")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensors[name].bfloat16(), tensor)


def test_a_backbone_alone_and_old_buffers_are_understood(tmp_path):
    model = build("GPT2Config", {})
    tensors = dict(model.transformer.state_dict())
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    ours.write(tmp_path / "m.gguf", model.config.to_dict(), tensors)
    _, found, _ = ours.read(tmp_path / "m.gguf")
    assert torch.equal(found["transformer.h.1.mlp.c_fc.weight"], tensors["h.1.mlp.c_fc.weight"])


def test_blocks_come_in_hugging_faces_row_order(tmp_path):
    model = build("LlamaConfig", {})
    ours.write(tmp_path / "float.gguf", model.config.to_dict(), model.state_dict())
    file = open_gguf(tmp_path / "float.gguf")
    packed: dict[str, torch.Tensor | RawTensor] = {}
    for name in file.names:
        values = file[name]
        packed[name] = values
        if values.dim() == 2:
            data = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType.Q8_0)
            packed[name] = RawTensor("Q8_0", tuple(values.shape), torch.from_numpy(data))
    write_gguf(tmp_path / "m.gguf", file.typed_metadata(), packed)
    _, tensors, _ = ours.read(tmp_path / "m.gguf")
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        raw = tensors.stored(name)
        assert raw is not None
        values = gguf.quants.dequantize(raw.data.numpy(), gguf.GGMLQuantizationType.Q8_0)
        assert torch.equal(torch.from_numpy(values), tensors[name])
        torch.testing.assert_close(tensors[name], model.state_dict()[name], atol=0.01, rtol=0.02)
    assert tensors.stored("model.norm.weight") is None


@pytest.mark.parametrize(
    "numbers",
    [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (16.0, 1.0, 2.5, 4096), (4.0, 1.0, 8.0, 1024)],
)
@pytest.mark.parametrize("width", [64, 128])
def test_llama3s_numbers_are_found_in_its_factors(numbers, width):
    factor, low, high, length = numbers
    factors = llama3_factors(500000.0, width, *numbers)
    config = config_from_metadata(*tiny_llama(width, factors))
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }


def test_factors_that_are_not_llama3s_are_refused():
    factors = torch.linspace(1, 8, 32)
    with pytest.raises(ConfigError, match="rope_freqs"):
        config_from_metadata(*tiny_llama(64, factors))


def tiny_llama(width: int = 64, factors=None, **changes):
    """Metadata, shapes and factors of a Llama file of one layer."""
    metadata = {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "llama.embedding_length": 16,
        "llama.block_count": 1,
        "llama.feed_forward_length": 32,
        "llama.attention.head_count": 2,
        "llama.attention.key_length": width,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 500000.0,
    }
    metadata |= {key.replace("__", "."): value for key, value in changes.items()}
    shapes = {"token_embd.weight": (8, 16), "blk.0.attn_norm.weight": (16,)}
    return {k: v for k, v in metadata.items() if v is not None}, shapes, factors


@pytest.mark.parametrize(
    "changes",
    [
        {"general__architecture": "bert"},
        {"general__architecture": None},
        {"general__architecture": 3},
        {"llama__context_length": None},
        {"llama__attention__scale": 0.5},
        {"llama__attention__head_count": 0},
        {"llama__attention__head_count": "2"},
        {"llama__attention__head_count": [2, 4]},
        {"llama__attention__value_length": 3},
        {"llama__attention__causal": False},
        {"llama__rope__dimension_count": 8},
        {"llama__rope__freq_base": float("nan")},
        {"llama__rope__scaling__type": "longrope"},
        {"llama__block_count": 2**30},
        {"llama__embedding_length": 2**30},
        {"llama__expert_count": 2**30, "llama__expert_used_count": 2},
        {"llama__expert_count": "x"},
    ],
)
def test_settings_that_are_not_understood_are_refused(changes):
    metadata, shapes, factors = tiny_llama(**changes)
    with pytest.raises(ConfigError) as error:
        config_from_metadata(metadata, shapes, factors)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("LlamaConfig", {"model_type": "albert"}),
        ("LlamaConfig", {"hidden_act": "gelu"}),
        ("LlamaConfig", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
        ("LlamaConfig", {"rope_parameters": YARN | {"mscale": 2.0}}),
        ("LlamaConfig", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        ("Qwen2Config", {"use_sliding_window": True}),
        ("Qwen2MoeConfig", {"norm_topk_prob": True}),
        ("Qwen3MoeConfig", {"mlp_only_layers": [0], "norm_topk_prob": True}),
        ("GPT2Config", {"activation_function": "relu"}),
        ("GPT2Config", {"scale_attn_by_inverse_layer_idx": True}),
    ],
)
def test_what_gguf_cannot_say_is_refused(model, changes):
    sizes = GPT2_SIZES if model == "GPT2Config" else SIZES
    config = getattr(transformers, model)(**sizes).to_dict() | changes
    with pytest.raises(ConfigError) as error:
        metadata_from_config(config)
    assert "\n" not in str(error.value)


def test_missing_unknown_and_contradicting_tensors_are_refused(tmp_path):
    model = build("LlamaConfig", {})
    config, weights = model.config.to_dict(), dict(model.state_dict())
    lacking = {k: v for k, v in weights.items() if "layers.1.mlp.up" not in k}
    faults = [
        (config, lacking),
        (config, weights | {"model.layers.0.self_attn.r_proj.weight": torch.ones(2, 2)}),
        (config | {"tie_word_embeddings": True}, weights),
        (config, {k: v.double() for k, v in weights.items()}),
    ]
    for settings, tensors in faults:
        with pytest.raises(PolyheadError):
            ours.write(tmp_path / "m.gguf", settings, tensors)
    assert list(tmp_path.iterdir()) == []
    metadata, _ = metadata_from_config(config)
    strange = {
        "token_embd.weight": torch.ones(8, 64),
        "blk.0.x": torch.ones(1),
        "blk.1.x": torch.ones(1),
    }
    write_gguf(tmp_path / "m.gguf", metadata, strange)
    with pytest.raises(ConfigError, match=r"blk\.0\.x"):
        ours.read(tmp_path / "m.gguf")


def test_mutated_files_give_only_our_errors(tmp_path):
    model = build("MixtralConfig", {"num_local_experts": 2, "num_hidden_layers": 1})
    model.save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    weights = open_checkpoint(tmp_path / "hf")
    ours.write(tmp_path / "m.gguf", config, weights, TOKENS)
    whole = (tmp_path / "m.gguf").read_bytes()
    dice, refused, head = random.Random(0), 0, whole.index(b"token_embd")
    for _ in range(300):
        broken = bytearray(whole)
        for _ in range(dice.randint(1, 3)):
            broken[dice.randrange(head + 1500)] = dice.choice((0, 1, 2, 255, dice.randrange(256)))
        (tmp_path / "t.gguf").write_bytes(broken)
        try:
            _, tensors, _ = ours.read(tmp_path / "t.gguf")
            for tensor in tensors.values():
                tensor.sum()
        except PolyheadError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2", "qwen3", "mixtral"])
def test_a_fresh_model_with_every_default_goes_out_and_comes_back(
    family: str, tmp_path: Path
) -> None:
    sizes = dict(vocab_size=50, d_model=32, num_layers=2, num_heads=4)
    sizes |= {} if family == "gpt2" else dict(d_ff=48)
    sizes |= dict(num_experts=4) if family == "mixtral" else {}
    model = polyhead.build(family, seed=0, **sizes).eval()
    ours.write(tmp_path / "m.gguf", model.hf_config(), model.hf_tensors())
    again = polyhead.load(tmp_path / "m.gguf")
    ids = torch.randint(0, 50, (1, 9))
    assert torch.equal(model(ids), again(ids))


def test_another_architecture_is_told_what_to_load() -> None:
    with pytest.raises(ConfigError, match=r"'bert' is not read here.*load the safetensors"):
        family_of_metadata({"general.architecture": "bert"})
