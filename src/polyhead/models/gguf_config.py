"""A GGUF file's metadata and a Hugging Face config.json, by the tables of gguf_families."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from polyhead.errors import ConfigError
from polyhead.models.gguf_families import FAMILIES, Family
from polyhead.models.gguf_rope import ROPE_KEYS, metadata_from_rope, plain, scaling_from_metadata

# Metadata that says nothing which other keys or the tensors do not say too.
SILENT = frozenset(
    """vocab_size tensor_data_layout rope.scaling.finetuned rope.dimension_count
    attention.value_length attention.causal rope.freq_base""".split()
)
FLOATS = {"rms_norm_eps", "layer_norm_epsilon", "clip_qkv"}
MOST = 2**31
EXPERT_WIDTHS = {
    "blk.0.ffn_up_exps.weight": "moe_intermediate_size",
    "blk.0.ffn_up_shexp.weight": "shared_expert_intermediate_size",
}
TOKEN_IDS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}


def family_of_metadata(metadata: Mapping[str, Any]) -> Family:
    """The family of a GGUF file. Errors: ConfigError for one that is not read here."""
    arch = metadata.get("general.architecture")
    if arch == "llama":
        kind = "mistral" if metadata.get("llama.attention.sliding_window") else "llama"
        return family_of_config({"model_type": "mixtral" if _experts(metadata) else kind})
    for family in FAMILIES:
        if family.arch == arch:
            return family
    known = ", ".join(dict.fromkeys(family.arch for family in FAMILIES))
    raise ConfigError(
        f"GGUF architecture {arch!r} is not read here (known: {known}); load the safetensors that "
        "it was made from"
    )


def family_of_config(config: Mapping[str, Any]) -> Family:
    """The family of a config.json. Errors: ConfigError where GGUF, or this table, has none."""
    for family in FAMILIES:
        if family.model_type == config.get("model_type"):
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise ConfigError(
        f"model_type {config.get('model_type')!r} cannot be written as GGUF (known: {known}); "
        "save it as safetensors"
    )


def config_from_metadata(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], freqs: Tensor | None
) -> dict[str, Any]:
    """The config.json of a file: its metadata, its tensors' shapes, and rope_freqs.weight if any.

    Errors: ConfigError for a key that is missing, or that changes the numbers and is not read here.
    """
    family = family_of_metadata(metadata)
    given = {
        key.removeprefix(f"{family.arch}."): value
        for key, value in metadata.items()
        if key.startswith(f"{family.arch}.")
    }
    config: dict[str, Any] = {"model_type": family.model_type}
    config["architectures"] = [family.architecture]
    config |= family.fixed
    for key, name in family.keys.items():
        if key in given:
            config[name] = _setting(key, name, given[key])
    if "token_embd.weight" not in shapes:
        raise ConfigError("the GGUF file has no token_embd.weight; it holds no language model")
    config["vocab_size"] = shapes["token_embd.weight"][0]
    config["tie_word_embeddings"] = "output.weight" not in shapes
    if family.model_type == "gpt2":
        config["n_ctx"] = config.get("n_positions")
    else:
        _fill_decoder(family, config, given, shapes, freqs)
    for key, name in TOKEN_IDS.items():
        if key in metadata:
            config[name] = metadata[key]
    _check_read(family, given, config)
    _check_sizes(family, config, shapes)
    return config


def metadata_from_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """Metadata of a config.json, and the factors [head_dim / 2] of rope_freqs.weight if any.

    Errors: ConfigError for what GGUF cannot say about this architecture.
    """
    family = family_of_config(config)
    if config.get("polyhead_ranks"):
        raise ConfigError("GGUF has no layers of low rank: save what merge_low_rank makes of them")
    for name, value in family.fixed.items():
        if config.get(name, value) not in (
            value,
            "gelu_pytorch_tanh" if value == "gelu_new" else value,
        ):
            raise ConfigError(
                f"{name} = {config[name]!r}: GGUF's {family.arch} always has {value!r}; "
                "save it as safetensors"
            )
    if family.are_queries_whole:
        _check_queries(family, config)
    settings = dict(config)
    for name, other in (("num_experts", "num_local_experts"), ("num_local_experts", "num_experts")):
        settings.setdefault(name, config.get(other))  # transformers has both names for one thing
    freqs, rope = None, {}
    if family.model_type == "gpt2":
        settings["n_inner"] = settings.get("n_inner") or 4 * settings["n_embd"]
    else:
        heads = settings["num_attention_heads"]
        settings["head_dim"] = settings.get("head_dim") or settings["hidden_size"] // heads
        settings.setdefault("num_key_value_heads", heads)
        rope, freqs = metadata_from_rope(settings)
        rope["rope.dimension_count"] = settings["head_dim"]
        rope["attention.value_length"] = settings["head_dim"]
    metadata: dict[str, Any] = {"general.architecture": family.arch}
    for key, name in family.keys.items():
        value = settings.get(name)
        if value is None and key not in family.optional:
            raise ConfigError(f"the config has no {name}, which GGUF's {family.arch} needs")
        if value is not None:
            number = float(value) if name in FLOATS else value
            metadata[f"{family.arch}.{key}"] = number
    metadata |= {f"{family.arch}.{key}": value for key, value in rope.items()}
    metadata[f"{family.arch}.vocab_size"] = config["vocab_size"]
    for key, name in TOKEN_IDS.items():
        value = config.get(name)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int):
            metadata[key] = value
    return metadata, freqs


def _fill_decoder(
    family: Family,
    config: dict[str, Any],
    given: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    freqs: Tensor | None,
) -> None:
    """What Llama-like decoders derive from other keys or from the tensors."""
    heads = config.get("num_attention_heads", 1)
    config.setdefault("num_key_value_heads", heads)
    config.setdefault("head_dim", config.get("hidden_size", 0) // heads)
    width = config["head_dim"]
    for key in ("rope.dimension_count", "attention.value_length"):
        if given.get(key, width) != width:
            raise ConfigError(
                f"{key} = {given[key]} differs from the head width {width}; not read here"
            )
    for name, width_key in EXPERT_WIDTHS.items():  # files of the first converters say neither
        if name in shapes and width_key in family.keys.values():
            config.setdefault(width_key, shapes[name][-2])
    if config["model_type"] in ("llama", "qwen3", "qwen3_moe", "olmoe"):
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
    if config["model_type"] == "qwen2_moe":
        config["qkv_bias"] = "blk.0.attn_q.bias" in shapes
    if config["model_type"] == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    config.setdefault("sliding_window", None)
    config["rope_theta"] = plain("rope.freq_base", given.get("rope.freq_base", 10000.0))
    config["rope_scaling"] = scaling_from_metadata(given, config, freqs)


def _setting(key: str, name: str, value: Any) -> int | float:
    """A number of the table: a float where it must be, otherwise a size."""
    value = plain(key, value)
    if name in FLOATS:
        return float(value)
    if type(value) is not int or not 0 < value < MOST:
        raise ConfigError(f"{key} = {value} is not a size; convert the model again")
    return value


def _check_sizes(
    family: Family, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """What would cost memory or time by the config's word alone must agree with the tensors."""
    layers = {name.split(".")[1] for name in shapes if name.startswith("blk.")}
    width = config[family.keys["embedding_length"]]
    claimed = {
        "layers": (config[family.keys["block_count"]], len(layers)),
        "width": (width, shapes["token_embd.weight"][-1]),
    }
    if "position_embd.weight" in shapes:
        claimed["positions"] = (config["n_positions"], shapes["position_embd.weight"][0])
    if "num_experts" in config or "num_local_experts" in config:
        stacks = {shape[0] for name, shape in shapes.items() if name.endswith("_exps.weight")}
        experts = config.get("num_experts", config.get("num_local_experts", 0))
        claimed["experts"] = (experts, max(stacks, default=0))
    for what, (said, found) in claimed.items():
        if said != found:
            raise ConfigError(
                f"the GGUF metadata says {said} {what}, the tensors {found}; convert it again"
            )


