"""What is saved in few bits comes back bit for bit, and nothing else passes for it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import polyhead as ph
from polyhead.compress import formats
from polyhead.compress.quantize import weight_bytes
from polyhead.compress.saved import packed_matrices
from polyhead.errors import ConfigError, FileError
from polyhead.files.safetensors import open_checkpoint
from polyhead.files.safetensors_write import write_checkpoint
from polyhead.models.model import TaskModel

WORDS: dict[str, Any] = dict(d_model=64, num_layers=2, num_heads=4, vocab_size=70)
SEEN: dict[str, Any] = dict(d_model=64, num_layers=2, num_heads=4, d_ff=96, image_size=32)
FAMILIES: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "llama": ("llama", None, dict(WORDS, d_ff=96, num_kv_heads=2)),
    "llama-tied": ("llama", None, dict(WORDS, d_ff=96, tie_embeddings=True)),
    "llama-bare": ("llama", "none", dict(WORDS, d_ff=96)),
    "gpt2": ("gpt2", None, dict(WORDS, max_seq_len=32)),
    "odd": ("gpt2", None, dict(WORDS, d_model=36, num_heads=3, d_ff=50, max_seq_len=32)),
    "mixtral": ("mixtral", None, dict(WORDS, d_ff=48, num_experts=4, top_k=2)),
    "qwen2_moe": ("qwen2_moe", None, dict(WORDS, d_ff=48, num_experts=4, shared_d_ff=32)),
    "bert": ("bert", None, dict(WORDS, d_ff=96)),
    "bert-classify": ("bert", "classify", dict(WORDS, d_ff=96, labels=("a", "b", "c"))),
    "bert-pretraining": ("bert", "pretraining", dict(WORDS, d_ff=96)),
    "bert-bare": ("bert", "none", dict(WORDS, d_ff=96)),
    "albert": ("albert", None, dict(WORDS, d_ff=96, embedding_width=32)),
    "deberta": ("deberta", None, dict(WORDS, d_ff=96)),
    "deberta-v2": ("deberta-v2", None, dict(WORDS, d_ff=96, position_buckets=8)),
    "t5": ("t5", None, dict(WORDS, d_ff=96)),
    "t5-untied": ("t5", None, dict(WORDS, d_ff=96, tie_embeddings=False)),
    "marian": ("marian", None, dict(WORDS, d_ff=96, max_seq_len=32)),
    "vit": ("vit", "classify", dict(SEEN, patch_size=8, labels=("a", "b"))),
    "lstm": ("lstm", None, dict(vocab_size=70, d_model=64)),
    "bigram": ("bigram", None, dict(vocab_size=70)),
}


def made(name: str) -> TaskModel:
    family, head, fields = FAMILIES[name]
    return ph.build(family, head=head, seed=0, **fields).eval()


def given(model: TaskModel) -> dict[str, Tensor]:
    torch.manual_seed(3)
    kind = getattr(model.config, "kind", "decoder")
    if kind == "vision":
        return {"pixel_values": torch.randn(2, 3, 32, 32)}
    ids = torch.randint(5, 70, (2, 9))
    more = {"decoder_input_ids": ids.flip(1)} if kind == "encoder-decoder" else {}
    return {"input_ids": ids, **more}


def answer(model: TaskModel, **named: Any) -> Tensor:
    with torch.inference_mode():
        return model(**given(model), **named)


@pytest.mark.parametrize("form", ["int4", "int8", "nf4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_comes_back_bit_for_bit(name: str, form: str, tmp_path: Path) -> None:
    model = ph.quantize(made(name), form)
    model.save(tmp_path)
    again = ph.load(tmp_path)
    assert torch.equal(answer(again), answer(model))
    ours, theirs = packed_matrices(model), packed_matrices(again)
    assert ours.keys() == theirs.keys()
    for key, (weight, digest) in ours.items():
        found, its_digest = theirs[key]
        assert (type(found), its_digest) == (type(weight), digest)
        for (part, a), (_, b) in zip(weight.named_buffers(), found.named_buffers(), strict=True):
            assert torch.equal(a, b), f"{key}.{part}"
    assert weight_bytes(again) == weight_bytes(model)
    assert again.num_parameters() == model.num_parameters()
    # And once more from there.
    again.save(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("form", ["nf6", "int8-rows", "fp16", "bf16", "int4-64", "int8-64"])
def test_every_form_is_saved(form: str, tmp_path: Path) -> None:
    base, _, group = form.partition("-6")
    fields = dict(WORDS, d_ff=128, num_kv_heads=2)
    grouped: Any = {"group": 64} if group else {}
    model = ph.quantize(ph.build("llama", seed=0, **fields).bfloat16().eval(), base, **grouped)
    model.save(tmp_path)
    again = ph.load(tmp_path)
    assert again.dtype == torch.bfloat16
    assert torch.equal(answer(again), answer(model))
    assert {weight.form for weight, _ in packed_matrices(again).values()} == {
        weight.form for weight, _ in packed_matrices(model).values()
    }
    assert form in {weight.form for weight, _ in packed_matrices(again).values()}


def test_it_takes_the_place_that_few_bits_take(tmp_path: Path) -> None:
    fields = dict(WORDS, d_model=256, d_ff=768, vocab_size=1000)
    model = ph.build("llama", seed=0, **fields).eval()
    ph.quantize(model, "int4").save(tmp_path / "four")
    model.save(tmp_path / "whole")
    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("four", "whole")]
    assert sizes[0] < 0.2 * sizes[1]


def test_nothing_is_unpacked_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ph.quantize(made("mixtral"), "int4")
    answers = answer(model)

    def refuse(*args: Any) -> None:
        raise AssertionError("unpacked")

    with monkeypatch.context() as patch:
        patch.setattr(formats.Stepped, "unpack", refuse)
        model.save(tmp_path)
        again = ph.load(tmp_path)
    assert torch.equal(answer(again), answers)


def test_other_heads_of_a_checkpoint(tmp_path: Path) -> None:
    model = ph.quantize(made("llama-tied"), "int4")
    model.save(tmp_path)
    bare = ph.load(tmp_path, head="none")
    assert torch.equal(answer(bare), model.backbone(given(model)["input_ids"]))
    fresh = ph.load(tmp_path, head="classify", labels=["a", "b"])
    assert answer(fresh).shape == (2, 2)
    assert fresh.drawn == ("head",)
    wide = ph.load(tmp_path, dtype="float64")
    assert answer(wide).dtype == torch.float64


def test_adapters_go_on_it(tmp_path: Path) -> None:
    """An adapter made beside the floats fits what was saved in few bits, and names it as a base."""
    model = made("llama")
    ph.quantize(model, "nf4").save(tmp_path / "base")
    base = ph.load(tmp_path / "base")
    ph.add_adapter(base)
    ph.save_adapter(base, tmp_path / "adapter")
    ph.load_adapter(model, tmp_path / "adapter")
    assert torch.equal(answer(ph.load(tmp_path / "adapter")), answer(base))


def test_floats_are_a_plain_checkpoint(tmp_path: Path) -> None:
    model = ph.quantize(made("gpt2"), "int4")
    model.save(tmp_path / "few")
    ph.load(tmp_path / "few").save(tmp_path / "floats", floats=True)
    assert "quantization_config" not in json.loads((tmp_path / "floats/config.json").read_text())
    assert torch.allclose(answer(ph.load(tmp_path / "floats")), answer(model), atol=1e-5)
    with pytest.raises(FileError, match="already holds a model"):
        model.save(tmp_path / "few")
    # A plain one over it leaves nothing of the manifest.
    made("gpt2").save(tmp_path / "few", force=True)
    assert torch.equal(answer(ph.load(tmp_path / "few")), answer(made("gpt2")))


def test_what_pack_laid_out_is_saved_as_floats_alone(tmp_path: Path) -> None:
    packed = ph.pack(ph.quantize(made("llama"), "int4"))
    if not any(type(part).__name__ == "LaidOutInt4" for part in packed.modules()):
        pytest.skip("nothing compiles it here")
    with pytest.raises(ConfigError, match=r"save the model before ph\.pack"):
        packed.save(tmp_path)
    packed.save(tmp_path, floats=True)  # pyright: ignore[reportCallIssue]


def _config(folder: Path, change: Any) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text())
    change(data["quantization_config"])
    path.write_text(json.dumps(data))


def _tensors(folder: Path, change: Any) -> None:
    tensors = {name: tensor.clone() for name, tensor in open_checkpoint(folder).items()}
    change(tensors)
    write_checkpoint(folder, tensors)


Q = "backbone.layers.0.attention.q.weight"
THEIRS = "model.layers.0.self_attn.q_proj.weight"
TAMPERED: dict[str, tuple[Any, Any, str]] = {
    "newer": (_config, lambda m: m.update(version=2), "by a newer Polyhead"),
    "version": (_config, lambda m: m.update(version="x"), "has 'version': 'x'"),
    "no matrices": (_config, lambda m: m.pop("matrices"), "has 'matrices': None"),
    "row": (_config, lambda m: m["matrices"].update({Q: 3}), "q.weight': 3"),
    "form": (_config, lambda m: m["matrices"][Q].update(form="int3"), "the form 'int3'"),
    "another form": (_config, lambda m: m["matrices"][Q].update(form="int8"), "needs torch.int8"),
    "shape": (_config, lambda m: m["tensors"].update({THEIRS: [8, -1]}), r"\[8, -1\]"),
    "other shape": (_config, lambda m: m["tensors"].update({THEIRS: [8, 64]}), "do not belong"),
    "not named": (_config, lambda m: m["matrices"].pop(Q), "holds 3 tensor"),
    "no outline": (_config, lambda m: m["tensors"].pop(THEIRS), "lacks 1 tensor"),
    "lost part": (_tensors, lambda t: t.pop(f"{Q}.least"), "lacks .*q.weight.least"),
    "lost": (_tensors, lambda t: t.pop("model.norm.weight"), "lacks 1 tensor"),
    "cut": (_tensors, lambda t: t.update({f"{Q}.codes": t[f"{Q}.codes"][:9]}), "needs torch.uint8"),
    "twice": (_tensors, lambda t: t.update({THEIRS: torch.ones(64, 64)}), "twice"),
    "is true": (_config, lambda m: m.update(version=True), "has 'version': True"),
    "nowhere": (_config, lambda m: m["matrices"].update({f"{Q}er": m["matrices"][Q]}), "no place"),
    "huge": (_config, lambda m: m["tensors"].update({THEIRS: [2**39] * 2}), "of no form known"),
    "surplus": (_tensors, lambda t: t.update({"x": torch.ones(1)}), "holds 1 tensor"),
}  # fmt: skip


@pytest.mark.parametrize(("where", "change", "said"), TAMPERED.values(), ids=TAMPERED)
def test_what_was_tampered_with_is_refused(
    where: Any, change: Any, said: str, tmp_path: Path
) -> None:
    ph.quantize(made("llama"), "int4").save(tmp_path)
    where(tmp_path, change)
    with pytest.raises(FileError, match=said) as caught:
        ph.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_few_bits_without_their_manifest_are_refused(tmp_path: Path) -> None:
    ph.quantize(made("llama"), "int4").save(tmp_path)
    path = tmp_path / "config.json"
    data = json.loads(path.read_text())
    del data["quantization_config"]
    path.write_text(json.dumps(data))
    with pytest.raises(FileError, match="has no quantization_config to read it by"):
        ph.load(tmp_path)


def test_a_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    ph.quantize(made("llama"), "int4").save(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FileError, match="fetch the file again"):
        ph.load(tmp_path)
