"""What is measured: rows of data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.peers.inputs import Inputs

TAKE_FOLDER = ("llama.cpp", "onnxruntime", "ctranslate2", "litgpt")
"""Peers that read what they make of a model, which is kept."""
FEW_BITS = ("int4", "int8", "int8-rows")
"""Forms that ours reads from the disk as they are, made once and kept."""


@dataclass(frozen=True)
class Contender:
    """A library with a setting. model: by its name in `Inputs`; None: the row's for this peer."""

    name: str
    peer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None


@dataclass(frozen=True)
class Row:
    """A piece of work, ours and the others at it.

    model: what each peer reads, "" the rest. unit: "tokens/s", or the like, of which a run does
    `amount`; or "s" and "ms", where less is better. judge: of `gates`. bound: what of the machine's
    ceilings sets the limit: "bytes" read a token or "flops" a unit. goals: "ms", "mib" at most.
    """

    name: str
    about: str
    job: str
    model: Mapping[str, str]
    unit: str
    ours: Contender
    others: tuple[Contender, ...]
    given: Callable[["Inputs"], dict[str, Any]]
    amount: float = 1.0
    judge: str = ""
    bound: str = ""
    goals: Mapping[str, float] = field(default_factory=dict)
    is_timed: bool = True

    @property
    def less_is_better(self) -> bool:
        """Whether the figure is a time."""
        return self.unit in ("s", "ms")

    def options(self, contender: Contender, inputs: "Inputs") -> dict[str, Any]:
        """What a contender's job is opened with."""
        name = contender.model or self.model.get(contender.peer) or self.model[""]
        form = contender.options.get("form")
        is_ours_small = contender.peer == "polyhead" and form in FEW_BITS
        path = inputs.in_few_bits(name, form) if is_ours_small else inputs.model(name)
        found = {"model": path, **contender.options, **self.given(inputs)}
        if contender.peer in TAKE_FOLDER and self.job != "cold_start":
            found["folder"] = str(inputs.folder)
        return found


PARAMETERS = 134.5e6
SMOLLM2 = {
    "": "smollm2", "polyhead": "smollm2.gguf", "llama.cpp": "smollm2.gguf",
}  # fmt: skip


def _ours(form: str) -> Contender:
    return Contender(f"Polyhead {form}", "polyhead", {"form": form})


def _llamacpp(kind: str) -> Contender:
    given = "as it is" if kind == "Q4_1" else kind
    return Contender(f"llama.cpp {kind}", "llama.cpp", {"kind": given})


def _transformers(dtype: str) -> Contender:
    return Contender(f"transformers {dtype}", "transformers", {"dtype": dtype})


FOUR_BITS = (_llamacpp("Q4_1"), _llamacpp("Q4_0"))
LITGPT = Contender("LitGPT bf16", "litgpt", {"dtype": "bf16"})


def _writing(name: str, about: str, form: str, others: tuple[Contender, ...], rows: int) -> Row:
    return Row(
        name, about, "decode", SMOLLM2, "tokens/s", _ours(form), others,
        lambda inputs: {"prompts": inputs.windows(rows, 64), "tokens": 128},
        amount=127 * rows, judge="greedy", bound="bytes" if rows == 1 else "flops",
    )  # fmt: skip


def _prefill(form: str, others: tuple[Contender, ...]) -> Row:
    return Row(
        f"prefill-{form}", f"SmolLM2-135M reads 512 tokens, {form}", "prefill", SMOLLM2,
        "tokens/s", _ours(form), others,
        lambda inputs: {"prompts": inputs.windows(8, 512)},
        amount=512, judge="greedy", bound="flops",
    )  # fmt: skip


def _translate(form: str, others: tuple[Contender, ...], name: str) -> Row:
    return Row(
        name, f"Marian (3 + 3 layers, 256 wide) translates 8 sentences by 4 beams, {form}",
        "translate", {"": "marian"}, "tokens/s", _ours(form), others,
        lambda inputs: {"sources": sources(), "beams": 4, "tokens": 48},
        amount=8 * 48, judge="translations",
    )  # fmt: skip


def sources() -> list[list[int]]:
    """8 rows of 31 ids and an end, for a model that has no words."""
    return [[*((7919 * (32 * row + i)) % 8000 + 10 for i in range(31)), 0] for row in range(8)]