def _check_read(family: Family, given: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Every key of the architecture must have been read, and every key of the table found."""
    for key, value in given.items():
        known = key in family.keys or key in SILENT or key == "rope.scale_linear"
        rope = key.startswith("rope.scaling.") and key.removeprefix("rope.scaling.") in ROPE_KEYS
        neutral = value == 0 and key in ("expert_count", "expert_used_count")
        if not (known or rope or neutral) or (key == "attention.causal" and not value):
            raise ConfigError(f"{family.arch}.{key} = {str(value)[:60]} is not read here")
    for key, name in family.keys.items():
        if name not in config and key not in family.optional:
            raise ConfigError(f"the GGUF file lacks {family.arch}.{key}; convert the model again")


def _check_queries(family: Family, config: Mapping[str, Any]) -> None:
    """ConfigError for heads that are together narrower or wider than the model."""
    keys = ("n_head", "n_embd") if "n_head" in config else ("num_attention_heads", "hidden_size")
    heads, width = (config[key] for key in keys)
    each = config.get("head_dim") or width // heads
    if heads * each != width:
        raise ConfigError(
            f"{heads} heads of {each} are {heads * each} wide, and those of GGUF's {family.arch} "
            f"are as wide as the model, {width}; save it as safetensors"
        )


def _experts(metadata: Mapping[str, Any]) -> bool:
    return bool(metadata.get("llama.expert_count"))
