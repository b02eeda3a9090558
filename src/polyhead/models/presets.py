"""Published base models as rows: a model type, the sizes and options it was trained with.

`ph.build(**PRESETS["roberta"].arguments())` makes one with fresh weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polyhead.errors import ConfigError
from polyhead.models.clip_config import CLIPVisionConfig
from polyhead.models.llama_config import LlamaConfig


@dataclass(frozen=True)
class Preset:
    """One row.

    checkpoint: the published model that the sizes are of. objective, tokenizer: what it was
    trained by, and what makes its ids. fields: of its type's config, where they are not the
    defaults.
    """

    model_type: str
    head: str
    checkpoint: str
    objective: str
    tokenizer: str
    fields: Mapping[str, Any]

    def arguments(self) -> dict[str, Any]:
        """What `build` takes."""
        return {"family": self.model_type, "head": self.head, **self.fields}


IMAGENET = {"labels": tuple(f"LABEL_{number}" for number in range(1000))}
WORDPIECE = "WordPiece, lower case"
BYTE_BPE = "byte-level BPE"
UNIGRAM = "SentencePiece unigram"
BYTE_FALLBACK = "SentencePiece BPE, bytes for the unknown"
NO_TOKENS = "none: patches of pixels"
LLAMA_7B: Mapping[str, Any] = dict(
    d_model=4096, d_ff=11008, num_layers=32, num_heads=32, max_seq_len=4096, norm_eps=1e-5
)

PRESETS: Mapping[str, Preset] = {
    "bert": Preset(
        "bert", "lm", "google-bert/bert-base-uncased",
        "masked LM (15 %) and next sentence", WORDPIECE, {},
    ),
    "roberta": Preset(
        "roberta", "lm", "FacebookAI/roberta-base",
        "masked LM, masks drawn anew each epoch", BYTE_BPE,
        dict(vocab_size=50265, max_seq_len=514, type_vocab_size=1, norm_eps=1e-5, pad_id=1),
    ),
    "distilbert": Preset(
        "distilbert", "lm", "distilbert/distilbert-base-uncased",
        "masked LM, with BERT's own answers as targets", WORDPIECE, dict(num_layers=6),
    ),
    "albert": Preset(
        "albert", "lm", "albert/albert-base-v2",
        "masked LM over n-grams, and sentence order", UNIGRAM, {},
    ),
    "deberta": Preset(
        "deberta", "lm", "microsoft/deberta-base",
        "masked LM; positions enter before the vocabulary", BYTE_BPE, dict(vocab_size=50265),
    ),
    "deberta-v3": Preset(
        "deberta-v2", "rtd", "microsoft/deberta-v3-base",
        "replaced-token detection beside a generator", UNIGRAM, {},
    ),
    "gpt2": Preset("gpt2", "lm", "openai-community/gpt2", "causal LM", BYTE_BPE, {}),
    "llama": Preset(
        "llama", "lm", "meta-llama/Llama-3.1-8B", "causal LM", BYTE_BPE,
        dict(
            vocab_size=128256, d_model=4096, d_ff=14336, num_layers=32, num_heads=32,
            num_kv_heads=8, max_seq_len=131072, norm_eps=1e-5, rope_base=500000.0,
            rope_scaling=dict(
                rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            ),
        ),
    ),
    "mistral": Preset(
        "mistral", "lm", "mistralai/Mistral-7B-v0.1", "causal LM", BYTE_FALLBACK,
        dict(
            vocab_size=32000, d_model=4096, d_ff=14336, num_layers=32, num_heads=32,
            num_kv_heads=8, max_seq_len=32768, norm_eps=1e-5, window=4096,
        ),
    ),
    "qwen2": Preset(
        "qwen2", "lm", "Qwen/Qwen2-0.5B", "causal LM", BYTE_BPE,
        dict(
            vocab_size=151936, d_model=896, d_ff=4864, num_layers=24, num_heads=14,
            num_kv_heads=2, max_seq_len=131072, rope_base=1e6, tie_embeddings=True,
            use_window=False,
        ),
    ),
    "qwen3": Preset(
        "qwen3", "lm", "Qwen/Qwen3-0.6B", "causal LM", BYTE_BPE,
        dict(
            vocab_size=151936, d_model=1024, d_ff=3072, num_layers=28, num_heads=16,
            num_kv_heads=8, head_dim=128, max_seq_len=40960, rope_base=1e6, tie_embeddings=True,
            use_window=False,
        ),
    ),
    "mixtral": Preset(
        "mixtral", "lm", "mistralai/Mixtral-8x7B-v0.1", "causal LM, with a loss that balances",
        BYTE_FALLBACK,
        dict(
            vocab_size=32000, d_model=4096, d_ff=14336, num_layers=32, num_heads=32,
            num_kv_heads=8, max_seq_len=32768, norm_eps=1e-5, rope_base=1e6, num_experts=8,
            top_k=2, router_aux_coef=0.02,
        ),
    ),
    "t5": Preset(
        "t5", "lm", "google-t5/t5-base", "span corruption, and tasks as text", UNIGRAM,
        dict(d_model=768, d_ff=3072, num_layers=12, num_heads=12, dropout=0.1),
    ),
    "flan-t5": Preset(
        "t5", "lm", "google/flan-t5-base", "span corruption, then instructions", UNIGRAM,
        dict(
            d_model=768, d_ff=2048, num_layers=12, num_heads=12, dropout=0.1,
            feed_forward="gated-gelu", tie_embeddings=False,
        ),
    ),
    "marian": Preset(
        "marian", "lm", "Helsinki-NLP/opus-mt-en-de", "translation", UNIGRAM,
        dict(
            d_model=512, d_ff=2048, num_layers=6, num_heads=8, max_seq_len=512,
            activation="silu", scale_embeddings=True, dropout=0.1,
        ),
    ),
    "vit": Preset(
        "vit", "classify", "google/vit-base-patch16-224", "image classes", NO_TOKENS, IMAGENET
    ),
    "deit": Preset(
        "deit", "distilled", "facebook/deit-base-distilled-patch16-224",
        "image classes, with a teacher's answers as targets", NO_TOKENS, IMAGENET,
    ),
    "dinov2": Preset(
        "dinov2", "none", "facebook/dinov2-base", "itself: a student sees crops of its teacher's",
        NO_TOKENS, dict(image_size=518),
    ),
    "swin": Preset(
        "swin", "classify", "microsoft/swin-tiny-patch4-window7-224", "image classes", NO_TOKENS,
        IMAGENET,
    ),
    "clip": Preset(
        "clip", "contrastive", "openai/clip-vit-base-patch32",
        "images and their captions find each other", BYTE_BPE + ", lower case", {},
    ),
    "llava": Preset(
        "llava", "lm", "llava-hf/llava-1.5-7b-hf", "causal LM after images", BYTE_FALLBACK,
        dict(
            text=LlamaConfig.fresh("llama", vocab_size=32064, **LLAMA_7B),
            vision=CLIPVisionConfig.fresh(
                "clip_vision_model", d_model=1024, d_ff=4096, num_layers=24, num_heads=16,
                image_size=336, patch_size=14, projection_dim=768,
            ),
        ),
    ),
}  # fmt: skip


def preset(name: str) -> Preset:
    """A row. ConfigError for a name that none has."""
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