def _forward(size: str, form: str, most_ms: float, most_mib: float) -> Row:
    others = () if form == "int8" else (_transformers(form),)
    return Row(
        f"forward-{size}-{form}", f"A Llama of {size} reads 128 tokens, {form}", "forward",
        {"": size}, "ms", _ours(form), others,
        lambda inputs: {"ids": [(37 * i) % 2000 for i in range(128)]},
        judge="cosine", goals={"ms": most_ms, "mib": most_mib},
    )  # fmt: skip


ROWS = (
    _writing(
        "decode-q4", "SmolLM2-135M writes 128 tokens, 4 bits", "int4",
        (*FOUR_BITS, _transformers("bf16"), LITGPT), 1,
    ),
    _writing(
        "decode-q8", "SmolLM2-135M writes 128 tokens, 8 bits", "int8",
        (_llamacpp("Q8_0"), _transformers("bf16"), LITGPT), 1,
    ),
    _prefill("int4", (*FOUR_BITS, _transformers("bf16"))),
    _prefill("int8", (_llamacpp("Q8_0"), _transformers("bf16"))),
    _writing(
        "batch-q4", "SmolLM2-135M writes 16 texts of 128 tokens at once, 4 bits", "int4",
        (*FOUR_BITS, _transformers("bf16")), 16,
    ),
    _writing(
        "batch-q8", "SmolLM2-135M writes 16 texts of 128 tokens at once, 8 bits", "int8",
        (_llamacpp("Q8_0"), _transformers("bf16")), 16,
    ),
    Row(
        "load", "SmolLM2-135M's GGUF file read, and one token by it", "load", {"": "smollm2.gguf"},
        "s", Contender("Polyhead fp32", "polyhead"),
        (
            Contender("llama.cpp Q4_1", "llama.cpp", {"kind": "as it is"}),
            Contender("llama.cpp Q4_0", "llama.cpp", {"kind": "Q4_0"}),
            Contender("transformers", "transformers"),
        ),
        lambda inputs: {},
    ),
    Row(
        "cold-start", "The first token by SmolLM2-135M, from a process's start to its end",
        "cold_start", {"": "smollm2", "polyhead": "smollm2-135m", "llama.cpp": "smollm2.gguf"}, "s",
        Contender("polyhead generate", "polyhead"),
        (
            Contender("transformers", "transformers"),
            Contender("llama-cpp-python", "llama.cpp"),
        ),
        lambda inputs: {"prompt": "The history of the railway begins"},
    ),
    _translate(
        "fp32",
        (_transformers("fp32"), Contender("CTranslate2 fp32", "ctranslate2", {"form": "float32"})),
        "translate",
    ),
    _translate(
        "int8",
        (_transformers("bf16"), Contender("CTranslate2 int8", "ctranslate2", {"form": "int8"})),
        "translate-int8",
    ),
    Row(
        "embed", "all-MiniLM-L6-v2, 1000 ragged sentences of 30 tokens in the mean", "embed",
        {"": "minilm"}, "sentences/s", _ours("int8-rows"),
        (
            Contender("onnxruntime int8", "onnxruntime", {"form": "int8"}),
            Contender("onnxruntime fp32", "onnxruntime", {"form": "fp32"}),
            Contender("sentence-transformers fp32", "sentence-transformers", {"dtype": "fp32"}),
        ),
        lambda inputs: {"texts": inputs.sentences},
        amount=1000, judge="cosine",
    ),
    *(
        _forward(size, form, ms, mib)
        for size, ms, mib in (("1.2M", 2.5, 45), ("4.8M", 8.1, 180), ("12.3M", 18.7, 450))
        for form in ("fp32", "bf16", "int8")
    ),
    Row(
        "perplexity", "SmolLM2-135M on 10 stretches of 512 tokens", "perplexity", SMOLLM2,
        "perplexity", _ours("fp32"),
        (_ours("int8"), _ours("int4"), _llamacpp("Q8_0"), _llamacpp("Q4_1"), _llamacpp("Q4_0")),
        lambda inputs: {"windows": inputs.windows(10, 512)}, judge="perplexity", is_timed=False,
    ),
)  # fmt: skip


def chosen(patterns: Sequence[str]) -> list[Row]:
    """Rows that a pattern fits (decode-*).

    Errors: ValueError for a pattern that fits none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(row.name, pattern) for row in ROWS):
            names = ", ".join(row.name for row in ROWS)
            raise ValueError(f"no row is called {pattern!r}; there are {names}")
    return [row for row in ROWS if any(fnmatchcase(row.name, each) for each in patterns)]
