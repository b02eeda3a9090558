"""`polyhead compress`: what it writes is what it measured, and bad input is one line."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.conftest import TEXT, save_model
from tests.tasks.tiny import make
from torch.nn.functional import cross_entropy

import polyhead as ph
from polyhead.cli.compress_table import sources_and_targets
from polyhead.compress.saved import packed_matrices
from polyhead.errors import DataError
from polyhead.generate.seq2seq import Seq2Seq

QUICK = ("--calibration-tokens", "512", "--text-length", "400")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("method", ["nearest", "gptq", "awq"])
def test_a_directory_and_its_table(
    cli: Any, plain: Path, tmp_path: Path, text: Path, method: str
) -> None:
    out = tmp_path / "small"
    words = ["--to", "int4", "--method", method, "--calibration", text, "--text", text, *QUICK]
    ran = cli("compress", plain, "--out", out, *words)
    assert ran.code == 0, ran.err
    lines = [line.split("  ")[0] for line in ran.out.splitlines()]
    assert lines[1:] == [
        "on disk",
        "in memory",
        "read a second",
        "tokens written a second",
        "perplexity",
        "largest change of an answer",
        "cosine of the answers",
        "same first choice",
    ]
    forms = {weight.form for weight, _ in packed_matrices(ph.load(out)).values()}
    assert forms == {"int4", "int8"}
    assert ph.tokenizer(out).encode("fox") == ph.tokenizer(plain).encode("fox")
    assert cli("generate", out, "the quick", "--max-new-tokens", "3").code == 0
    assert cli("info", out).code == 0


def test_json_says_what_the_model_gives(cli: Any, plain: Path, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "small"
    ran = cli("compress", plain, "--out", out, "--to", "nf6", "--text", text, *QUICK, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    small = ph.load(out)
    perplexity = float(ph.perplexity(small, ph.tokenizer(out), TEXT[:400]))
    assert found["after"]["perplexity"] == pytest.approx(perplexity, rel=1e-3)
    assert found["before"]["memory_bytes"] > found["after"]["memory_bytes"]
    assert found["after"]["disk_bytes"] == sum(f.stat().st_size for f in out.rglob("*"))
    assert 0 < found["cost"]["largest_change"] < 1
    assert 0.9 < found["cost"]["cosine"] < 1
    assert 0 <= found["cost"]["same_choice"] <= 1


def test_gguf_and_back_to_floats(cli: Any, tmp_path: Path) -> None:
    source = tmp_path / "wide"
    save_model(source, None)
    fields: Any = dict(d_model=64, d_ff=64, num_layers=2, num_heads=2, max_seq_len=128)
    model = ph.build("llama", vocab_size=ph.tokenizer(source).vocab_size, seed=0, **fields)
    model.save(source, force=True)
    out = tmp_path / "small.gguf"
    words = ["--to", "int4", *QUICK, "--json"]
    ran = cli("compress", source, "--out", out, *words)
    assert ran.code == 0, ran.err
    found = ph.load(out)
    assert ph.tokenizer(out).encode("fox") == ph.tokenizer(source).encode("fox")
    assert cli("compress", source, "--out", tmp_path / "small", *words).code == 0
    again = ph.load(tmp_path / "small")
    ids = torch.arange(8)[None]
    assert torch.allclose(found(ids), again(ids), atol=1e-5)
    for kind, place in (("hf", tmp_path / "floats"), ("gguf", tmp_path / "floats.gguf")):
        ran = cli("convert", tmp_path / "small", place, "--to", kind, "--verify")
        assert ran.code == 0, ran.err
    assert "quantization_config" not in (tmp_path / "floats" / "config.json").read_text()


@pytest.mark.parametrize("kind", ["classify", "none", "lm"])
def test_encoders_have_cosines(cli: Any, tmp_path: Path, kind: str) -> None:
    make(tmp_path / "bert", kind, **({"labels": ("a", "b")} if kind == "classify" else {}))
    out = tmp_path / "small"
    ran = cli(
        "compress", tmp_path / "bert", "--out", out, "--to", "int8", "--method", "gptq", *QUICK
    )
    assert ran.code == 0, ran.err
    assert "perplexity" not in ran.out
    assert "cosine of the answers" in ran.out


@pytest.mark.parametrize("kind", ["t5", "transformer"])
def test_encoder_decoders_are_asked_of_targets(cli: Any, tmp_path: Path, kind: str) -> None:
    """The table's perplexity is that of each target alone, by hand."""
    source, out, file = tmp_path / "pairs", tmp_path / "small", tmp_path / "pairs.tsv"
    save_model(source, None)
    words = ph.tokenizer(source)
    fields: Any = dict(d_model=32, d_ff=40, num_layers=2, num_heads=4)
    model = ph.build(kind, vocab_size=words.vocab_size, seed=0, **fields).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    model.save(source, force=True)
    model = ph.load(source)
    pairs = [("Ada wrote", "the quick brown fox"), ("a moth", "lazy")]
    file.write_text("".join(f"{source}\t{target}\n" for source, target in pairs))
    ran = cli("compress", source, "--out", out, "--to", "fp16", "--text", file, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)["before"]
    nats, count = 0.0, 0
    start = Seq2Seq(model, words).start
    for one, other in pairs:
        (wanted,) = words.encode_targets([other])
        wanted = torch.tensor([*wanted, words.eos_id])
        given = torch.tensor([[start, *wanted[:-1]]])
        with torch.no_grad():
            logits = model(torch.tensor([words.encode(one)]), given)[0]
        nats += float(cross_entropy(logits, wanted, reduction="sum"))
        count += len(wanted)
    assert found["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert found["written_per_second"] > 0


def test_a_plain_text_is_its_own_source() -> None:
    words = [f"w{number}" for number in range(100)]
    pairs = sources_and_targets(" ".join(words))
    assert pairs == [
        (" ".join(words[:32]), " ".join(words[32:64])),
        (" ".join(words[64:96]), " ".join(words[96:])),
    ]
    assert sources_and_targets("a\tb\nc") == [("a", "b")]  # the last line was cut
    assert sources_and_targets("a b") == [("a", "b")]
    with pytest.raises(DataError, match="no target to score"):
        sources_and_targets("a")


def test_unmeasured(cli: Any, plain: Path, tmp_path: Path) -> None:
    ran = cli("compress", plain, "--out", tmp_path / "a", "--to", "bf16", "--unmeasured")
    assert ran.code == 0
    assert ran.out.startswith(f"{tmp_path / 'a'}  ")


@pytest.mark.parametrize("to", [[], ["--to", "int8"]])
def test_zeros_first(cli: Any, plain: Path, tmp_path: Path, to: list[str]) -> None:
    out = tmp_path / "thin"
    ran = cli("compress", plain, "--out", out, "--prune", "0.5", *to, "--unmeasured")
    assert ran.code == 0, ran.err
    down: Any = ph.load(out).backbone.layers[0].ffn.down  # pyright: ignore
    assert float((down.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.02)


def test_two_of_four_are_half(cli: Any, plain: Path, tmp_path: Path) -> None:
    words = ["--prune-by", "2:4", "--to", "fp16", "--unmeasured"]
    ran = cli("compress", plain, "--out", tmp_path / "thin", *words)
    assert ran.code == 0, ran.err
    down: Any = ph.load(tmp_path / "thin").backbone.layers[0].ffn.down  # pyright: ignore
    assert bool(((down.weight == 0).unflatten(1, (-1, 4)).sum(-1) == 2).all())


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_fewer_heads_and_neurons_by_texts(
    cli: Any, plain: Path, tmp_path: Path, text: Path, kind: str
) -> None:
    source, out = plain, tmp_path / "fewer"
    if kind == "encoder":
        source = tmp_path / "bert"
        make(source, "none")
    shares = ["--heads", "0.5", "--neurons", "0.5", "--to", "int8"]
    ran = cli("compress", source, "--out", out, *shares, "--calibration", text, *QUICK, "--json")
    assert ran.code == 0, ran.err
    found, before, after = json.loads(ran.out), ph.load(source), ph.load(out)
    assert after.config.num_heads == before.config.num_heads // 2  # pyright: ignore
    assert found["after"]["memory_bytes"] < found["before"]["memory_bytes"] / 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--heads", "1.5"], "heads is 1.5: a share from 0 to below 1"),
        (["--to", "int3"], "invalid choice"),
        ([], "there is nothing to do"),
        (["--prune", "1.5"], "sparsity is 1.5"),
        (["--to", "int4", "--group", "64"], "group 64 does not divide backbone"),
        (["--to", "nf4", "--method", "gptq"], "no even steps"),
        (["--prune", "0.3", "--method", "gptq"], "--method gptq is of a form"),
        (["--prune", "0.3", "--tuning", "1"], "--tuning 1 is of a form"),
        (["--to", "int8", "--method", "gptq", "--tuning", "1"], "tuning is 1 with form 'int8'"),
        (["--to", "int8", "--prune-by", "global"], "name a share with --prune"),
        (["--to", "int8", "--text-length", "2", "--text", "a.txt"], "no token to score"),
        (["--to", "int4", "--text", "gone.txt"], "cannot read gone.txt"),
        (["--to", "int4", "--method", "gptq", "--calibration-tokens", "0"], "must be above 1"),
    ],
)
def test_bad_input_is_one_line(
    cli: Any, plain: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    (tmp_path / "a.txt").write_text("a")
    words = [str(tmp_path / word) if word == "a.txt" else word for word in words]
    ran = cli("compress", plain, "--out", tmp_path / "small", *words)
    assert ran.code == 2
    assert said in ran.err
    assert len(ran.err.strip().splitlines()) == 1
    assert not (tmp_path / "small").exists()


def test_nothing_is_overwritten(cli: Any, plain: Path, tmp_path: Path) -> None:
    words = ["--to", "int8", "--unmeasured"]
    assert cli("compress", plain, "--out", plain, *words).code == 2
    assert cli("compress", plain, "--out", tmp_path / "a", *words).code == 0
    ran = cli("compress", plain, "--out", tmp_path / "a", *words)
    assert ran.code == 2
    assert "use --force" in ran.err
    assert cli("compress", plain, "--out", tmp_path / "a", *words, "--force").code == 0
    ran = cli("compress", tmp_path / "a", "--out", tmp_path / "b", *words)
    assert ran.code == 2
    assert "few bits already" in ran.err
    assert "what `polyhead convert` makes of it" in ran.err
    ran = cli("export", tmp_path / "a", "--to", "onnx", "--out", tmp_path / "onnx")
    assert ran.code == 2
    assert "load what `polyhead convert` makes of it" in ran.err


def test_what_gguf_cannot_hold(cli: Any, tmp_path: Path) -> None:
    make(tmp_path / "bert", "lm")
    ran = cli("compress", tmp_path / "bert", "--out", tmp_path / "m.gguf", "--to", "int8")
    assert ran.code == 2
    assert "GGUF" in ran.err.splitlines()[-1]
    assert "Traceback" not in ran.err
    assert not (tmp_path / "m.gguf").exists()


def test_a_width_that_gguf_cannot_block_is_refused_before_the_work(
    cli: Any, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polyhead.compress.quantize.quantize", None)
    ran = cli("compress", plain, "--out", tmp_path / "m.gguf", "--to", "int4", "--unmeasured")
    assert ran.code == 2
    assert "16 wide, which GGUF's blocks of 32 do not divide" in ran.err
